"""Compiled calls: one graph, for any number of tokens, and bitwise what eager calls give."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import srft_kernels as sk
from srft_kernels import engine
from srft_kernels.call import Arguments
from srft_kernels.operators import definitions as operators
from srft_kernels.operators import trace

from .compiling import assert_bitwise, compiled, fresh, gradients  # noqa: F401

H, V = 8, 40
OBJECTIVES = {
    "sft": sk.sft(),
    "smoothed": sk.CrossEntropy(label_smoothing=0.1, z_loss=1e-3),
    "grpo": sk.grpo(entropy_coef=0.01),
    "corrected": sk.grpo(correction=sk.Correction("truncate", high=2.0)),
    "srft_paper": sk.srft_paper(),
    "srft_hpt": sk.srft_hpt(),  # depends on a token's sequence
    "batch": sk.srft_hpt(level="batch"),  # in two passes
}
PLANS = {
    "default": None,
    "small chunks": sk.Plan(chunk_rows=2, block_rows=1),  # of less than a sequence
    "two passes": sk.Plan(passes=2),
    "batch-invariant": sk.Plan(passes=2, chunk_rows=7, block_rows=1, batch_invariant=True),  # more rows than tokens
}
CASES = [(name, "default") for name in OBJECTIVES]
CASES += [(name, plan) for name in ("smoothed", "srft_paper", "srft_hpt") for plan in list(PLANS)[1:]]


def inputs(n: int = 12, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(x, W, b, target with ignored tokens, annotations)."""
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in ((n, H), (V, H), (V,)))
    target = torch.randint(V, (n,), generator=g)
    target[::5] = -100
    columns = {name: -torch.rand(n, generator=g) for name in ("old_logprobs", "sampler_logprobs")}
    columns |= {"advantages": torch.randn(n, generator=g), "rewards": torch.randint(2, (n,), generator=g).float()}
    columns |= {"is_demo": torch.arange(n) % 8 < 4, "sequence_ids": torch.arange(n) // 4}
    return x, w, b, target, columns


@pytest.mark.parametrize("name, plan", CASES)
def test_loss(name, plan):
    x, w, b, target, columns = inputs()
    out_metrics = []
    # where whole sequences do not fit a chunk, a factor comes before the products or, in a graph, after them
    factor = 2 if plan == "small chunks" else 3

    def call(x, w, b, target, columns):
        out = sk.linear_loss(x, w, target, OBJECTIVES[name], linear_bias=b, plan=PLANS[plan], **columns)
        out_metrics.append(tuple(out.metrics))
        return (factor * out.loss, out.logprobs, out.entropy, out.logsumexp, *out.metrics.values())

    expected = call(x, w, b, target, columns)
    found = compiled(call)(x, w, b, target, columns)
    assert_bitwise(found, expected)
    assert out_metrics[0] == out_metrics[-1]
    assert_bitwise(gradients(found[0], x, w, b), gradients(expected[0], x, w, b))


@pytest.mark.parametrize("objective", ["grpo", "srft_hpt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype, objective):
    x, w, b, target, columns = inputs(dtype=dtype)
    options = {"softcap": 5.0, "plan": PLANS["small chunks" if objective == "srft_hpt" else "default"], **columns}

    def call(x, w, b):
        return sk.linear_loss(x, w, target, OBJECTIVES[objective], linear_bias=b, **options).loss

    found, expected = compiled(call)(x, w, b), call(x, w, b)
    assert_bitwise([found], [expected])
    assert_bitwise(gradients(found, x, w, b), gradients(expected, x, w, b))


OPTIONS = {
    "logit_scale": {"logit_scale": 0.5, "softcap": 3.0},
    "ignore_index": {"ignore_index": 7},
    "no ignored tokens": {"ignore_index": None},
    "vocab_size": {"vocab_size": V - 3},
    "temperature": {"temperature": 0.7},
    "live_tokens": {"live_tokens": 10, "plan": sk.Plan(compact=False)},
    "too few live_tokens": {"live_tokens": 3, "plan": sk.Plan(compact=False)},
    "filter": {"plan": sk.Plan(filter=sk.Filter(columns=0.5))},
    "extras": {"extras": sk.Extras(argmax=True)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, monkeypatch):
    monkeypatch.setattr("srft_kernels.checks.may_look", lambda _: False)  # as on an accelerator
    x, w, b, target, columns = inputs()
    if name in ("ignore_index", "no ignored tokens", "vocab_size"):
        target = torch.where(target < 0, 7, target % (V - 3))
    columns["token_weight"] = torch.rand(12)

    def call(x, w, b):
        out = sk.linear_loss(x, w, target, sk.grpo(), linear_bias=b, **OPTIONS[name], **columns)
        return (out.loss, out.logprobs, out.entropy, out.logsumexp, *out.metrics.values())

    found, expected = compiled(call)(x, w, b), call(x, w, b)
    grads = gradients(found[0], x, w, b), gradients(expected[0], x, w, b)
    if name == "too few live_tokens":
        assert found[0].isnan()
        found, expected = found[:3], expected[:3]
    torch.testing.assert_close((found, grads[0]), (expected, grads[1]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("live_tokens", [8, 10])
def test_the_number_of_live_tokens_may_change(live_tokens):
    """Without another graph, and the host's count is the one of the call."""
    x, w, _, target, _ = inputs()
    graph = compiled(lambda x, n: sk.linear_cross_entropy(x, w, target, live_tokens=n), dynamic=True)
    assert graph(x, 9) == sk.linear_cross_entropy(x, w, target)
    if live_tokens == 8:
        with pytest.raises(ValueError, match="live_tokens=8, but 9 targets are live"):
            graph(x, live_tokens)
    else:
        assert graph(x, live_tokens) == graph(x, 9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction):
    x, w, b, target, _ = inputs()
    weight, upstream = torch.rand(V), torch.randn(12) if reduction == "none" else torch.tensor(2.0)

    def call(x, w, b):
        return sk.linear_cross_entropy(
            x, w, target, linear_bias=b, weight=weight, reduction=reduction, label_smoothing=0.1
        )

    found, expected = compiled(call)(x, w, b), call(x, w, b)
    assert_bitwise([found], [expected])
    assert_bitwise(gradients((found * upstream).sum(), x, w, b), gradients((expected * upstream).sum(), x, w, b))


def test_logprobs_and_extras():
    x, w, b, target, _ = inputs()
    temperature = torch.rand(12) + 0.5
    extras = sk.Extras(rank=True, argmax=True, top_k=3, candidates=torch.randint(V, (12, 2)))
    x.data[-1] = torch.nan  # where ranks are −1

    def call(x, w, b, temperature):
        stats = sk.linear_logprobs(x, w, target, linear_bias=b, temperature=temperature, extras=extras)
        e = stats.extras
        seen = (e.rank, e.argmax, e.top_ids, e.top_logprobs, e.candidate_logprobs)
        return (stats.logprobs, stats.entropy, stats.logsumexp), seen

    (found, seen), (expected, wanted) = compiled(call)(x, w, b, temperature), call(x, w, b, temperature)
    assert_bitwise([value[:-1] for value in (*found, *seen)], [value[:-1] for value in (*expected, *wanted)])
    assert seen[0][-1] == seen[1][-1] == wanted[0][-1] == -1
    upstream = torch.randn(3, 11)
    ours, theirs = ((torch.stack(stats)[:, :-1] * upstream).sum() for stats in (found, expected))
    assert_bitwise(gradients(ours, x, w, b), gradients(theirs, x, w, b))


class Smoothed:
    label_smoothing = 0.1

    def __call__(self, stats, tokens):
        return -0.9 * tokens.advantages * stats.logprobs - 0.1 * stats.smooth


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("objective", [lambda s, t: -t.advantages * s.logprobs - 0.01 * s.entropy, Smoothed()])
def test_an_objective_of_ones_own(objective, weighted):
    x, w, b, target, columns = inputs()
    target = target.clamp(min=-1)  # which is the arg-max of an ignored token, too
    options = {"ignore_index": -1} | ({"token_weight": torch.rand(12)} if weighted else {})
    advantages, extras = columns["advantages"].to(torch.bfloat16), sk.Extras(argmax=True)

    def call(x, w, b):
        out = sk.linear_loss(x, w, target, objective, linear_bias=b, advantages=advantages, extras=extras, **options)
        return out.loss, out.logprobs, out.entropy, out.metrics["accuracy"]

    found, expected = compiled(call)(x, w, b), call(x, w, b)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
        assert one.requires_grad == other.requires_grad
    torch.testing.assert_close(gradients(found[0], x, w, b), gradients(expected[0], x, w, b))


def test_any_number_of_tokens_is_one_graph():
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, w, b, target, advantages):
        return sk.linear_loss(x, w, target, sk.reinforce(), linear_bias=b, advantages=advantages).loss

    graph = compiled(call, backend=counter)
    for n in (12, 13, 20, 31):
        x, w, b, target, columns = inputs(n)
        found = graph(x, w, b, target, columns["advantages"])
        expected = call(x, w, b, target, columns["advantages"])
        assert_bitwise([found], [expected])
        assert_bitwise(gradients(found, x, w, b), gradients(expected, x, w, b))
    assert counter.frame_count <= 2


def test_a_changed_option_is_seen():
    x, w, _, target, columns = inputs()

    def call(objective, plan):
        return sk.linear_loss(x, w, target, objective, plan=plan, **columns).loss

    graph = compiled(call)
    for objective in (sk.grpo(), sk.grpo(clip_low=0.01, clip_high=0.01), sk.grpo(entropy_coef=0.5), sk.dapo()):
        assert_bitwise([graph(objective, None)], [call(objective, None)])


def test_without_gradients():
    x, w, b, target, columns = inputs()
    call = compiled(lambda x: sk.linear_loss(x, w, target, sk.grpo(), linear_bias=b, **columns).loss)
    with torch.no_grad():
        found = call(x)
    assert not found.requires_grad
    assert_bitwise([found], [sk.linear_loss(x, w, target, sk.grpo(), linear_bias=b, **columns).loss.detach()])


def test_frozen_head_and_autocast():
    x, w, _, target, columns = inputs()
    w = w.detach().bfloat16()  # which could not be multiplied otherwise

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return sk.linear_loss(x, w, target, sk.grpo(), **columns).loss

    found, expected = compiled(call)(x), call(x)
    assert_bitwise([found], [expected])
    assert_bitwise(gradients(found, x), gradients(expected, x))


@pytest.mark.parametrize("name", ["grpo", "batch"])
def test_the_backward_may_run_in_another_autocast(name, monkeypatch):
    x, w, b, target, columns = inputs()
    types = set()

    class Recorded(engine.HeadProducts):
        def __init__(self, weight, compute):
            types.add(compute)
            super().__init__(weight, compute)

    monkeypatch.setattr(engine, "HeadProducts", Recorded)

    def call(x):
        return sk.linear_loss(x, w, target, OBJECTIVES[name], linear_bias=b, **columns).loss

    found, expected = compiled(call)(x), call(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise(gradients(found, x), gradients(expected, x))
    assert types == {torch.float32}


def test_what_wants_no_gradient_is_not_made(monkeypatch):
    wanted, one_pass = [], engine.one_pass
    monkeypatch.setattr(
        engine, "one_pass", lambda tensors, wants, call: wanted.append(wants) or one_pass(tensors, wants, call)
    )
    x, w, b, target, _ = inputs()
    graph = compiled(lambda x, w, b: sk.linear_cross_entropy(x, w, target, linear_bias=b))
    graph(x, w.detach(), b)
    graph(x.detach(), w, None)
    with torch.no_grad():
        graph(x, w, b)
    assert wanted == [(True, False, True), (False, True, False)]


def test_annotations_are_constants():
    x, w, _, target, columns = inputs()
    advantages, temperature = columns["advantages"].requires_grad_(), torch.ones(12, requires_grad=True)
    call = compiled(
        lambda x: sk.linear_loss(x, w.detach(), target, sk.reinforce(), advantages=advantages, temperature=temperature)
    )
    assert not call(x.detach()).loss.requires_grad
    found = torch.autograd.grad(call(x).loss, (x, advantages, temperature), allow_unused=True)
    assert found[0] is not None and found[1] is None and found[2] is None


def test_bad_arguments_get_their_message():
    x, w, _, target, _ = inputs()
    with pytest.raises(Exception, match="target"):
        compiled(lambda: sk.linear_cross_entropy(x, w, target[:5]))()
    outside = target.clone()
    outside[1] = V
    with pytest.raises(ValueError, match="target"):
        compiled(lambda t: sk.linear_cross_entropy(x, w, t))(outside)


def test_inductor_and_modules():
    x, w, _, target, _ = inputs()
    module = sk.LinearCrossEntropyLoss()

    def call(x, w):
        return module(x * 1.0, w, target) * 2

    found, expected = compiled(call, backend="inductor")(x, w), call(x, w)
    assert_bitwise([found], [expected])
    assert_bitwise(gradients(found, x, w), gradients(expected, x, w))


@pytest.mark.parametrize("plan", ["default", "two passes"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
def test_operators_are_well_registered(plan, wanted):
    """Schema, fake implementation, autograd and AOT dispatch, for the operators that a call runs."""
    x, w, b, target, columns = inputs()
    x, w = x.detach().requires_grad_(wanted[0]), w.detach().requires_grad_(wanted[1])
    b = b.detach()
    extras = sk.Extras(rank=True, argmax=True, top_k=2, candidates=torch.randint(V, (12, 3)))
    given = {"input": x, "linear_weight": w, "target": target, "objective": sk.grpo(), "linear_bias": b}
    call = trace._operands(Arguments.of({**given, **columns, "plan": PLANS[plan], "extras": extras}), "loss")
    ops = torch.ops.srft_kernels
    one_pass = operators.in_one_pass(call[-1], "cpu")
    op = ops.one_pass if one_pass else ops.two_pass
    torch.library.opcheck(op, call)
    stats = [torch.rand(12) for _ in range(3)]
    torch.library.opcheck(ops.metrics, (stats, target, None, *call))
    if not one_pass and any(wanted):
        kept = dict(zip(operators.result_names(call[-1], False), op(*call)))["kept"].detach()
        constants = [value.detach() if isinstance(value, torch.Tensor) else value for value in call]
        torch.library.opcheck(ops.second_pass, ([torch.tensor(2.0)], kept, *constants))


def test_second_pass_of_statistics_is_well_registered():
    """Where some of them have a gradient and others have none."""
    x, w, b, target, _ = inputs()
    call = trace._operands(Arguments(input=x, linear_weight=w, target=target, linear_bias=b), "statistics")
    *_, kept = torch.ops.srft_kernels.two_pass(*call)
    constants = [value.detach() if isinstance(value, torch.Tensor) else value for value in call]
    torch.library.opcheck(torch.ops.srft_kernels.second_pass, ([None, torch.rand(12), None], kept.detach(), *constants))


def test_the_factor_of_the_loss():
    """Any, in any type, as eager calls round it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, w, b, target, columns = inputs(dtype=dtype)

        def call(x, w, b, factor):
            return sk.linear_loss(x, w, target, sk.grpo(), linear_bias=b, **columns).loss * factor  # noqa: B023

        graph = compiled(call)
        for factor in torch.tensor([1.0, 0.0, 1 / 3, -700.0]):
            found, expected = graph(x, w, b, factor), call(x, w, b, factor)
            assert_bitwise(gradients(found, x, w, b), gradients(expected, x, w, b))


def test_metrics_without_a_live_token():
    """A graph has the outputs that it has: NaN, where an eager call has no metrics."""
    x, w, _, target, columns = inputs()

    def call(target):
        out = sk.linear_loss(x, w, target, sk.grpo(), **columns)
        return out.loss, out.metrics

    graph, nobody = compiled(call), torch.full_like(target, -100)
    names = call(target)[1].keys()
    assert graph(target)[1].keys() == names and all(value.isfinite() for value in graph(target)[1].values())
    loss, metrics = graph(nobody)
    assert loss == 0 and metrics.keys() == names and all(value.isnan() for value in metrics.values())
    assert call(nobody)[1] == {}


def test_srft_module():
    x, w, _, target, columns = inputs()
    module = sk.SRFTLoss(temperature=0.9)

    def call(x, w, columns):
        out = module(x, w, target, **columns)
        return (out.loss, out.logprobs, *out.metrics.values())

    found, expected = compiled(call)(x, w, columns), call(x, w, columns)
    assert_bitwise(found, expected)
    assert_bitwise(gradients(found[0], x, w), gradients(expected[0], x, w))
    out = torch.compile(module, backend="aot_eager", fullgraph=True)(x, w, target, **columns)
    assert_bitwise([out.loss, *out.metrics.values()], [expected[0], *expected[2:]])


@pytest.mark.parametrize("name", ["softcap", "logit_scale", "ignore_index"])
def test_options_must_be_constants(name):
    x, w, _, target, _ = inputs()
    with pytest.raises(Exception, match=f"{name} must be a constant of Python in a compiled call, found"):
        compiled(lambda: sk.linear_cross_entropy(x, w, target, **{name: torch.tensor(2)}))()


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_schedule_of_temperatures_is_one_graph(where):
    """As a tensor, which a graph can also make of a number by a product."""
    x, w, _, target, _ = inputs()
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, temperature):
        return sk.linear_cross_entropy(x, w, target, temperature=temperature * torch.ones(12))

    graph = compiled(call, backend=counter)
    for step in range(10):
        temperature = 1 + step / 10
        given = torch.full((12,), temperature) if where == "outside" else temperature
        assert_bitwise([graph(x, given)], [call(x, given)])
    assert counter.frame_count <= 2
