"""The public functions: their signatures and what they promise.

linear_loss           any objective; one pass where a token's loss is its own business
linear_logprobs       token statistics, differentiable
linear_cross_entropy  drop-in for torch.nn.functional.linear_cross_entropy
linear_distillation   divergence from a teacher's head

A body here is empty: what is passed goes by name into the arguments that the decorator names, and these to an engine.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import engine, words
from .call import Arguments
from .distillation import engine as distillation
from .distillation.engine import DistillationArguments, DistillationOutput
from .extras import Extras
from .objectives.objective import TokenStats
from .output import LossOutput
from .plan import Plan

REQUIRED = "input", "linear_weight", "target"
P, Output, Passed = ParamSpec("P"), TypeVar("Output"), TypeVar("Passed")


def _runs(
    run: Callable[[Passed], Output], arguments: Callable[[dict[str, Any]], Passed]
) -> Callable[[Callable[P, Output]], Callable[P, Output]]:
    """Makes a public function of its signature: it runs `run` on the `arguments` made of what it is passed, by name."""

    def of_signature(signature: Callable[P, Output]) -> Callable[P, Output]:
        positional, defaults = tuple(inspect.getfullargspec(signature).args), signature.__kwdefaults__
        known = set(inspect.signature(signature).parameters)

        @functools.wraps(signature)
        def function(*args: P.args, **options: P.kwargs) -> Output:
            try:
                signature(*args, **options)
            except TypeError as error:  # Python's own, of what does not fit
                passed = list(options)
                if "annotations" in known:  # which may have any name, but for those of what is missing
                    passed = [name for name in passed if words.meant(name, REQUIRED)]
                raise words.explained(f"{signature.__name__}()", error, passed, known) from None
            by_name = arguments({**defaults, **dict(zip(positional, args)), **options})
            if torch.compiler.is_compiling():
                from .operators import trace  # takes seconds, and nobody else needs it

                return getattr(trace, run.__name__)(by_name)
            return run(by_name)

        return function

    return of_signature


@_runs(engine.linear_loss, Arguments.of)
def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    objective: Any,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    vocab_size: int | None = None,
    live_tokens: int | None = None,
    token_weight: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    is_demo: Tensor | None = None,
    weight_grad: Tensor | None = None,
    plan: Plan | None = None,
    extras: Extras | None = None,
    group: ProcessGroup | None = None,
    token_group: ProcessGroup | None = None,
    partial_input_grad: bool = False,
    **annotations: Tensor | None,
) -> LossOutput:
    """Σ_t token_weight_t · objective_t of the distributions softmax(input · linear_weightᵀ), without their logits.

    Args:
        input: hidden states (..., H); fp32, bf16, fp16, or fp64 (PyTorch rows only). Never modified.
        linear_weight: head (V, H), of the same type unless autocast is on.
        target: token ids (...), integers in [0, vocab_size) or `ignore_index`.
        objective: `CrossEntropy`, `PolicyGradient`, `SRFT`, a preset, or any callable (stats, tokens) -> losses (n,).
            A callable is shown a slice of the tokens at a time; give it an attribute `token_local = False` if a token's
            loss depends on other tokens.
        linear_bias: (V,), or None; −inf bans a token (not under a soft cap, which comes after it).
        temperature: T > 0 of softmax(z / T), or a tensor of them shaped like target, not differentiated to. On CUDA a
            token's T that is not positive yields NaN in its outputs.
        softcap: cap > 0 of cap · tanh(z / cap), before the temperature; or None.
        logit_scale: s > 0, times the logits before the cap: Cohere's `logit_scale`, 1 / Granite's `logits_scaling`.
        ignore_index: targets with this value take no part and cost nothing; None: there are none.
        vocab_size: the true vocabulary where the head has padding rows: those past it do not exist.
        live_tokens: no more tokens than this are live, as the host knows from making the batch. On a GPU ignored tokens
            beyond this number cost nothing; without it each costs as much as a live one, since counting them would
            stall the stream (`Plan(compact=True)` counts). On a CPU they never cost anything.
        token_weight: (...), default 1 / (number of live tokens). See `token_mean`, `sequence_mean`, `constant_length`.
        advantages, old_logprobs, ref_logprobs, is_demo, **annotations: what the objective reads, shaped like target.
            The loss is not differentiated to them, nor to anything else that the objective holds.
        weight_grad: fp32 (V, H), a master gradient that ∂loss/∂linear_weight is added to, in place and unrounded;
            `linear_weight.grad` then gets nothing. In one pass that happens in the call itself, so the loss must reach
            backward as it is, with every factor (accumulation steps, loss scale) in token_weight. Under
            saved-tensor hooks, such as those of torch.utils.checkpoint(use_reentrant=False), which runs its forward
            twice, the call takes two passes.
        plan: how to run; default `Plan.choose(...)`.
        extras: an `Extras`: ranks, arg-max (with "accuracy" among the metrics), top-k and candidates to tell besides.
        group: ranks that the head is divided over, each with its own consecutive rows of linear_weight (and of
            linear_bias) in the order of the ranks. All of them pass the same hidden states, targets and options;
            vocab_size then counts the whole vocabulary. Each gets the same loss, the whole gradient to input, and that
            to its rows.
        token_group: ranks that the tokens of the batch are divided over: the default token_weight then counts the live
            tokens of all of them, and losses and gradients have to be summed over these ranks, not averaged.
        partial_input_grad: True with `group`: each rank's gradient to input is the part that comes from its rows of the
            head, for callers that add the parts up themselves, such as Megatron's sequence parallelism, whose
            reduce-scatter does that, and verl's trainers. One collective less here.

    Returns:
        LossOutput. With no live token the loss is exactly 0, and so are its gradients.

    Raises:
        ValueError, TypeError: naming the argument, what was found and what was expected, before any work. On CUDA an
        out-of-range target yields NaN in that token's outputs instead, and more live tokens than `live_tokens` NaN
        everywhere; SRFT_KERNELS_CHECK=1 raises there too.
    """


@_runs(engine.linear_logprobs, Arguments.of)
def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    vocab_size: int | None = None,
    live_tokens: int | None = None,
    plan: Plan | None = None,
    extras: Extras | None = None,
    group: ProcessGroup | None = None,
    partial_input_grad: bool = False,
) -> TokenStats:
    """Log-probability of each target, entropy (nats) and logsumexp of its distribution, without the logits.

    Arguments as in `linear_loss`. Returns TokenStats with fields shaped like target, fp32 (fp64 for fp64 inputs), 0 at
    ignored tokens, differentiable through every field: the logits are recomputed in the backward (8NHV in all). Under
    `torch.no_grad()` this is the scoring pass (2NHV) for old and reference log-probs. `extras` comes as the field
    `extras` of the result, detached: for a derivative to another token's log-prob, call with that token as target.
    """


@_runs(engine.linear_cross_entropy, Arguments.of_cross_entropy)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    live_tokens: int | None = None,
    plan: Plan | None = None,
    group: ProcessGroup | None = None,
    token_group: ProcessGroup | None = None,
    partial_input_grad: bool = False,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without the logits; arguments as in PyTorch.

    Args beyond `linear_loss`'s:
        weight: (V,) weight of each class, or None; divided like linear_weight's rows where a `group` shares them.
        reduction: "mean" (over live tokens, by class weight where given), "sum", or "none": losses shaped like target.
        label_smoothing: ε in [0, 1].
        options: PyTorch's chunking options, accepted and ignored: this function always works in chunks (see `plan`).
        z_loss: c: adds c · lse² to each token's loss.

    Returns the loss in fp32 (fp64 for fp64 inputs). Unlike PyTorch, the mean over no live token is 0, not NaN.
    """


