"""What else a call can tell of each token, at the price of what it asks for: ranks, likeliest tokens, candidates.

Logits die as soon as their gradient is written over them, so all of it is read while they are there:

    rank, argmax       in the pass over a row that makes its statistics
    top_k              on the GPU one more read of the chunk, which makes the maximum of each group of 64 entries; the k
                       largest entries lie in the k groups of largest maxima. A radix select reads a row some 17 times
    candidates         C numbers of a row

All compare and pick a + b: scale, soft cap and temperature keep their order, and could only round them to ties. The
k + C entries of interest alone are turned into log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks
from .trees import node

MAX_TOP_K = 64
BIASED_ROWS = 128  # whose logits with their bias exist beside the chunk's, to find the largest
GROUP = 64  # entries: with it V / 64 maxima and 64 k entries of their groups are picked from


@checks.options
@dataclass(frozen=True)
class Extras:
    """What to tell of each token beside its statistics: `extras=` of `linear_loss` and `linear_logprobs`.

    rank        how many entries have a strictly larger logit than the target: 0 where it is (or ties with) the largest
    argmax      the entry of largest logit, of several the first
    top_k       so many entries of largest logit, at most 64, largest first; which of several equal ones is unspecified
    candidates  (..., C) entries whose log-probs to tell, integers, for target's (...); any where that is ignored
    """

    rank: bool = False
    argmax: bool = False
    top_k: int = 0
    candidates: Tensor | None = None  # (..., C)

    def __post_init__(self):
        for name in ("rank", "argmax"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"Extras({name}={value!r}): expected True or False")
        if not (checks.integer(self.top_k) and 0 <= self.top_k <= MAX_TOP_K):
            raise ValueError(f"Extras(top_k={self.top_k!r}): expected a number of entries in [0, {MAX_TOP_K}]")
        object.__setattr__(self, "top_k", int(self.top_k))  # of NumPy's
        if self.candidates is not None and not isinstance(self.candidates, Tensor):
            raise TypeError(
                f"Extras(candidates=...) must be a tensor (..., C) of token ids, found {type(self.candidates).__name__}"
            )

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """What is asked for, by its name in TokenExtras: the sizes that follow those of target."""
        sizes = {"rank": ()} if self.rank else {}
        sizes |= {"argmax": ()} if self.argmax else {}
        sizes |= dict.fromkeys(("top_logprobs", "top_ids"), (self.top_k,)) if self.top_k else {}
        return sizes if self.candidates is None else {**sizes, "candidate_logprobs": self.candidates.shape[-1:]}

    def check(self, target: Tensor, live: Tensor | None, vocab: int) -> None:  # (...), (...)
        """Raise for what does not fit a call's tokens and its V entries."""
        if self.top_k > vocab:
            raise ValueError(f"Extras(top_k={self.top_k}), but there are {vocab} entries: ask for no more than those")
        if (candidates := self.candidates) is None:
            return
        checks.tensor("candidates", candidates)
        checks.untransformed("candidates", candidates)
        if candidates.dim() != target.dim() + 1 or candidates.shape[:-1] != target.shape:
            raise ValueError(
                "Extras(candidates=...) must be shaped like target with one more dimension, "
                f"{(*target.shape, 'C')}, found {tuple(candidates.shape)}"
            )
        if candidates.dtype not in checks.INTEGERS:
            raise TypeError(f"Extras(candidates=...) must hold integer token ids, found {candidates.dtype}")
        if candidates.device != target.device:
            raise ValueError(f"Extras(candidates=...) is on {candidates.device} but target on {target.device}: move it")
        if not checks.may_look(candidates):
            return
        wrong = (candidates < 0) | (candidates >= vocab)
        if live is not None:
            wrong &= live[..., None]
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            raise ValueError(f"candidates{where} = {candidates[tuple(where)].item()} lies outside [0, {vocab})")


