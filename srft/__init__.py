"""`srft`: single-stage supervised + reinforcement fine-tuning of language models, on the loss head of `srft_kernels`."""
