"""Cross-sampling: a model writes, and where it differs most from another the other's distribution is drawn from.

The causal test of which tokens carry what training gave (arXiv 2603.22446): the base with a few per cent of the trained
model's tokens, and the trained model with as few of the base's.
"""

import math

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from srft.model import LoadedModel
from srft.rollout.transformers_engine import TransformersEngine


class CrossEngine(TransformersEngine):
    """Samples with one model, and with another where their Jensen-Shannon divergence (nats) exceeds `threshold`.

    tokens, swapped: how many it has written so far, and how many of them were the other's.
    """

    def __init__(self, loaded: LoadedModel, other: LoadedModel, threshold: float):
        super().__init__(loaded)
        self.other, self.threshold = TransformersEngine(other), threshold
        self.tokens = self.swapped = 0

    def _batch(self, prompts, owners, generation, processors):
        swap = Swap(self.other, [len(prompts[i]) for i in owners], self.threshold)
        with self.other._plain_sampling():
            rows = super()._batch(prompts, owners, generation, LogitsProcessorList([swap, *processors]))
        swapped = torch.stack(swap.swapped, 1).tolist()  # (rows, steps)
        for row, of_row in zip(rows, swapped):
            length = len(self._rollout(row).tokens)
            self.tokens += length
            self.swapped += sum(of_row[:length])
        return rows


class Swap:
    """A processor of logits (rows, V): those of another model where the two differ by more than the threshold.

    lengths: of each row's prompt.   swapped: (rows,) of each step, where that was so.
    """

    def __init__(self, other: TransformersEngine, lengths: list[int], threshold: float):
        self.other, self.threshold = other, threshold
        self.padding = torch.tensor([max(lengths) - length for length in lengths], device=other.device)
        self.cache = other.plain_cache() if other.cache_holds else None
        self.swapped: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        others = self._logits(input_ids).to(scores)
        common = min(scores.shape[1], others.shape[1])  # one head may be padded further
        swapped = jensen_shannon(scores[:, :common], others[:, :common]) > self.threshold
        self.swapped.append(swapped)
        others = torch.nn.functional.pad(others[:, :common], (0, scores.shape[1] - common), value=-math.inf)
        return torch.where(swapped[:, None], others, scores)

    def _logits(self, input_ids: Tensor) -> Tensor:
        """(rows, V) of the other model, for the next token."""
        other, width = self.other, input_ids.shape[1]
        mask = (torch.arange(width, device=other.device) >= self.padding[:, None]).long()
        seen = self.cache.get_seq_length() if self.cache is not None else 0
        given = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, seen:], "logits_to_keep": 1}
        given |= {"use_cache": self.cache is not None, other.cache_name: self.cache}
        known = {name: value for name, value in given.items() if name in other.accepted}
        return other.model(input_ids=input_ids[:, seen:], attention_mask=mask, **known).logits[:, -1]


def jensen_shannon(one: Tensor, another: Tensor) -> Tensor:  # (n, V), (n, V)
    """(n,) in nats, of logits."""
    p, q = one.float().log_softmax(-1), another.float().log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).nansum(-1) + (q.exp() * (q - middle)).nansum(-1)) / 2
