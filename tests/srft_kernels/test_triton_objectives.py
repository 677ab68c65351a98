"""The objectives' device code against the PyTorch formulas, differentiated by autograd: every option with every other.

A kernel that has the tokens' statistics in place of their rows, so that extremes need no logits to be found for them:
certain tokens (ℓ = 0), banned ones (ℓ = −inf), ratios that overflow, advantages of 0.
"""

import json
import random
from dataclasses import fields, replace
from itertools import islice, product

import pytest
import torch

import srft_kernels as sk
from srft_kernels.objectives.formula import objective_of
from srft_kernels.objectives.objective import differentiate

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from srft_kernels.rows import triton_objectives  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities


@triton.jit
def _token_losses(
    stats_ptr, out_ptr, columns, numbers, FORMULA: tl.constexpr, OBJECTIVE: tl.constexpr, n: tl.constexpr
):
    row = tl.arange(0, n)
    logprob = tl.load(stats_ptr + row)
    entropy = tl.load(stats_ptr + n + row)
    logsumexp = tl.load(stats_ptr + 2 * n + row)
    smooth = tl.load(stats_ptr + 3 * n + row)
    loss, g, h, k, u = triton_objectives.token_loss(
        FORMULA, OBJECTIVE, numbers, columns, row, logprob, entropy, logsumexp, smooth
    )
    tl.store(out_ptr + row, loss)
    tl.store(out_ptr + n + row, g)
    tl.store(out_ptr + 2 * n + row, h)
    tl.store(out_ptr + 3 * n + row, k)
    tl.store(out_ptr + 4 * n + row, u)


def on_device(objective, stats: sk.TokenStats, tokens: sk.Tokens) -> torch.Tensor:
    """(5, n): loss, g, h, k, u."""
    code = triton_objectives.twin(objective, tokens)
    packed, out = torch.stack(stats.fields()), torch.empty(5, len(stats.logprobs))
    columns = triton_objectives.columns(objective, tokens)
    _token_losses[(1,)](packed, out, columns, code.numbers, code.formula, code.structure, len(stats.logprobs))
    return out


def in_pytorch(objective, stats: sk.TokenStats, tokens: sk.Tokens) -> torch.Tensor:
    stats, tokens = stats.map(torch.Tensor.double), widened(tokens)
    loss, coefs = differentiate(objective, stats, tokens, torch.ones_like(stats.logprobs))
    return torch.stack([loss, *(torch.zeros_like(loss) if c is None else c for c in coefs)])


def widened(tokens: sk.Tokens) -> sk.Tokens:
    columns = {name: tokens.get(name) for name in (*triton_objectives.column_names(sk.sft()), "target")}
    return sk.Tokens(**{k: c.double() if c is not None and c.is_floating_point() else c for k, c in columns.items()})


ORDINARY, ADVERSARIAL = 8, 8


