"""Rollouts by transformers' `generate`, with the prompt's keys and values computed once for all of its samples.

Rows of similar prompt length share a batch (left-padded, so that every row continues at the same column); a batch ends
as soon as all of its rows have produced an end-of-sequence token. A token is drawn as argmax(logits + Gumbel noise),
with noise of the completion's own: who its neighbours in the batch are does not change it.
"""

import inspect
import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from srft.model import LoadedModel
from srft.rollout.engine import Engine, Rollout
from srft.rollout.probe import cache_holds, masks_padding


class TransformersEngine(Engine):
    """Samples with the very model that is being trained; no weights are copied."""

    def __init__(self, loaded: LoadedModel):
        self.model = loaded.model
        self.device = loaded.device
        self.eos_ids = loaded.eos_ids
        self.pad_id = loaded.pad_id
        self.accepted = inspect.signature(loaded.model.forward).parameters
        self.cache_name = (
            "cache" if "cache" in self.accepted else "past_key_values"
        )  # the latter up to transformers 5.2x

        with self._plain_sampling():
            self.masks_padding, self.cache_holds = masks_padding(loaded), cache_holds(loaded)

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
        batch_size: int,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Rollout]]:
        """See `Engine.generate`."""
        generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.eos_ids) or None,
            pad_token_id=self.pad_id,
            do_sample=False,  # the likeliest token, of logits that the noise was added to
            use_cache=self.cache_holds,
        )
        warpers = [TemperatureLogitsWarper(temperature)] if temperature not in (0, 1) else []
        warpers += [TopPLogitsWarper(top_p)] if temperature and top_p < 1 else []
        # Sorted by length there is little padding; the samples of a prompt stay neighbours and share its prefill.
        rows = sorted(
            ((index, sample) for index in range(len(prompts)) for sample in range(samples)),
            key=lambda row: (-len(prompts[row[0]]), row),
        )
        completions: list[list[Rollout]] = [[] for _ in prompts]
        with self._plain_sampling():
            for batch in self._batches(rows, prompts, batch_size):
                owners = [index for index, _ in batch]
                names = [f"{seed}/{numbers[index] if numbers else index}/{sample}" for index, sample in batch]
                noise = [GumbelNoise(names, self.device)] if temperature else []
                tokens = self._batch(prompts, owners, generation, LogitsProcessorList([*warpers, *noise]))
                for owner, row in zip(owners, tokens):
                    completions[owner].append(self._rollout(row))
        return completions

    def _batches(
        self, rows: list[tuple[int, int]], prompts: list[list[int]], batch_size: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Rows in batches, of prompts of one length where the model does not mask what fills up shorter ones."""
        groups = itertools.groupby(rows, key=lambda row: None if self.masks_padding else len(prompts[row[0]]))
        for _, group in groups:
            together = list(group)
            for start in range(0, len(together), batch_size):
                yield together[start : start + batch_size]

    def _batch(
        self,
        prompts: list[list[int]],
        owners: list[int],
        generation: GenerationConfig,
        processors: LogitsProcessorList,
    ) -> list[list[int]]:
        """New tokens of one batch of rows; row r continues `prompts[owners[r]]`. Rows are padded after their end."""
        distinct = list(dict.fromkeys(owners))
        longest = max(len(prompts[i]) for i in distinct)
        ids = torch.tensor([[self.pad_id] * (longest - len(prompts[i])) + prompts[i] for i in distinct])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in distinct])
        ids, mask = ids.to(self.device), mask.to(self.device)
        row_of = torch.tensor([distinct.index(i) for i in owners], device=self.device)
        shared_by_rows = len(distinct) < len(owners)
        cache = self._prefill(ids, mask, row_of) if self.cache_holds and shared_by_rows and longest > 1 else None
        shared = {} if cache is None else {self.cache_name: cache}
        output = self.model.generate(
            input_ids=ids[row_of],
            attention_mask=mask[row_of],
            generation_config=generation,
            logits_processor=processors,
            synced_gpus=False,  # ranks generate apart from each other, with whole weights
            **shared,
        )
        return output[:, longest:].tolist()

    def _prefill(self, ids: Tensor, mask: Tensor, row_of: Tensor) -> DynamicCache | None:
        """Keys and values of all but the last prompt token: computed per distinct prompt, given to every row.

        None where the model has a cache of another kind.
        """
        if (cache := self.plain_cache()) is None:
            return None
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, :-1]
        given = {self.cache_name: cache, "position_ids": positions, "logits_to_keep": 1}
        self.model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            use_cache=True,
            **{name: value for name, value in given.items() if name in self.accepted},
        )
        if cache.get_seq_length() != ids.shape[1] - 1:  # the model has not used it
            return None
        cache.batch_select_indices(row_of)
        return cache

    def plain_cache(self) -> DynamicCache | None:
        """An empty cache of keys and values; None where the model has a cache of its own, or a state that cannot be
        re-indexed (Mamba, LFM2)."""
        cache = DynamicCache(config=self.model.config)
        kinds = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
        plain = kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not getattr(self.model, "_is_stateful", False)
        return cache if plain and self.cache_name in self.accepted else None

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
        logger = logging.getLogger("transformers.modeling_utils")
        logger.addFilter(not_of_padding)
        try:
            yield
        finally:
            logger.removeFilter(not_of_padding)
            self.model.generation_config = own
            self.model.train(training)


def not_of_padding(record: logging.LogRecord) -> bool:
    """False for a warning that padding is not masked: transformers takes what fills up rows that have ended for it."""
    return "input_ids may be padded" not in record.getMessage()


class GumbelNoise:
    """Adds Gumbel noise to logits (rows, V), so that their argmax is a sample of their softmax.

    names: one text per row, which seeds the row's own generator.
    """

    def __init__(self, names: list[str], device: torch.device):
        seeds = [random.Random(name).getrandbits(63) for name in names]
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.exponential: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.exponential is None:
            self.exponential = torch.empty_like(scores)
        for row, generator in zip(self.exponential, self.generators):
            row.exponential_(generator=generator)
        return scores - self.exponential.log()