@_runs(distillation.linear_distillation, DistillationArguments.of)
def linear_distillation(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    plan: Plan | None = None,
    group: None = None,
) -> DistillationOutput:
    """Σ_t token_weight_t · D(p_t, q_t) of a student p = softmax(input · linear_weightᵀ) and a teacher q, logits unmade.

    Args:
        input: the student's hidden states (..., H); fp32, bf16, fp16, or fp64 (PyTorch rows only). Never modified.
        linear_weight: its head (V, H).
        teacher_input: the teacher's hidden states (..., H_teacher) of the same tokens; any H_teacher, any type above
            (fp64 with fp64 alone). Nothing of the teacher gets a gradient.
        teacher_weight: its head (V, H_teacher).
        divergence: "forward_kl", KL(q ‖ p) = Σ_v q_v log(q_v / p_v): the student covers what the teacher does;
            "reverse_kl", KL(p ‖ q), for data the student sampled; or "jensen_shannon", the generalised one of
            arXiv 2306.13649: β KL(q ‖ m) + (1 − β) KL(p ‖ m) with m = β q + (1 − β) p.
        beta: β of "jensen_shannon", 0 < β < 1. Towards either end that divergence goes to 0, as β KL(q ‖ p) and as
            (1 − β) KL(p ‖ q): where other libraries take beta=0 or beta=1, ask for "forward_kl" or "reverse_kl".
        linear_bias, teacher_bias: (V,), or None.
        temperature: T > 0 of softmax(z / T), for both heads. The loss is not multiplied by T², as some papers do to
            keep the size of its gradient: that is a factor for `token_weight`, or for the loss.
        teacher_temperature: another one for the teacher.
        softcap, teacher_softcap: cap > 0 of cap · tanh(z / cap) in each head, before the temperature; or None.
        logit_scale, teacher_logit_scale: s > 0, times each head's logits before the cap; neither stands for the other.
        vocab_size: the vocabulary that both heads share, where one has padding rows: those past it do not exist.
        mask: (...) boolean, False where a token takes no part (target != -100, say); None: all do.
        token_weight: (...), default 1 / (number of tokens that take part). See `token_mean`, `sequence_mean`, which
            count tokens that are divided over ranks too.
        plan: how to run; default as `Plan.choose`, with chunks of half as many tokens since each has two rows.
        group: refused: a head divided over ranks, as `linear_loss` takes it, is not supported here.

    Returns:
        DistillationOutput. With no token the loss is exactly 0, and so are its gradients. Tokens' divergences come
        without a gradient, and there is no reduction="none": what each of them counts is its token_weight.

    Where p has what the reference of a KL has not (KL(q ‖ p) with p_v = 0 < q_v, KL(p ‖ q) with q_v = 0 < p_v) it is
    +∞; that of KL(q ‖ p) still has its gradient p − q, that of KL(p ‖ q) has none (NaN).

    Raises:
        ValueError, TypeError: naming the argument, what was found and what was expected, before any work.
    """
