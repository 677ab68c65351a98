"""From what a caller passes, `Arguments`, to what runs, a `Call`: checked, flat, its tokens selected, its plan chosen.

The fields of Arguments are the options of a call, and the only list of them: the public functions, the reference, the
operators of compiled calls and the messages all read it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .averages import summed
from .batch import Batch, select, sequence_chunks
from .extras import Extras, ExtrasBuffer, TokenExtras
from .head import Head, HeadProducts, accumulation_dtype, aligned, aligned_size, flat
from .objectives.cross_entropy import CrossEntropy
from .objectives.formula import objective_of
from .objectives.objective import Objective, Tokens, TokenStats, annotation, check_annotations
from .objectives.ratios import exact
from .plan import Plan
from .rows import RowOps
from .shard import Shard, ShardedRows, checksum, supported

LIKE_THE_FIRST = 16  # rows: a chunk that starts at a multiple of so many has annotations aligned as those of the first

Tensors = tuple[Tensor, Tensor, Tensor | None]  # x, W and the bias as autograd sees them


@dataclass(frozen=True, kw_only=True)
class HeadArguments:
    """Hidden states and a head for them, by the names of `linear_loss`."""

    input: Tensor  # (..., H)
    linear_weight: Tensor  # (V, H)
    linear_bias: Tensor | None = None  # (V,)
    temperature: float | Tensor = 1.0  # or (...)
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def tensors(self) -> Tensors:
        return self.input, self.linear_weight, self.linear_bias

    def check_numbers(self, prefix: str = "") -> None:
        checks.positive(f"{prefix}logit_scale", self.logit_scale)
        if self.softcap is not None:
            checks.positive(f"{prefix}softcap", self.softcap)

    def head(self, vocab: int, dtype: torch.dtype, smooth: Tensor | None = None) -> Head:  # (V,)
        """Of the first `vocab` entries; T is 1 where each token has its own, which `Call.head_of` knows."""
        bias = None if self.linear_bias is None else aligned(self.linear_bias.detach()[:vocab], dtype)
        softcap = None if self.softcap is None else float(self.softcap)
        temperature = 1.0 if isinstance(self.temperature, Tensor) else float(self.temperature)
        return Head(bias, float(self.logit_scale), softcap, temperature, smooth)


class Checked(NamedTuple):
    """What checking finds out: the type that matrix products run in, the entries of the whole vocabulary, those on this
    rank if ranks share them, targets as int64 (...), and which are not ignored (...), None: all."""

    compute: torch.dtype
    vocab: int
    shard: Shard | None
    target: Tensor
    live: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Arguments(HeadArguments):
    """Those of `linear_loss`, by their names there, and two of `linear_cross_entropy`.

    objective     None where only statistics are wanted
    annotations   (...) each, by name
    weight        of `linear_cross_entropy`: of each class
    reduction     which token weights it makes, instead of token_weight
    """

    target: Tensor  # (...)
    objective: Objective | None = None
    ignore_index: int | None = -100
    vocab_size: int | None = None
    live_tokens: int | None = None
    token_weight: Tensor | None = None  # (...)
    annotations: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None  # (V,)
    reduction: str | None = None
    weight_grad: Tensor | None = None  # (V, H)
    plan: Plan | None = None
    extras: Extras | None = None
    group: ProcessGroup | None = None
    token_group: ProcessGroup | None = None
    partial_input_grad: bool = False

    @classmethod
    def of(cls, passed: dict[str, Any]) -> Arguments:
        """From what `linear_loss` or `linear_logprobs` was passed, by name: what is no option is an annotation."""
        options = {name: value for name, value in passed.items() if name in OPTIONS}
        if "objective" in options:
            options["objective"] = objective_of(options["objective"])
        others = {name: value for name, value in passed.items() if name not in OPTIONS and value is not None}
        return cls(**options, annotations=others)

    @classmethod
    def of_cross_entropy(cls, passed: dict[str, Any]) -> Arguments:
        """From what `linear_cross_entropy` was passed, by name."""
        checks.reduction(passed["reduction"])
        if passed["options"] is not None and passed["plan"] is not None:
            raise ValueError("options and plan were both given: options is ignored, so drop it")
        if passed["ignore_index"] is None:
            passed = {**passed, "ignore_index": -100}  # as PyTorch does
        return cls(
            **{name: value for name, value in passed.items() if name in OPTIONS},
            objective=CrossEntropy(label_smoothing=passed["label_smoothing"], z_loss=passed["z_loss"]),
            weight=passed["weight"],
            reduction=passed["reduction"],
        )

    def checked(self) -> Checked:
        """Raises for everything that a caller may get wrong. Of tensors without data, as tracing has them, looks at
        shapes and types alone."""
        if self.group is None:
            checked = self._checked_alone()
        else:
            checks.group("group", self.group)
            try:
                checked = self._checked_alone()
            except Exception as error:  # the others must not wait for this rank
                passed = (self.input, self.target, self.linear_weight)
                like = next((tensor for tensor in passed if isinstance(tensor, Tensor)), None)
                if like is not None:
                    Shard.agreed(self.group, like, self.linear_weight, self.vocab_size, dict, error)
                raise
            facts = partial(self._facts, checked)
            shard = Shard.agreed(self.group, self.input, self.linear_weight, self.vocab_size, facts)
            shard = replace(shard, partial=self.partial_input_grad)
            checked = checked._replace(vocab=shard.vocab, shard=shard)
        checks.target_range(checked.target, checked.live, checked.vocab)
        return checked

    def _checked_alone(self) -> Checked:
        """All that a rank can tell by itself: `vocab` counts the entries in linear_weight."""
        compute = checks.head(*self.tensors)
        checks.targets(self.target, self.input, self.linear_weight)
        self.check_numbers()
        checks.ignore_index(self.ignore_index)
        if self.plan is not None:
            checks.instance("plan", self.plan, Plan, "see Plan.choose")
        checks.flag("partial_input_grad", self.partial_input_grad)
        if self.partial_input_grad and self.group is None:
            raise ValueError(
                "partial_input_grad=True, but without group= the gradient to input is whole: pass group=, or drop it"
            )
        if self.group is None:
            vocab = checks.vocabulary(self.linear_weight, self.vocab_size)
        else:
            supported(self.plan, self.input, self.vocab_size, self.partial_input_grad)
            vocab = len(self.linear_weight)
        checks.live_tokens(self.live_tokens)
        checks.weight_grad(self.weight_grad, self.linear_weight, compute)
        if self.objective is not None:
            check_annotations(self.objective, self.annotations, OPTIONS)
        for name, value in self.annotations.items():
            checks.shaped_like(name, value, self.target)
        if self.token_weight is not None:
            checks.shaped_like("token_weight", self.token_weight, self.target)
        target, live = self.target_and_live()
        checks.temperature(self.temperature, target, live)
        checks.at_most_live(self.live_tokens, target, live)
        self._check_extras(target, live, vocab)
        if self.weight is not None:
            checks.class_weight(self.weight, vocab, self.input)
        if self.token_group is not None:
            checks.group("token_group", self.token_group)
        if self.plan is not None:
            self.plan.check(self.input, compute)
        return Checked(compute, vocab, None, target, live)

    def _check_extras(self, target: Tensor, live: Tensor | None, vocab: int) -> None:  # (...), (...)
        if (extras := self.extras) is None:
            return
        checks.instance("extras", extras, Extras, "extras=Extras(rank=True, top_k=8), say")
        if self.group is not None:
            raise ValueError(
                "extras= with group= is not supported: a rank has no logits but its own; drop one of the two"
            )
        extras.check(target, live, vocab)

    def _facts(self, checked: Checked) -> dict[str, Any]:
        """What must be the same on all ranks of a group, by the name in messages: else their collectives would not
        match, or they would divide different losses."""
        plan, grad = self.plan, torch.is_grad_enabled()
        needs_grad = [grad and tensor is not None and tensor.requires_grad for tensor in self.tensors]
        per_token = dict(sorted(self.annotations.items()))
        per_token |= {name: value for name in PER_TOKEN if isinstance(value := getattr(self, name), Tensor)}
        optional = {"linear_bias": self.linear_bias, "class_weight": self.weight, "token_group": self.token_group}
        return {
            "the number of tokens": checked.target.numel(),
            "H": self.linear_weight.shape[1],
            "the type of products": str(checked.compute),
            "whether a gradient to input is wanted": int(needs_grad[0]),
            "whether any gradient is wanted": int(any(needs_grad)),
            **{f"plan.{f.name}": plan and getattr(plan, f.name) for f in fields(Plan) if f.name in PLAN_FACTS},
            **{name: None if name in per_token else getattr(self, name) for name in NUMBERS},
            "partial_input_grad": self.partial_input_grad,
            "objective": self.objective,
            "what is left out": ", ".join(name for name, value in optional.items() if value is None),
            "what is given of each token": ", ".join(per_token),
            "a checksum of the targets": checksum(checked.target[..., None], None),
            "a checksum of the hidden states": checksum(self.input, checked.live),
            "checksums of what is given of each token": [
                checksum(value[..., None], checked.live) for value in per_token.values()
            ],
        }

    def target_and_live(self) -> tuple[Tensor, Tensor | None]:
        """(targets as int64, which are not ignored; None: all)."""
        target = self.target.long()  # before comparing: as uint8, −100 is 156
        return target, None if self.ignore_index is None else target != self.ignore_index

    def prepared(self) -> tuple[Tensors, Call]:
        """((x, W, b) with x flat (N, H); the call)."""
        compute, vocab, shard, target, live = checked = self.checked()
        dtype = accumulation_dtype(compute)
        objective = Objective() if self.objective is None else self.objective
        tokens = self._tokens(checked, dtype)
        weight = self._token_weight(live, tokens.get("class_weight"), dtype)
        plan = self._plan(checked, objective, tokens)
        live = None if live is None else flat(live)
        weight = None if weight is None else flat(weight)
        batch = select(
            tokens, live, weight, objective, dtype, shape=target.shape, compact=plan.compact,
            live_tokens=self.live_tokens, multiple=plan.chunk_rows if plan.batch_invariant else 1,
            by_triton=plan.backend == "triton",
        )  # fmt: skip
        plan, chunks = _with_sequences(plan, objective, batch, tokens, whole=shard is None)
        here = shard.size if shard else vocab  # entries on this rank
        smooth = None
        if objective.label_smoothing:
            omega = self.input.new_ones(here) if self.weight is None else self.weight.detach()[:here]
            smooth = aligned(omega.to(dtype) / vocab, dtype)
            shard = shard and shard.smoothing(smooth)
        filtered = None if plan.filter is None else self.input.new_zeros(4, dtype=dtype)
        call = Call(
            here, self.head(here, dtype, smooth), batch, objective, plan, compute, self.weight_grad, filtered, shard,
            chunks, _extras_buffer(self.extras, batch),
        )  # fmt: skip
        input = self.input if self.input.dim() == 2 else self.input.reshape(-1, self.input.shape[-1])
        return (input, self.linear_weight, self.linear_bias), call

    def _tokens(self, checked: Checked, dtype: torch.dtype) -> Tokens:
        """The annotations of the N tokens, flat, and what else belongs to each."""
        _, vocab, shard, target, live = checked
        columns = {name: annotation(name, _constant(column), dtype) for name, column in self.annotations.items()}
        if self.weight is not None:
            columns["class_weight"] = _of_target(self.weight.detach().to(dtype), target, live, vocab, shard)
        if isinstance(self.temperature, Tensor):
            temperature = self.temperature.detach().to(dtype)
            columns["temperature"] = torch.where(temperature > 0, temperature, torch.nan)
        columns["target"] = _constant(target)
        # kernels read their columns one number after the other, whatever view the caller passed
        return Tokens(**{name: flat(column) for name, column in columns.items()})

    def _plan(self, checked: Checked, objective: Objective, tokens: Tokens) -> Plan:
        plan, total = self.plan, tokens.target.numel()
        if plan is None:
            most = total if self.live_tokens is None else min(self.live_tokens, total)
            vocab = checked.shard.largest if checked.shard else checked.vocab
            hidden, head_gradient = self.input.shape[-1], self.linear_weight.requires_grad
            plan = Plan.choose(
                most, hidden, vocab, checked.compute, self.input.device, head_gradient=head_gradient
            )  # fmt: skip
        compact = checked.target.device.type == "cpu" if plan.compact is None else plan.compact
        return replace(plan, compact=compact, passes=passes(plan, objective, tokens))

    def _token_weight(self, live: Tensor | None, of_class: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Shaped like target; None: 1 / (number of live tokens)."""
        if self.token_weight is not None:
            return _constant(self.token_weight).to(dtype)
        by_class = self.reduction == "mean" and of_class is not None
        if self.reduction not in ("none", "sum") and not by_class and self.token_group is None:
            return None
        live = torch.ones_like(self.target, dtype=torch.bool) if live is None else live
        weight = live.to(dtype)
        if self.reduction in ("none", "sum"):
            return weight
        if by_class:
            return weight / summed(of_class.sum(dtype=exact(of_class.device)), self.token_group)
        return weight / summed(live.sum(), self.token_group).clamp(min=1)