def batch(seed: int, given: set[str]) -> tuple[sk.TokenStats, sk.Tokens]:
    """Tokens of which the last ADVERSARIAL meet every extreme with every sign of the advantage."""
    generator = torch.Generator().manual_seed(seed)
    n = ORDINARY + ADVERSARIAL
    uniform = lambda low, high: low + (high - low) * torch.rand(n, generator=generator)  # noqa: E731
    logprobs, entropy = uniform(-3, -0.1), uniform(0, 3)
    logprobs[ORDINARY:] = torch.tensor([0.0, -torch.inf, -100.0, -1.0, -2.0, -1.0, -torch.inf, -3.0])
    entropy[ORDINARY] = 0
    columns = {
        "advantages": torch.randint(-2, 3, (n,), generator=generator).float() / 2,
        "rewards": torch.randint(2, (n,), generator=generator).float(),
        "is_demo": torch.rand(n, generator=generator) < 0.4,
        "weight_entropy": uniform(0, 2),
        "class_weight": uniform(0, 2),
    }
    # what raises a banned demonstration and what lowers it are both infinite: no loss is right
    banned = columns["is_demo"] & logprobs.isinf()
    columns["advantages"] = torch.where(banned, columns["advantages"].abs(), columns["advantages"])
    for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs", "demo_logprobs"):
        columns[name] = torch.where(logprobs.isinf(), -5.0, logprobs) + uniform(-0.8, 0.8)
    columns["old_logprobs"][-5:-2] = torch.tensor([-200.0, -torch.inf, -1e9])  # ratios that overflow
    columns["ref_logprobs"][-5:-1] = torch.tensor([-torch.inf, 0.0, -300.0, -1.0])
    columns["sampler_logprobs"][-5:] = torch.tensor([-1.0, -500.0, -2.0, -torch.inf, -0.1])
    columns["demo_logprobs"][-3:] = torch.tensor([-torch.inf, -400.0, -9.0])
    stats = sk.TokenStats(logprobs, entropy, uniform(-5, 5), uniform(-9, -5))
    return stats, sk.Tokens(torch.zeros(n, dtype=torch.long), **{name: columns[name] for name in sorted(given)})


CORRECTIONS = [
    None,
    sk.Correction(),
    sk.Correction("truncate", low=0.5, high=1.2),
    sk.Correction("mask", low=0.6, high=1.5),
    sk.Correction("reject", low=0.7, high=1.4),
    sk.Correction("mask", high=1.3, current=True),
]
TERMS = {
    "entropy_coef": (0.0, 0.1),
    "kl_coef": (0.0, 0.3),
    "kl_estimator": ("k1", "k2", "k3"),
    "correction": CORRECTIONS,
    "max_probability": (None, 0.3),
}
SHAPES = ("p/(p+c)", "p^c", "c*log p", "p+c*log p")
RATIOS = {"surrogate": ("reinforce", "ppo", "cispo", "sapo"), "dual_clip": (None, 1.1),
          "clip_low": (0.2, None, 0.0), "clip_high": (0.28, None, 0.1),
          "ratio_shape": SHAPES, "ratio_shaping": (None, 0.1, 0.7),
          "tau_positive": (1.0, 3.0), "tau_negative": (1.05, 0.5)}  # fmt: skip
FAMILIES = {
    sk.CrossEntropy: {"label_smoothing": (0.0, 0.1), "z_loss": (0.0, 0.01), "probability_weighted": (False, True)},
    sk.PolicyGradient: RATIOS,
    sk.SRFT: {**RATIOS, "entropy_sign": (-1, 1), "demo_sft_coef": (0.5, 0.0), "demo_rl_coef": (1.0, 0.0),
              "demo_weight": ("entropy", "constant", "p", "p(1-p)"),
              "demo_shape": SHAPES, "demo_shaping": (None, 0.1, 0.5), "demo_min": (None, -0.4, 0.1),
              "demo_max": (None, 0.2, 0.6), "rollout_coef": (0.1, 1.0, 0.0), "negative_coef": (1.0, 0.0),
              "rollout_weight": ("entropy", "constant"), "rollout_signal": ("sign", "advantage"),
              "positive": ("advantage", "reward")},
}  # fmt: skip


def pairs(family) -> list:
    """Objectives in which every value of every option meets every value of every other (greedily chosen)."""
    options = {**FAMILIES[family], **TERMS}
    rng, chosen = random.Random(0), []
    wanted = {((a, x), (b, y)) for a, b in product(options, options) if a < b for x in options[a] for y in options[b]}

    def possible(choice) -> bool:
        try:
            family(**choice)
        except ValueError:
            return False
        return True

    def met(choice) -> set:
        return {p for p in wanted if all(choice[name] == value for name, value in p)}

    while wanted:
        pair = rng.choice(sorted(wanted, key=repr))
        tries = ({name: rng.choice(values) for name, values in options.items()} | dict(pair) for _ in range(1000))
        candidates = list(islice(filter(possible, tries), 20))
        if not candidates:  # a pair that no objective can have
            wanted.discard(pair)
            continue
        best = max(candidates, key=lambda c: len(met(c)))
        wanted -= met(best)
        chosen.append(family(**best))
    return chosen


