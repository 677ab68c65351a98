"""`srft`: single-stage supervised + reinforcement fine-tuning of language models, on `srft_kernels`."""

import os
import sys

# Threads of GNU OpenMP spin for work, by default for milliseconds, also for one that others keep from running:
# beside other programs a training step took twice as long. With fewer spins it does not, and on a quiet machine nothing
# changes (docs/training.md). It is read when torch is loaded.
SPINS = 10_000
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