# Those of `linear_loss`, which takes any other name for an annotation's.
OPTIONS = dict.fromkeys(o.name for o in fields(Arguments) if o.name not in ("annotations", "weight", "reduction"))
PER_TOKEN = ("token_weight", "temperature")  # of the options, those that may be shaped like target
NUMBERS = tuple(o.name for o in fields(Arguments) if {"int", "float", "str"} & set(o.type.split(" | ")))
PLAN_FACTS = ("chunk_rows", "gradient_rows", "passes", "compact", "batch_invariant")


@dataclass(frozen=True)
class Call:
    """A checked call of the loss head: everything but x (N, H), W (V or more rows, H) and b, which autograd passes."""

    vocab: int  # V, or the entries on this rank
    head: Head
    batch: Batch
    objective: Objective
    plan: Plan
    compute: torch.dtype
    weight_grad: Tensor | None = None  # (V, H) that ∂loss/∂W is added to instead of returned
    filtered: Tensor | None = None  # (4,) the sum of Filtered.squares so far, with a plan that filters
    shard: Shard | None = None  # which part of the vocabulary W is, where ranks share it
    chunks: tuple[slice, ...] | None = None  # of whole sequences, where a token's loss depends on its own
    extras: ExtrasBuffer | None = None  # to be filled by the row operations, where extras are asked for

    @property
    def row_ops(self) -> RowOps:
        ops = self.plan.row_ops
        return ops if self.shard is None else ShardedRows(ops, self.shard)

    def head_of(self, chunk: slice) -> Head:
        """The head of some of the rows: with their temperatures, where each token has its own."""
        temperature = self.batch.tokens.get("temperature")
        return self.head if temperature is None else replace(self.head, temperature=temperature[chunk])

    def token_extras(self, stats: TokenStats) -> TokenExtras | None:
        """Of the batch's rows, once the row operations have filled them; None where none are asked for."""
        return self.extras and self.extras.finished(stats.logprobs, stats.logsumexp)

    def groups(self) -> Iterator[tuple[slice, list[slice]]]:
        """Of the rows that may have a gradient, those whose dx and dW are multiplied at once, and their chunks."""
        plan, active = self.plan, self.batch.active
        if self.chunks is None:
            for rows in plan.groups(active):
                chunks = plan.chunks(rows.stop - rows.start)
                yield rows, [slice(rows.start + chunk.start, rows.start + chunk.stop) for chunk in chunks]
            return
        group: list[slice] = []
        for chunk in self.chunks:
            if chunk.start >= active:
                break
            if group and chunk.stop - group[0].start > (plan.gradient_rows or plan.chunk_rows):
                yield slice(group[0].start, group[-1].stop), group
                group = []
            group = [*group, chunk]
        if group:
            yield slice(group[0].start, group[-1].stop), group

    def other_chunks(self, start: int) -> Iterator[tuple[slice, int]]:
        """Of the rows from `start` on, which no group has: (a chunk, how many of its rows come before `start`)."""
        if self.chunks is not None:
            yield from ((chunk, 0) for chunk in self.chunks if chunk.start >= start)
            return
        # no other kernels than for the chunks before: their annotations are aligned as those of the first
        before = start % LIKE_THE_FIRST if self.plan.backend == "triton" else 0
        if (rest := len(self.batch) - start) > 0:
            for rows in self.plan.chunks(rest + before):
                yield slice(rows.start + start - before, rows.stop + start - before), max(before - rows.start, 0)

    def logits_buffer(self, products: HeadProducts) -> Tensor:
        """Room for one chunk's logits (chunk_rows, V), its rows at aligned addresses."""
        rows = min(self.plan.chunk_rows, max(len(self.batch), 1))
        stride = aligned_size(self.vocab)
        room = products.weight.new_empty(rows, stride, dtype=products.dtype)
        return room if stride == self.vocab else room[:, : self.vocab]