ALWAYS = {"advantages", "is_demo", "rewards", "ref_logprobs", "sampler_logprobs"}
OPTIONAL = [set(), {"old_logprobs"}, {"old_logprobs", "demo_logprobs", "weight_entropy", "class_weight"}]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_device_formulas_are_the_pytorch_formulas(family):
    objectives = pairs(family)
    assert len(objectives) > 5
    for seed, objective in enumerate(objectives):
        stats, tokens = batch(seed, ALWAYS | OPTIONAL[seed % 3])
        ours, theirs = on_device(objective, stats, tokens), in_pytorch(objective, stats, tokens)
        for name, own, other in zip(("loss", "g", "h", "k", "u"), ours.double(), theirs):
            note = f"{name} of {objective} with {OPTIONAL[seed % 3]}:\n{own}\n{other}"
            torch.testing.assert_close(own, other, rtol=3e-5, atol=1e-6, msg=note)
            assert not own.isnan().any(), note
            assert name == "loss" or own.isfinite().all(), note


def test_every_option_takes_part():
    """No option is left out of the above."""
    for family, options in FAMILIES.items():
        own = {field.name for field in fields(family)} - {"level", "ratio_level"}
        assert own == {*options, *TERMS}
    assert {field.name for field in fields(sk.Correction)} - {"level"} == {"outside", "low", "high", "current"}


def test_what_depends_on_other_tokens_has_no_device_code():
    given = {"advantages", "is_demo", "old_logprobs", "sequence_ids", "sampler_logprobs"}
    others = [
        sk.gspo(),
        sk.SRFT(level="sequence"),
        sk.SRFT(level="batch"),
        sk.grpo(correction=sk.Correction(level="sequence")),
        objective_of(lambda stats, tokens: -stats.logprobs),
    ]
    for objective in others:
        assert triton_objectives.twin(objective, given) is None
    assert triton_objectives.twin(sk.SRFT(level="sequence"), given | {"weight_entropy"})
    assert triton_objectives.twin(sk.gspo(), given - {"old_logprobs"})


def test_numbers_do_not_compile_new_kernels_and_presence_does():
    """A schedule of a coefficient compiles once; an option not asked for is not in the code."""
    structure = lambda **options: triton_objectives.twin(sk.grpo(**options)).structure  # noqa: E731
    assert structure(kl_coef=0.1) == structure(kl_coef=0.2) != structure()
    assert structure(correction=sk.Correction(high=2.0)) == structure(correction=sk.Correction(high=3.0)) != structure()
    assert structure(clip_high=0.28) == structure(clip_high=0.3) != structure(clip_high=None)


PRESETS = [name for name in vars(sk.presets) if callable(getattr(sk, name, None)) and name.islower()]


@pytest.mark.parametrize("preset", PRESETS)
def test_compile_time_arguments_are_plain(preset):
    """Triton's cache hooks write them as JSON, its cache key as text: equal text only where the structure is equal."""
    objective = getattr(sk, preset)()
    _, structure, numbers = triton_objectives.twin(objective, {"weight_entropy"})
    assert json.loads(json.dumps(structure)) == list(structure)
    assert all(value in (None, True, False, -1) or isinstance(value, str) for value in structure)
    assert structure == triton_objectives.twin(replace(objective), {"weight_entropy"}).structure
    _, other, _ = triton_objectives.twin(replace(objective, kl_coef=0.5), {"weight_entropy"})
    assert repr(structure) != repr(other)
    assert all(isinstance(number, float) for number in numbers)
    with pytest.raises(AttributeError, match="nonsense"):
        structure.nonsense  # noqa: B018