@node
@dataclass(frozen=True)
class TokenExtras:
    """What an `Extras` asked for, else None; detached. Log-probs are 0 and integers −1 where target is ignored.

    rank                (...) int64; −1 where the target's log-prob is NaN
    argmax              (...) int64; −1 where the logits hold a NaN, or nothing but −inf
    top_logprobs        (..., k), largest first
    top_ids             (..., k) int64; −1 where argmax is, and for entries of probability 0
    candidate_logprobs  (..., C); on CUDA NaN for an id out of range
    """

    rank: Tensor | None = None
    argmax: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    candidate_logprobs: Tensor | None = None

    @classmethod
    def empty(cls, extras: Extras, like: Tensor) -> TokenExtras:  # (...)
        """Room for what was asked for of tokens shaped like `like`, log-probs in its type."""
        return cls(**{
            name: like.new_empty((*like.shape, *size), dtype=like.dtype if name.endswith("logprobs") else torch.int64)
            for name, size in extras.sizes().items()
        })  # fmt: skip

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenExtras:
        return TokenExtras(**{name: function(value) for name, value in self.present().items()})

    def present(self) -> dict[str, Tensor]:
        """What was asked for, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ExtrasBuffer:
    """The extras of n rows while they are filled by the row operations: those of TokenExtras, and the candidates' ids.

    Where log-probs will be stand the logits a + b at first, until the rows' normalizers are known.
    """

    results: TokenExtras
    candidates: Tensor | None = None  # (n, C)

    def __getitem__(self, rows: slice) -> ExtrasBuffer:
        """Those of some of the rows, in the same memory."""
        return ExtrasBuffer(
            self.results.map(lambda field: field[rows]), None if self.candidates is None else self.candidates[rows]
        )

    def take(self, a: Tensor, target: Tensor) -> None:  # (n, V), (n,)
        """Everything from the logits a + b of the rows, which should be in a cache."""
        if self.results.rank is not None:
            self.results.rank.copy_((a > at(a, target[:, None])).sum(-1))
        if self.results.argmax is not None:
            self.results.argmax.copy_(a.argmax(-1))
        self.take_entries(a, None)

    def take_entries(self, a: Tensor, bias: Tensor | None) -> None:  # (n, V), (V,)
        """The largest of a + bias, and the candidates'; a stays as it is."""
        if self.results.top_ids is not None:
            k, step = self.results.top_ids.shape[1], len(a) if bias is None else BIASED_ROWS
            for rows in (slice(start, start + step) for start in range(0, len(a), step)):
                values, ids = largest(a[rows] if bias is None else a[rows] + bias, k)
                self.results.top_logprobs[rows] = values
                self.results.top_ids[rows] = ids
        if self.candidates is not None:
            values = at(a, self.candidates)
            if bias is not None:
                values = values + at(bias.expand(len(a), -1), self.candidates)
            self.results.candidate_logprobs.copy_(values)

    def normalize(self, score_: Callable[[Tensor], Any], shift: Tensor, log_total: Tensor) -> None:  # (n,), (n,)
        """Turn the logits taken into log-probs, with the normalizers of the rows.

        score_: a + b of entries (n, k) → z in place, rounded as where the normalizers were made.
        """
        for values in (self.results.top_logprobs, self.results.candidate_logprobs):
            if values is not None:
                score_(values)
                values.sub_(shift[:, None]).sub_(log_total[:, None])
        if self.results.top_ids is not None:
            self.results.top_ids.masked_fill_(self.results.top_logprobs == -torch.inf, -1)

    def finished(self, logprobs: Tensor, logsumexp: Tensor) -> TokenExtras:  # (n,), (n,)
        """The results, −1 where a row has no distribution or its target no log-prob."""
        rank, argmax, ids = self.results.rank, self.results.argmax, self.results.top_ids
        nowhere = ~logsumexp.detach().isfinite()
        if rank is not None:
            rank.masked_fill_(logprobs.detach().isnan(), -1)
        if argmax is not None:
            argmax.masked_fill_(nowhere, -1)
        if ids is not None:
            ids.masked_fill_(nowhere[:, None], -1)
        return self.results


def at(a: Tensor, ids: Tensor) -> Tensor:  # (n, V), (n, C)
    """a at ids (n, C); NaN for an id out of range."""
    inside = (ids >= 0) & (ids < a.shape[1])
    return torch.where(inside, a.gather(1, torch.where(inside, ids, 0)), torch.nan)


def largest(a: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (n, V)
    """(values, ids) (n, k) of the k largest entries, largest first."""
    count = a.shape[1] // GROUP
    if count <= k:
        return a.topk(k)
    groups = a[:, : count * GROUP].unflatten(1, (count, GROUP))
    best = groups.amax(-1).topk(k).indices  # (n, k) groups
    picked = groups.gather(1, best[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    values, places = torch.cat([picked, a[:, count * GROUP :]], 1).topk(k)  # and the entries that fill no group
    group, entry = places // GROUP, places % GROUP
    return values, torch.where(group < k, best.gather(1, group.clamp(max=k - 1)), group - k + count) * GROUP + entry
