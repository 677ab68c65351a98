"""One test for each bug that other loss heads shipped and that this one could have.

Two of them take several processes, and are in test_averages_ranks.py: a loss called on the unwrapped module under DDP,
whose gradients nobody reduced (TRL 1.14), in test_called_in_the_forward_of_a_wrapped_module; and FSDP2's full_tensor()
outside of the module that owns the weight, which lost part of the gradient (NeMo Automodel), in
test_a_sharded_weight_outside_of_its_module.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import srft_kernels as sk
from srft_kernels.head import Head

from .cases import BACKENDS, in_one_pass, problem

backends = pytest.mark.parametrize("backend", BACKENDS)
both_passes = pytest.mark.parametrize("passes", [1, 2])


def run(x, w, y, plan, objective=None, **options):
    """(loss, ℓ, H, dx, dW) of a fused call."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    out = sk.linear_loss(x, w, y, objective or sk.sft(), plan=plan, **options)
    return out.loss.detach(), out.logprobs, out.entropy, *torch.autograd.grad(out.loss, (x, w))


@backends
@both_passes
@pytest.mark.parametrize("garbage", [0.0, 1e4, torch.nan, torch.inf])
def test_padded_vocabulary_takes_no_part(backend, passes, garbage):
    """verl#2656, verl#2899: columns that pad V to a multiple of 64 added e⁰ each to the sum, and rewards collapsed."""
    p = problem(vocab=100)
    padded = torch.cat([p.weight, torch.full((28, 16), garbage)])
    plan = sk.Plan(backend=backend, chunk_rows=5, passes=passes)
    with_padding = run(p.input, padded, p.target, plan, vocab_size=100)
    without = run(p.input, p.weight, p.target, plan)
    torch.testing.assert_close(with_padding[:4], without[:4])
    torch.testing.assert_close(with_padding[4][:100], without[4])
    assert (with_padding[4][100:] == 0).all()


@backends
@both_passes
def test_all_negative_logits(backend, passes):
    """verl#7439, SkyRL#2141: a running maximum that started at 0 made e^{z − 0} vanish, and rows NaN."""
    x, w = torch.ones(3, 1), torch.tensor([[-1000.0], [-1001.0], [-1002.0]])
    plan = sk.Plan(backend=backend, passes=passes)
    _, logprobs, entropy, dx, dw = run(x, w, torch.tensor([0, 1, 2]), plan)
    expected = torch.tensor([0.0, -1.0, -2.0]).log_softmax(0)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, (-(expected.exp() * expected).sum()).expand(3))
    assert dx.isfinite().all() and dw.isfinite().all()


