"""Rollouts by transformers' `generate`, with the prompt's keys and values computed once for all of its samples.

Rows of similar prompt length share a batch (left-padded, so that every row continues at the same column); a batch ends
as soon as all of its rows have produced an end-of-sequence token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from srft.model import LoadedModel
from srft.rollout import Rollout


class TransformersEngine:
    """Samples with the very model that is being trained; no weights are copied."""

    def __init__(self, loaded: LoadedModel, batch_size: int):
        self.model = loaded.model
        self.device = loaded.device
        self.eos_ids = loaded.eos_ids
        self.pad_id = loaded.pad_id
        self.batch_size = batch_size

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        samples: int,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> list[list[Rollout]]:
        """See `srft.rollout.Engine.generate`."""
        sampling = {"do_sample": False}
        if temperature > 0:
            # top_k=0: the library's own default keeps the 50 likeliest tokens only.
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.eos_ids) or None,
            pad_token_id=self.pad_id,
            **sampling,
        )
        # Sorted by length there is little padding; the samples of a prompt stay neighbours and share its prefill.
        rows = sorted(
            (index for index in range(len(prompts)) for _ in range(samples)), key=lambda i: (-len(prompts[i]), i)
        )
        completions: list[list[Rollout]] = [[] for _ in prompts]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._plain_sampling():
            torch.manual_seed(seed)
            for start in range(0, len(rows), self.batch_size):
                owners = rows[start : start + self.batch_size]
                for owner, tokens in zip(owners, self._batch(prompts, owners, generation)):
                    completions[owner].append(self._rollout(tokens))
        return completions

    def _batch(self, prompts: list[list[int]], owners: list[int], generation: GenerationConfig) -> list[list[int]]:
        """New tokens of one batch of rows; row r continues `prompts[owners[r]]`. Rows are padded after their end."""
        distinct = list(dict.fromkeys(owners))
        longest = max(len(prompts[i]) for i in distinct)
        ids = torch.tensor([[self.pad_id] * (longest - len(prompts[i])) + prompts[i] for i in distinct])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in distinct])
        ids, mask = ids.to(self.device), mask.to(self.device)
        row_of = torch.tensor([distinct.index(i) for i in owners], device=self.device)
        cache = self._prefill(ids, mask, row_of) if len(distinct) < len(owners) and longest > 1 else None
        output = self.model.generate(
            input_ids=ids[row_of], attention_mask=mask[row_of], generation_config=generation, past_key_values=cache
        )
        return output[:, longest:].tolist()

    def _prefill(self, ids: Tensor, mask: Tensor, row_of: Tensor) -> DynamicCache | None:
        """Keys and values of all but the last prompt token: computed per distinct prompt, given to every row."""
        if getattr(self.model, "_is_stateful", False):  # state-space models carry a state that cannot be re-indexed
            return None
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        self.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_select_indices(row_of)
        return cache

    def _rollout(self, tokens: list[int]) -> Rollout:
        end = next((i for i, token in enumerate(tokens) if token in self.eos_ids), None)
        return Rollout(tokens, finished=False) if end is None else Rollout(tokens[: end + 1], finished=True)

    @contextmanager
    def _plain_sampling(self) -> Iterator[None]:
        """Evaluation mode, and none of the model's own generation settings.

        `generate` fills whatever our GenerationConfig leaves open from `model.generation_config` (repetition penalty,
        min_p, suppressed tokens, …), which would make the sampled distribution another one than the loss assumes.
        """
        own, training = self.model.generation_config, self.model.training
        self.model.generation_config = GenerationConfig()
        self.model.eval()
        try:
            yield
        finally:
            self.model.generation_config = own
            self.model.train(training)
