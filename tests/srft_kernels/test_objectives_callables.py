"""Objectives of one's own: what a callable is given, and what it may return."""

from __future__ import annotations

import pytest
import torch

import srft_kernels as sk

from .cases import problem
from .formulas import assert_same, batch, expected, found

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy on infinities
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
passes_of = pytest.mark.parametrize("passes", [None, 2])


@backends
@passes_of
def test_callable_equals_built_in(backend, passes):
    """A user's function is another way to write what a built-in does, with the same result."""
    p, columns = batch(backend)
    plan = sk.Plan(backend=backend, chunk_rows=7, block_rows=3, passes=passes)
    built_in = sk.srft_official(entropy_coef=0.1)
    a, a_gradients = found(p, columns, built_in, plan=plan)
    b, b_gradients = found(p, columns, lambda stats, tokens: built_in(stats, tokens), plan=plan)
    assert_same((b.loss, *b_gradients), (a.loss.double(), *(g.double() for g in a_gradients)), p.input.dtype)
    assert set(b.metrics) == set() and "clip_fraction" in a.metrics


def test_callable_sees_slices_or_everything():
    p, columns = batch("torch")
    seen = []

    def local(stats, tokens):
        seen.append(len(stats.logprobs))
        return -stats.logprobs * tokens.advantages

    class Centred:
        token_local = False

        def __call__(self, stats, tokens):
            seen.append(len(stats.logprobs))
            return -((stats.logprobs - stats.logprobs.mean()) ** 2)

    plan = sk.Plan(chunk_rows=4, block_rows=2)
    found(p, columns, local, plan=plan)
    assert max(seen) <= 4 and sum(seen) == p.live.sum()
    seen.clear()
    out, gradients = found(p, columns, Centred(), plan=plan)
    assert seen == [p.live.sum()]
    loss, reference, _ = expected(p, columns, lambda t: -((t.l - t.l.mean()) ** 2))
    assert_same((out.loss, *gradients), (loss, *reference), torch.float64)


def centred(stats, tokens):
    return -((stats.logprobs - stats.logprobs.mean()) ** 2)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("answers", [
    {"token_local": False}, {"token_local": None}, {"token_local": lambda names: False},
    {"scope": lambda names: "batch"}, {"token_local": lambda names: not any(name == "advantages" for name in names)},
], ids=["no", "None", "method", "scope", "by names"])  # fmt: skip
def test_any_way_to_say_that_tokens_depend_on_each_other(answers, compact):
    """Live tokens alone are seen, all of them at once, also through a token of weight 0."""
    p, columns = batch("torch")
    function = lambda stats, tokens: centred(stats, tokens)  # noqa: E731
    vars(function).update(answers)
    weight = torch.where(torch.arange(24) % 3 == 0, 0.0, torch.ones(24, dtype=torch.float64))
    plan = sk.Plan(chunk_rows=4, block_rows=2, compact=compact)
    out, gradients = found(p, columns, function, token_weight=weight, plan=plan)
    loss, reference, _ = expected(p, columns, lambda t: -((t.l - t.l.mean()) ** 2), weight)
    assert_same((out.loss, *gradients), (loss, *reference), torch.float64)


def test_what_answers_nothing():
    p, columns = batch("torch")
    function = lambda stats, tokens: -stats.logprobs * tokens.advantages  # noqa: E731
    out, gradients = found(p, columns, function)
    vars(function).update(dict.fromkeys(("scope", "requires", "inactive", "metrics", "label_smoothing", "reads_live")))
    again, others = found(p, columns, function)
    assert out.loss == again.loss and all(map(torch.equal, gradients, others)) and again.metrics == {}


def test_an_objective_that_is_one_says_it_by_its_scope():
    class Wish:
        token_local = False

    with pytest.raises(TypeError, match=r"Mine.token_local: an Objective says over which tokens by `scope\(names\)`"):
        type("Mine", (Wish, sk.PolicyGradient), {})


def test_tokens_are_a_collection_of_names():
    tokens = sk.Tokens(torch.arange(5), advantages=torch.ones(5), ref_logprobs=None)
    for rows in (
        slice(0, None),
        slice(None),
        slice(1, None),
        slice(0, 5, 2),
        slice(-2, None),
        slice(0, -1),
        slice(0, 9),
    ):
        assert torch.equal(tokens[rows].target, torch.arange(5)[rows])
    assert list(tokens) == ["target", "advantages"] and len(tokens) == 2 and "ref_logprobs" not in tokens
    for rows in (tokens[1:3], tokens.rows(slice(1, 3))):
        assert rows.target.tolist() == [1, 2]


def test_weight_zero_still_matters_to_other_tokens():
    """token_local=False: a token of weight 0 can carry gradient through the losses of others."""
    p, columns = batch("torch")

    def total(stats, tokens):
        return stats.logprobs.sum().expand(len(stats.logprobs))

    total.token_local = False
    weight = torch.zeros(24, dtype=torch.float64)
    weight[0] = 1
    out, gradients = found(p, columns, total, token_weight=weight)
    loss, reference, _ = expected(p, columns, lambda t: t.l.sum().expand(len(t.l)), weight)
    assert_same((out.loss, *gradients), (loss, *reference), torch.float64)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "returned, found_text",
    [
        (lambda stats: stats.logprobs.sum(), r"shape \(\)"),
        (lambda stats: stats.logprobs[:, None], r"shape \(4, 1\)"),
        (lambda stats: 1.0, "float"),
        (lambda stats: None, "NoneType"),
    ],
)
def test_callable_of_wrong_shape(passes, returned, found_text):
    x, w, y = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3), torch.arange(4)
    message = rf"the objective returned {found_text}, expected one loss per token: a tensor of shape \(4,\)"
    with pytest.raises(ValueError, match=message):
        sk.linear_loss(x, w, y, lambda stats, tokens: returned(stats), plan=sk.Plan(passes=passes))


def test_callable_may_return_a_constant():
    """A loss that depends on no statistic has no gradient, and is not an error."""
    for passes in (1, 2):
        p = problem("random")
        x, w = p.leaves()
        out = sk.linear_loss(x, w, p.target, lambda s, t: torch.ones_like(s.logprobs), plan=sk.Plan(passes=passes))
        torch.testing.assert_close(out.loss.detach(), torch.tensor(1.0))
        if out.loss.requires_grad:
            out.loss.backward()
            assert (x.grad == 0).all() and (w.grad == 0).all()


def test_missing_annotation_is_named():
    p, columns = batch("torch")
    message = r"reads the annotation `margin`, which was not given \(given: advantages, .*pass margin="
    with pytest.raises(ValueError, match=message):
        found(p, columns, lambda stats, tokens: stats.logprobs * tokens.margin)
    tokens = sk.Tokens(torch.zeros(2), advantages=None)
    assert tokens.get("advantages") is None and "advantages" not in tokens and "target" in tokens