def passes(plan: Plan, objective: Objective, names: Collection[str]) -> int | None:
    """1 or 2; None where that depends on where the sequences lie."""
    scope = objective.scope(names)
    if plan.passes == 1 and scope == "batch":
        raise ValueError(f"Plan(passes=1), but a token's loss depends on other tokens in {objective}: use passes=None")
    return plan.passes or {"token": 1, "sequence": None, "batch": 2}[scope]


def _with_sequences(
    plan: Plan, objective: Objective, batch: Batch, tokens: Tokens, whole: bool
) -> tuple[Plan, tuple[slice, ...] | None]:
    """The plan with `passes` decided for losses that depend on a token's sequence, and chunks of whole sequences.

    One pass where every sequence fits a chunk and the host may look: on accelerators, with Plan(compact=True).
    """
    if plan.passes == 2 or objective.scope(tokens) != "sequence":
        return plan, None
    may_cut = whole and plan.compact and not plan.batch_invariant
    chunks = sequence_chunks(batch, plan.chunk_rows) if may_cut else None
    if chunks is None and plan.passes == 1:
        raise ValueError(
            f"Plan(passes=1), but a token's loss depends on its sequence in {objective}, and not every sequence lies "
            f"in one piece of at most chunk_rows={plan.chunk_rows} tokens that the host may look at: use passes=None"
        )
    return replace(plan, passes=1 if chunks is not None else 2), chunks


def _constant(value: Tensor) -> Tensor:  # any shape
    """Detached, and fit to be kept for a backward, as what torch.inference_mode made is not."""
    if value.is_inference() and not torch.is_inference_mode_enabled():
        return value.clone()
    return value.detach() if value.requires_grad else value


def _of_target(class_weight: Tensor, target: Tensor, live: Tensor, vocab: int, shard: Shard | None) -> Tensor:
    """(V,), (...), (...) → the weight (...) of each target's class, 0 where ignored."""
    if shard:
        return shard.of_target(class_weight, target) * live
    # a target out of range makes its own row NaN; here it only must not be read
    return class_weight[torch.where(live & (target >= 0) & (target < vocab), target, 0)] * live


def _extras_buffer(extras: Extras | None, batch: Batch) -> ExtrasBuffer | None:
    """Room for the extras of the batch's rows."""
    if extras is None:
        return None
    candidates = extras.candidates
    if candidates is not None:
        candidates = batch.hidden(candidates.long().reshape(-1, candidates.shape[-1]), slice(None))
    return ExtrasBuffer(TokenExtras.empty(extras, batch.weight), candidates)
