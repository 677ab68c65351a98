"""From what a caller passes to a call that can run: checked, flat, its rows packed, its plan chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .engine import Call
from .extras import Extras, Taken
from .gemm import accumulation_dtype
from .head import Head
from .pack import Rows, pack, sequence_chunks
from .plan import Plan
from .rows import aligned
from .token_parallel import summed
from .tokens import Tokens, token_local
from .vocab_parallel import Shard, checksum, supported

Tensors = tuple[Tensor, Tensor, Tensor | None]  # x, W and the bias as autograd sees them


@dataclass(frozen=True)
class Arguments:
    """Those of `linear_loss`, by their names there, and two of `linear_cross_entropy`.

    objective     None where only statistics are wanted
    annotations   the tensors given, by name
    class_weight  (V,), or None
    reduction     which token weights it makes, instead of token_weight
    """

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    objective: Any = None
    linear_bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int | None = -100
    vocab_size: int | None = None
    live_tokens: int | None = None
    token_weight: Tensor | None = None
    annotations: dict[str, Tensor] = field(default_factory=dict)
    class_weight: Tensor | None = None
    reduction: str | None = None
    weight_grad: Tensor | None = None
    plan: Plan | None = None
    extras: Extras | None = None
    group: ProcessGroup | None = None
    token_group: ProcessGroup | None = None

    @property
    def tensors(self) -> Tensors:
        return self.input, self.linear_weight, self.linear_bias

    def checked(self) -> tuple[torch.dtype, int, Shard | None, Tensor, Tensor | None]:
        """(type that matrix products run in, entries of the vocabulary, those on this rank if ranks share them, and
        what `target_and_live` says).

        Raises for everything that a caller may get wrong. Of tensors without data, as tracing has them, looks at shapes
        and types alone.
        """
        shard = None
        if self.group is None:
            compute, vocab, target, live = self._checked_alone()
        else:
            checks.group("group", self.group)
            try:
                compute, _, target, live = self._checked_alone()
            except Exception as error:  # the others must not wait for this rank
                given = (self.input, self.target, self.linear_weight)
                like = next((tensor for tensor in given if isinstance(tensor, Tensor)), None)
                if like is not None:
                    Shard.agreed(self.group, like, self.linear_weight, self.vocab_size, dict, error)
                raise
            facts = partial(self._facts, compute, target, live)
            shard = Shard.agreed(self.group, self.input, self.linear_weight, self.vocab_size, facts)
            vocab = shard.vocab
        checks.target_range(target, live, vocab)
        return compute, vocab, shard, target, live

    def _checked_alone(self) -> tuple[torch.dtype, int, Tensor, Tensor | None]:
        """(type of the products, entries of the vocabulary in linear_weight, targets, live ones): all that a rank can
        tell by itself."""
        compute = checks.call(self.input, self.linear_weight, self.target, self.linear_bias)
        checks.head_numbers(self)
        checks.ignore_index(self.ignore_index)
        checks.plan(self.plan)
        if self.group is None:
            vocab = checks.vocabulary(self.linear_weight, self.vocab_size)
        else:
            supported(self.plan, self.input, self.vocab_size)
            vocab = len(self.linear_weight)
        checks.live_tokens(self.live_tokens)
        checks.weight_grad(self.weight_grad, self.linear_weight, compute)
        checks.annotations_needed(self.objective, self.annotations)
        for name, value in self.annotations.items():
            checks.shaped_like_target(name, value, self.target)
        if self.token_weight is not None:
            checks.shaped_like_target("token_weight", self.token_weight, self.target)
        target, live = self.target_and_live()
        checks.temperature(self.temperature, target, live)
        checks.at_most_live(self.live_tokens, target, live)
        checks.extras(self.extras, target, live, vocab, self.group)
        if self.class_weight is not None:
            checks.class_weight(self.class_weight, vocab, self.input)
        if self.token_group is not None:
            checks.group("token_group", self.token_group)
        if self.plan is not None:
            checks.backend(self.plan, self.input, compute)
        return compute, vocab, target, live

    def _facts(self, compute: torch.dtype, target: Tensor, live: Tensor | None) -> dict[str, Any]:
        """What must be the same on all ranks of a group, by the name in messages: else their collectives would not
        match, or they would divide different losses."""
        plan, grad = self.plan, torch.is_grad_enabled()
        wanted = [grad and tensor is not None and tensor.requires_grad for tensor in self.tensors]
        per_token = dict(sorted(self.annotations.items()))
        given = {"token_weight": self.token_weight, "temperature": self.temperature}
        per_token |= {name: value for name, value in given.items() if isinstance(value, Tensor)}
        left_out = [name for name in ("linear_bias", "class_weight", "token_group") if getattr(self, name) is None]
        return {
            "the number of tokens": target.numel(),
            "H": self.linear_weight.shape[1],
            "the type of products": str(compute),
            "vocab_size": self.vocab_size,
            "whether a gradient to input is wanted": int(wanted[0]),
            "whether any gradient is wanted": int(any(wanted)),
            **{f"plan.{name}": plan and getattr(plan, name) for name in ("chunk_rows", "passes", "compact")},
            "plan.batch_invariant": plan and plan.batch_invariant,
            **{name: getattr(self, name) for name in ("softcap", "logit_scale", "ignore_index", "live_tokens")},
            "temperature": None if "temperature" in per_token else self.temperature,
            "objective": self.objective,
            "reduction": self.reduction,
            "what is left out": ", ".join(left_out),
            "what is given of each token": ", ".join(per_token),
            "a checksum of the targets": checksum(target[..., None], None),
            "a checksum of the hidden states": checksum(self.input, live),
            "checksums of what is given of each token": [checksum(v[..., None], live) for v in per_token.values()],
        }

    def target_and_live(self) -> tuple[Tensor, Tensor | None]:
        """(targets as int64, which are not ignored; None: all)."""
        target = self.target.long()  # before comparing: as uint8, −100 is 156
        return target, None if self.ignore_index is None else target != self.ignore_index

    def prepared(self) -> tuple[Tensors, Call, Callable[[Tensor], Tensor]]:
        """((x, W, b) with x flat; the call on packed rows; what gives a packed field (n, ...) target's shape)."""
        compute, vocab, shard, target, live = self.checked()
        here = shard.size if shard else vocab  # entries on this rank
        dtype = accumulation_dtype(compute)
        target = _constant(target)
        columns = {name: _constant(c) for name, c in self.annotations.items()}
        columns = {name: c.to(dtype) if c.is_floating_point() else c for name, c in columns.items()}
        class_weight = None if self.class_weight is None else self.class_weight.detach().to(dtype)
        if class_weight is not None:
            columns["class_weight"] = _of_target(class_weight, target, live, vocab, shard)
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.detach().to(dtype)
            columns["temperature"] = torch.where(temperature > 0, temperature, torch.nan)
            temperature = 1.0  # in its place: see Rows.head
        token_weight = self._token_weight(live, columns.get("class_weight"), dtype)
        # kernels read their columns one number after the other, whatever view the caller passed
        flat = {name: column.reshape(-1).contiguous() for name, column in {"target": target, **columns}.items()}
        tokens, hidden = Tokens(**flat), self.input.shape[-1]
        plan = self.plan
        if plan is None:
            most = len(tokens.target) if self.live_tokens is None else min(self.live_tokens, len(tokens.target))
            plan = Plan.choose(most, hidden, shard.largest if shard else vocab, compute, self.input.device)
        compact = target.device.type == "cpu" if plan.compact is None else plan.compact
        plan = replace(plan, compact=compact, passes=passes(plan, self.objective, tokens))
        rows, unpack = pack(
            tokens,
            None if live is None else live.reshape(-1),
            None if token_weight is None else token_weight.reshape(-1).contiguous(),
            self.objective,
            dtype,
            self.live_tokens,
            plan.compact,
            plan.chunk_rows if plan.batch_invariant else 1,
        )
        plan, chunks = _with_sequences(plan, self.objective, rows, tokens, whole=shard is None)
        bias = None if self.linear_bias is None else aligned(self.linear_bias.detach()[:here], dtype)
        smooth = None
        if getattr(self.objective, "label_smoothing", 0):
            smooth = self.input.new_ones(here, dtype=dtype) if class_weight is None else class_weight[:here]
            smooth = aligned(smooth / vocab, dtype)
            shard = shard and shard.smoothing(smooth)
        softcap = None if self.softcap is None else float(self.softcap)
        call = Call(
            here,
            Head(bias, float(self.logit_scale), softcap, float(temperature), smooth),
            rows,
            self.objective,
            plan,
            compute,
            self.weight_grad,
            None if plan.filter is None else self.input.new_zeros(4, dtype=dtype),
            shard,
            chunks,
            _taken(self.extras, rows),
        )
        return (
            (self.input.reshape(-1, hidden), self.linear_weight, self.linear_bias),
            call,
            lambda field: unpack(field).reshape(target.shape + field.shape[1:]),
        )

    def _token_weight(self, live: Tensor | None, of_class: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Shaped like target; None: 1 / (number of live tokens)."""
        if self.token_weight is not None:
            return _constant(self.token_weight).to(dtype)
        weight = torch.ones_like(self.target, dtype=dtype) if live is None else live.to(dtype)
        if self.reduction in ("none", "sum"):
            return weight
        if of_class is not None and self.reduction == "mean":
            return weight / summed(of_class.sum(), self.token_group)
        return None if self.token_group is None else weight / summed(weight.sum(), self.token_group).clamp(min=1)


def _constant(value: Tensor) -> Tensor:
    """Detached, and fit to be kept for a backward, as what torch.inference_mode made is not."""
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value.detach()


def passes(plan: Plan, objective: Any, given: Collection[str]) -> int | None:
    """1 or 2; None where that depends on where the sequences lie."""
    scope = _scope(objective, given)
    if plan.passes == 1 and scope == "batch":
        raise ValueError(f"Plan(passes=1), but a token's loss depends on other tokens in {objective}: use passes=None")
    return plan.passes or {"token": 1, "sequence": None, "batch": 2}[scope]


def _with_sequences(
    plan: Plan, objective: Any, rows: Rows, tokens: Tokens, whole: bool
) -> tuple[Plan, tuple[slice, ...] | None]:
    """The plan with `passes` decided for losses that depend on a token's sequence, and chunks of whole sequences.

    One pass where every sequence fits a chunk and the host may look: so, on accelerators, with Plan(compact=True).
    """
    if plan.passes == 2 or _scope(objective, tokens) != "sequence":
        return plan, None
    may_cut = whole and plan.compact and not plan.batch_invariant
    chunks = sequence_chunks(rows, plan.chunk_rows) if may_cut else None
    if chunks is None and plan.passes == 1:
        raise ValueError(
            f"Plan(passes=1), but a token's loss depends on its sequence in {objective}, and not every sequence lies "
            f"in one piece of at most chunk_rows={plan.chunk_rows} tokens that the host may look at: use passes=None"
        )
    return replace(plan, passes=1 if chunks is not None else 2), chunks


def _scope(objective: Any, given: Collection[str]) -> str:
    """Over which tokens a token's loss extends: "token", "sequence" (those with its id) or "batch"."""
    scope = getattr(objective, "scope", None)
    return scope(given) if scope else "token" if token_local(objective, given) else "batch"


def _of_target(class_weight: Tensor, target: Tensor, live: Tensor, vocab: int, shard: Shard | None) -> Tensor:
    """The weight of each target's class, 0 where ignored."""
    if shard:
        return shard.of_target(class_weight, target) * live
    # a target out of range makes its own row NaN; here it only must not be read
    return class_weight[torch.where(live & (target >= 0) & (target < vocab), target, 0)] * live


def _taken(extras: Extras | None, rows: Rows) -> Taken | None:
    """Room for the extras of packed rows."""
    if extras is None:
        return None
    candidates = extras.candidates
    if candidates is not None:
        candidates = rows.hidden(candidates.long().reshape(-1, candidates.shape[-1]), slice(None))
    return Taken.empty(extras, candidates, rows.weight)
