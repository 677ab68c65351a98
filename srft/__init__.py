"""`srft`: single-stage supervised + reinforcement fine-tuning of language models, on `srft_kernels`."""
