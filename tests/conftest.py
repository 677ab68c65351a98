"""Without a GPU, Triton kernels run in Triton's interpreter; that has to be known before triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