@backends
@both_passes
def test_soft_cap_before_the_mask(backend, passes):
    """unsloth#10616: capped after the mask, a banned column has the logit −cap instead of −∞, and some probability."""
    x, w = torch.tensor([[1.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    plan = sk.Plan(backend=backend, passes=passes)
    _, logprobs, entropy, _, dw = run(x, w, torch.tensor([0]), plan, vocab_size=2, softcap=1.0)
    z = torch.tanh(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(logprobs[0], z.log_softmax(0)[0])
    torch.testing.assert_close(entropy[0], -(z.softmax(0) * z.log_softmax(0)).sum())
    assert dw[2] == 0


@backends
@both_passes
def test_sentinel_target_in_a_padding_column(backend, passes):
    """CCE#59: the value that stands for "not here" pointed at a padding column, whose −∞ entered the loss."""
    p = problem(vocab=100)
    padded = torch.cat([p.weight, torch.full((28, 16), torch.inf)])
    plan = sk.Plan(backend=backend, passes=passes)
    sentinel = torch.where(p.live, p.target, 127)
    ours = run(p.input, padded, sentinel, plan, vocab_size=100, ignore_index=127)
    torch.testing.assert_close(ours[:4], run(p.input, p.weight, p.target, plan)[:4])


@backends
@both_passes
@pytest.mark.parametrize("frozen", [False, True])
def test_bias(backend, passes, frozen):
    """CCE#52: the bias was added in one place and forgotten in another."""
    p = problem("bias")
    x, w, b = p.leaves()
    b.requires_grad_(not frozen)
    plan = sk.Plan(backend=backend, chunk_rows=5, passes=passes)
    out = sk.linear_loss(x, w, p.target, sk.sft(), linear_bias=b, plan=plan)
    reference = F.cross_entropy(F.linear(x, w, b), p.target)
    wanted = (x, w) if frozen else (x, w, b)
    torch.testing.assert_close(out.loss, reference)
    torch.testing.assert_close(torch.autograd.grad(out.loss, wanted), torch.autograd.grad(reference, wanted))


@backends
@both_passes
def test_weight_gradient_does_not_drift_with_chunks(backend, passes):
    """Liger#1391: summed in bf16, dW loses more with every chunk; in fp32 one row a chunk is as good as one chunk."""
    p = problem("gaussian", tokens=96, vocab=31, dtype=torch.bfloat16, ignored=0)
    exact = [t.detach().double().requires_grad_() for t in (p.input, p.weight)]
    F.cross_entropy(F.linear(*exact), p.target).backward()
    errors = []
    for rows in (1, 96):
        dw = run(p.input, p.weight, p.target, sk.Plan(backend=backend, chunk_rows=rows, passes=passes))[4]
        errors.append((dw.double() - exact[1].grad).abs().max())
    assert errors[0] <= 1.01 * errors[1]
    assert errors[0] <= torch.finfo(torch.bfloat16).eps / 2 * exact[1].grad.abs().max()


@backends
def test_weight_gradient_with_reduction_none(backend):
    """Liger#1298: gradients made in the forward ignored each token's own upstream gradient."""
    p = problem("random", tokens=20)
    x, w = p.leaves()
    upstream = torch.linspace(-2, 2, 20)
    plan = sk.Plan(backend=backend, chunk_rows=6)
    ours = sk.linear_cross_entropy(x, w, p.target, reduction="none", plan=plan)
    reference = F.cross_entropy(F.linear(x, w), p.target, reduction="none")
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x, w), upstream), torch.autograd.grad(reference, (x, w), upstream)
    )


@backends
@both_passes
def test_types_under_autocast(backend, passes):
    """Liger#1283: bf16 hidden states met an fp32 head under autocast, and raised or returned the wrong type."""
    p = problem("gaussian")
    x, w = p.input.bfloat16().requires_grad_(), p.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sk.linear_loss(x, w, p.target, sk.sft(), plan=sk.Plan(backend=backend, passes=passes)).loss
    loss.backward()
    assert (loss.dtype, x.grad.dtype, w.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    with pytest.raises(TypeError, match=r"cast one, or use torch\.autocast"):
        sk.linear_loss(x, w, p.target, sk.sft())


@backends
@both_passes
def test_gradient_of_several_microbatches_is_that_of_the_batch(backend, passes):
    """Liger#1082: a fused RL loss normalised by its own batch gave gradients 100 times those of the eager trainer."""
    p = problem("random", tokens=24, ignored=0.5)
    mask, ids = p.live, torch.arange(24) // 6
    advantages = torch.randn(24)
    plan = sk.Plan(backend=backend, passes=passes)
    for weight in (sk.token_mean(mask), sk.sequence_mean(mask, ids), sk.constant_length(mask, ids, 6)):
        x, w = p.leaves()
        logp = F.linear(x, w).log_softmax(-1).gather(1, p.target.clamp(min=0)[:, None])[:, 0]
        (-logp * advantages * weight).sum().backward()
        eager = w.grad.clone()
        w.grad = None
        for part in (slice(0, 7), slice(7, 8), slice(8, 24)):
            sk.linear_loss(
                x[part], w, p.target[part], sk.grpo(), advantages=advantages[part], token_weight=weight[part], plan=plan
            ).loss.backward()
        torch.testing.assert_close(w.grad, eager)


@backends
@both_passes
def test_entropy_has_a_gradient(backend, passes):
    """TRL's chunked_logprob returned an entropy whose gradient was silently nothing."""
    p = problem("random", ignored=0)
    x, w = p.leaves()
    plan = sk.Plan(backend=backend, chunk_rows=4, passes=passes)
    logp = F.linear(x, w).log_softmax(-1)
    reference = torch.autograd.grad(-(logp.exp() * logp).sum(-1).mean(), (x, w))
    loss = sk.linear_loss(x, w, p.target, lambda stats, tokens: stats.entropy, plan=plan).loss
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), reference)
    entropy = sk.linear_logprobs(x, w, p.target, plan=plan).entropy.mean()
    torch.testing.assert_close(torch.autograd.grad(entropy, (x, w)), reference)
    assert reference[0].abs().max() > 1e-3


