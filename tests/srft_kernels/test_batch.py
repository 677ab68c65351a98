"""Rows that are worked through: ignored ones left out, or kept as dead rows where counting would stall a stream."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import srft_kernels as sk
from srft_kernels import checks
from srft_kernels.call import Call

from .cases import KINDS, Problem, assert_exact, eager, ours, problem, truth

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


MASKED = sk.Plan(chunk_rows=5, block_rows=3, compact=False)
TOKEN_LOCAL = lambda stats, tokens: -tokens.advantages * stats.logprobs - 0.1 * stats.entropy  # noqa: E731


def columns(n: int) -> dict[str, torch.Tensor]:
    return {"advantages": (torch.arange(n) % 5 - 2) / 2}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_dead_rows_change_nothing(backend, kind, passes):
    p = problem(kind)
    given = columns(len(p.target))
    usual, reference = eager(p, TOKEN_LOCAL, **given), truth(p, TOKEN_LOCAL, **given)
    plan = replace(MASKED, backend=backend, passes=passes)
    assert_exact(ours(p, TOKEN_LOCAL, plan, **given), usual, reference)


@pytest.mark.parametrize("passes", [1, 2])
def test_what_dead_rows_hold_reaches_nothing(backend, passes):
    p = problem("bias")
    given = columns(len(p.target))
    plan = replace(MASKED, backend=backend, passes=passes)
    clean = ours(p, sk.reinforce(), plan, **given)
    dead = ~p.live
    assert dead.any()
    p.input[dead], given["advantages"][dead] = torch.nan, torch.inf
    for name, value in ours(p, sk.reinforce(), plan, **given).values.items():
        assert torch.equal(value, clean.values[name]), name


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("spare", [0, 2])
def test_live_tokens_leaves_the_rest_out(backend, passes, spare):
    p = problem("everything", tokens=40, ignored=0.7)
    given = columns(len(p.target))
    count = int(p.live.sum()) + spare
    plan = replace(MASKED, backend=backend, passes=passes)
    usual, reference = eager(p, TOKEN_LOCAL, **given), truth(p, TOKEN_LOCAL, **given)
    counted = replace(p, head={**p.head, "live_tokens": count})
    assert_exact(ours(counted, TOKEN_LOCAL, plan, **given), usual, reference)


def test_only_the_counted_rows_are_multiplied(monkeypatch):
    p = problem("random", tokens=40, ignored=0.7)
    count, seen = int(p.live.sum()), []
    logits = Call.logits_buffer
    monkeypatch.setattr(Call, "logits_buffer", lambda *a: seen.append(len(a[0].batch)) or logits(*a))
    sk.linear_logprobs(p.input, p.weight, p.target, live_tokens=count, plan=MASKED)
    sk.linear_logprobs(p.input, p.weight, p.target, plan=MASKED)
    assert seen == [count, 40]


def test_more_live_tokens_than_said():
    p = problem("random")
    count = int(p.live.sum())
    with pytest.raises(ValueError, match=f"live_tokens={count - 1}, but {count} targets are live"):
        sk.linear_logprobs(p.input, p.weight, p.target, live_tokens=count - 1)
    with pytest.raises(TypeError, match=r"an int ≥ 0, found 2\.5"):
        sk.linear_logprobs(p.input, p.weight, p.target, live_tokens=2.5)


def test_more_live_tokens_than_said_where_nobody_may_look(monkeypatch):
    monkeypatch.setattr(checks, "may_look", lambda tensor: False)
    p = problem("random")
    x = p.input.requires_grad_()
    out = sk.linear_loss(x, p.weight, p.target, sk.sft(), live_tokens=int(p.live.sum()) - 1, plan=MASKED)
    out.loss.backward()
    stats = sk.linear_logprobs(x, p.weight, p.target, live_tokens=int(p.live.sum()) - 1, plan=MASKED)
    assert out.loss.isnan() and out.logprobs.isnan().any() and x.grad.isnan().any() and stats.entropy.isnan().any()


def test_a_loss_over_several_tokens_sees_live_ones_alone():
    p = problem("random", tokens=30)

    def centred(stats, tokens):
        assert len(stats.logprobs) == int(p.live.sum())
        return -(tokens.advantages - tokens.advantages.mean()) * stats.logprobs

    centred.token_local = False
    out = sk.linear_loss(p.input, p.weight, p.target, centred, plan=MASKED, **columns(30))
    assert torch.equal(out.loss, sk.linear_loss(p.input, p.weight, p.target, centred, **columns(30)).loss)


@pytest.mark.parametrize(
    "objective", [sk.gspo(), sk.srft_hpt(positive="advantage"), sk.srft_paper(level="batch", positive="advantage")]
)
def test_built_in_losses_over_several_tokens_read_which_are_live(objective):
    p = problem("random", tokens=30)
    given = columns(30) | {"is_demo": torch.arange(30) % 2 == 0, "sequence_ids": torch.arange(30) // 7}
    assert objective.reads_live
    dead = ~p.live
    expected = sk.linear_loss(p.input, p.weight, p.target, objective, **given)
    p.input[dead] = 3.0  # their entropy is another one
    out = sk.linear_loss(p.input, p.weight, p.target, objective, plan=MASKED, **given)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics, expected.metrics)


@pytest.mark.parametrize(
    "objective", [sk.grpo(kl_coef=0.1), sk.srft_official(), sk.cispo(correction=sk.Correction(high=2.0)), sk.sft()]
)
def test_metrics_are_means_over_live_tokens(objective):
    p, extras = problem("random", tokens=30), sk.Extras(argmax=True)
    names = ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs", "rewards")
    given = {name: torch.randn(30) for name in names} | {"is_demo": torch.arange(30) % 2 == 0}
    given = {name: torch.where(p.live, column, torch.nan if column.is_floating_point() else True)
             for name, column in given.items()}  # fmt: skip
    call = partial(sk.linear_loss, p.input, p.weight, objective=objective, extras=extras, **given)
    assert not p.live.all()
    torch.testing.assert_close(call(target=p.target, plan=MASKED).metrics, call(target=p.target).metrics)
    nobody = torch.full_like(p.target, -100)
    assert call(target=nobody).metrics == {}
    assert all(value.isnan() for value in call(target=nobody, plan=MASKED).metrics.values())


def test_metrics_of_an_objective_that_does_not_read_live_see_live_tokens_alone():
    class Mine:
        def __call__(self, stats, tokens):
            return -tokens.advantages * stats.logprobs

        def metrics(self, stats, tokens):
            return {"seen": torch.tensor(float(len(stats.logprobs))), "entropy": stats.entropy.mean()}

    p = problem("random", tokens=30)
    found, expected = (
        sk.linear_loss(p.input, p.weight, p.target, Mine(), plan=plan, **columns(30)).metrics for plan in (MASKED, None)
    )
    assert found["seen"] == p.live.sum()
    torch.testing.assert_close(found, expected)


def test_an_annotation_called_live_is_refused():
    p = problem("random")
    with pytest.raises(ValueError, match="cannot be called live"):
        sk.linear_loss(p.input, p.weight, p.target, TOKEN_LOCAL, live=p.live, **columns(len(p.target)))


INVARIANT = sk.Plan(chunk_rows=16, block_rows=4, batch_invariant=True)


def tokens_alone(p: Problem, order: torch.Tensor, plan: sk.Plan) -> dict[str, torch.Tensor]:
    """ℓ, H, dx of some tokens, in this order, of a loss that is a sum."""
    x = p.input[order].requires_grad_()
    n = len(order)
    out = sk.linear_loss(
        x, p.weight, p.target[order], sk.PolicyGradient("reinforce", entropy_coef=0.1), plan=plan,
        token_weight=torch.ones(n), advantages=columns(len(p.target))["advantages"][order],
    )  # fmt: skip
    out.loss.backward()
    return {"logprobs": out.logprobs, "entropy": out.entropy, "dx": x.grad}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant(backend, dtype, passes):
    """Bitwise: all 61 tokens at once, and any of them in any company, order and number."""
    p = problem("random", tokens=61, hidden=64, vocab=1000, dtype=dtype)
    plan = replace(INVARIANT, backend=backend, passes=passes)
    whole = tokens_alone(p, torch.arange(61), plan)
    generator = torch.Generator().manual_seed(1)
    for size in (1, 2, 7, 16, 33, 61):
        order = torch.randperm(61, generator=generator)[:size]
        for name, value in tokens_alone(p, order, plan).items():
            assert torch.equal(value, whole[name][order]), (name, size)


@pytest.mark.parametrize("compact", [True, False])
def test_batch_invariant_with_ignored_tokens(backend, compact):
    p = problem("everything", tokens=23)
    given = columns(23)
    plan = replace(INVARIANT, backend=backend, compact=compact)
    assert_exact(ours(p, TOKEN_LOCAL, plan, **given), eager(p, TOKEN_LOCAL, **given), truth(p, TOKEN_LOCAL, **given))


def test_batch_invariant_plans_do_not_depend_on_the_batch():
    few, many = (sk.Plan.choose(n, 576, 49152, torch.float32, "cpu", batch_invariant=True) for n in (3, 3000))
    assert few == many and few.chunk_rows % few.block_rows == 0 and "batch-invariant" in str(few)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("live_tokens", [None, 20])
def test_no_synchronisation_on_accelerators(passes, live_tokens):
    """Tensors without values refuse whatever needs one on the host: .item(), nonzero(), boolean masks."""
    with torch.device("meta"):
        x, w, b = torch.randn(64, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True), torch.randn(500)
        target = torch.randint(500, (64,))
        plan = sk.Plan(chunk_rows=24, passes=passes)
        given = {"advantages": torch.randn(64), "is_demo": torch.rand(64) < 0.5, "rewards": torch.ones(64)}
        head = {"linear_bias": b, "live_tokens": live_tokens, "plan": plan}
        objective = sk.srft_paper(kl_coef=0.1, correction=sk.Correction(high=2.0))
        given |= {"ref_logprobs": torch.randn(64), "sampler_logprobs": torch.randn(64)}
        out = sk.linear_loss(x, w, target, objective, extras=sk.Extras(argmax=True), **head, **given)
        out.loss.backward()
        assert {"rollout_loss", "approx_kl", "ref_kl", "correction_weight", "accuracy"} <= set(out.metrics)
        stats = sk.linear_logprobs(x, w, target, **head)
        (stats.logprobs + stats.entropy).sum().backward()
        sk.linear_cross_entropy(x, w, target, label_smoothing=0.1, weight=torch.rand(500), **head).backward()
        assert x.grad.shape == x.shape and w.grad.shape == w.shape


@pytest.mark.parametrize("compact", [True, False])
def test_the_mean_s_weights_are_as_exact_as_fp64(compact):
    """One of seven tokens ignored: a sixth is no fp32 number."""
    x, w = torch.randn(7, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, -100, 3, 4, 5, 6])
    found = sk.linear_cross_entropy(x, w, y, plan=sk.Plan(compact=compact))
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(x @ w.t(), y), rtol=1e-14, atol=0)