def test_kernels_that_write_their_input_are_not_autotuned():
    """SkyRL#2141: tuning runs a kernel many times; one that writes over its input then eats its own output."""
    for file in (Path(sk.__file__).parent / "rows").glob("*.py"):
        assert "autotune" not in file.read_text(encoding="utf-8"), file.name


@backends
@both_passes
def test_another_thread(backend, passes):
    """verl#4676: what a library keeps in a context variable is not there in another thread."""
    p = problem()
    plan = sk.Plan(backend=backend, passes=passes)
    results = []
    thread = threading.Thread(target=lambda: results.append(run(p.input, p.weight, p.target, plan)))
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0], run(p.input, p.weight, p.target, plan))


@backends
@pytest.mark.parametrize("bad", [-7, 11, 2**40])
def test_target_out_of_range(backend, bad):
    """verl: a label past the vocabulary read whatever memory was there. On CPU it raises; rows themselves say NaN."""
    y = torch.tensor([1, bad, 2])
    with pytest.raises(ValueError, match=rf"target\[1\] = {bad} lies outside \[0, 11\)"):
        sk.linear_loss(torch.randn(3, 4), torch.randn(11, 4), y, sk.sft())
    logits = torch.randn(3, 16)[:, :11]
    stats, _ = sk.Plan(backend=backend).row_ops.statistics(logits.clone(), y, Head())
    assert stats.logprobs.isnan().tolist() == [False, True, False]
    tokens = sk.Tokens(y)
    room = torch.empty(3, 16)[:, :11].copy_(logits)
    rows = sk.Plan(backend=backend).row_ops
    _, loss, gradient = in_one_pass(rows, room, tokens, torch.ones(3), sk.sft(), Head())
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_offsets_past_2_to_the_31(backend):
    """Liger#1248, FLA#1080: row · stride in 32 bits wrapped around, and what was read there was finite and wrong.

    Three rows 2³⁰ numbers apart, in memory that is reserved and never touched but for them.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # 8.6 GB of address space, a few pages of memory
    vocab, stride = 20, 2**30
    wide = torch.empty(2 * stride + 32).as_strided((3, vocab), (stride, 1))
    logits, target = torch.randn(3, vocab), torch.tensor([3, 0, 19])
    expected = logits.double().log_softmax(-1)
    arguments = sk.Tokens(target), torch.ones(3), sk.sft(), Head()
    wide.copy_(logits)
    stats, _ = sk.Plan(backend=backend).row_ops.statistics(wide.clone(), target, Head())
    torch.testing.assert_close(stats.logprobs.double(), expected.gather(1, target[:, None])[:, 0])
    stats, loss, gradient = in_one_pass(sk.Plan(backend=backend).row_ops, wide, *arguments)
    torch.testing.assert_close(loss.double(), -expected.gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(gradient.double(), expected.exp() - torch.nn.functional.one_hot(target, vocab))


@pytest.mark.slow
def test_more_than_2_to_the_31_logits():
    """The same for real: 16,512 tokens by 131,072 entries, every one of their logits made and read, in chunks."""
    tokens, vocab = 16_512, 131_072
    assert tokens * vocab > 2**31
    x = torch.randn(tokens, 1, requires_grad=True)
    w, y = torch.randn(vocab, 1), torch.randint(vocab, (tokens,))
    out = sk.linear_loss(x, w, y, sk.sft())
    dx = torch.autograd.grad(out.loss, x)[0]
    last = slice(tokens - 8, tokens)
    exact = x.detach()[last].double().requires_grad_()
    logp = (exact @ w.double().t()).log_softmax(-1).gather(1, y[last, None])[:, 0]
    torch.testing.assert_close(out.logprobs[last].double(), logp.detach(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(-logp.sum() / tokens, exact)[0]
    torch.testing.assert_close(dx[last].double(), expected, rtol=1e-4, atol=1e-9)
