"""What callers get wrong is told before any work: the argument, what was found, what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

import srft_kernels as sk

from .counting import Recorder

X, W, Y, B = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6), torch.randn(9)
META = torch.device("meta")


class Scaled(torch.Tensor):
    """Numbers times a scale, as quantised weights have it: a product sees the numbers alone."""

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype, device=numbers.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise NotImplementedError(f"{function} of a Scaled")


class Packed(torch.nn.Parameter):
    """Two numbers in a byte, as bitsandbytes has them."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(options or {}))


def jagged(tokens):
    return torch.nested.nested_tensor_from_jagged(tokens, torch.tensor([0, 2, 6]))


def quantised(weight):
    return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


COMMON = [
    # shapes
    ({"input": X[:, :3]}, ValueError, r"input must be .* H = 4 as in linear_weight \(9, 4\), found shape \(6, 3\)"),
    ({"input": torch.tensor(1.0)}, ValueError, r"input must be \(\.\.\., H\).*found shape \(\)"),
    ({"linear_weight": W[0]}, ValueError, r"linear_weight must be \(V, H\) and not empty, found shape \(4,\)"),
    ({"linear_weight": W[:0]}, ValueError, r"linear_weight must be \(V, H\) and not empty, found shape \(0, 4\)"),
    ({"linear_weight": W.t()}, ValueError, r"H = 9 as in linear_weight \(4, 9\), found shape \(6, 4\)"),
    ({"target": Y[:5]}, ValueError, r"target must be shaped like input .* \(6,\), found \(5,\)"),
    ({"target": Y[:, None]}, ValueError, r"target must be shaped like input .* \(6,\), found \(6, 1\)"),
    ({"linear_bias": B[:8]}, ValueError, r"linear_bias must be \(V,\) = \(9,\), found shape \(8,\)"),
    # types
    ({"input": X.tolist()}, TypeError, "input must be a tensor, found list"),
    ({"linear_weight": None}, TypeError, "linear_weight must be a tensor, found NoneType"),
    ({"target": [1, 2]}, TypeError, "target must be a tensor, found list"),
    ({"linear_bias": 0.0}, TypeError, "linear_bias must be a tensor, found float"),
    ({"input": X.long()}, TypeError, "input must be fp32, bf16, fp16 or fp64, found torch.int64"),
    ({"input": X.to(torch.complex64)}, TypeError, "input must be fp32, bf16, fp16 or fp64, found torch.complex64"),
    ({"target": Y.float()}, TypeError, "target must hold integer class indices, found torch.float32"),
    ({"target": Y.bool()}, TypeError, "target must hold integer class indices, found torch.bool"),
    ({"target": torch.rand(6, 9)}, TypeError, "target holds class probabilities, .*: pass class indices"),
    ({"linear_weight": W.bfloat16()}, TypeError, "linear_weight is torch.bfloat16 but input is torch.float32"),
    ({"linear_bias": B.double()}, TypeError, "linear_bias is torch.float64 but input is torch.float32: cast one"),
    # tensors that are no plain block of numbers
    ({"linear_weight": torch.zeros(18, 1, dtype=torch.uint8)}, TypeError, "linear_weight must be .*uint8: packed and"),
    ({"linear_weight": Packed(torch.zeros(18, 1, dtype=torch.uint8), False)}, TypeError, "is a .*Packed, a tensor"),
    ({"linear_weight": Scaled(W)}, TypeError, r"linear_weight is a .*\.Scaled, a tensor with operations of its own"),
    ({"input": Scaled(X)}, TypeError, "input is a .*Scaled, a tensor with operations of its own"),
    ({"target": Scaled(Y)}, TypeError, "target is a .*Scaled, a tensor with operations of its own"),
    ({"linear_weight": W.to_sparse()}, TypeError, r"must be a dense .* torch.sparse_coo one: to_dense\(\)"),
    ({"linear_weight": W.to_sparse_csr()}, TypeError, r"a torch.sparse_csr one: to_dense\(\)"),
    ({"linear_weight": W.to_mkldnn()}, TypeError, r"found a torch._mkldnn one: to_dense\(\)"),
    ({"input": jagged(X)}, TypeError, r"input must be a dense tensor, found a nested one: pass its values\(\)"),
    ({"target": jagged(Y)}, TypeError, "target must be a dense tensor, found a nested one"),
    ({"linear_weight": quantised(W)}, TypeError, r"linear_weight must be .*, found torch.qint8: .*dequantize\(\)"),
    # devices
    ({"linear_weight": W.to(META)}, ValueError, "linear_weight is on meta but input is on cpu: move it there"),
    ({"target": Y.to(META)}, ValueError, "target is on meta but input is on cpu: move it there"),
    ({"linear_bias": B.to(META)}, ValueError, "linear_bias is on meta but input is on cpu: move it there"),
    # values
    ({"target": Y + 4}, ValueError, r"target\[5\] = 9 lies outside \[0, 9\) .*; 1 of 6 targets do"),
    ({"target": -Y}, ValueError, r"target\[1\] = -1 lies outside \[0, 9\) and is not ignore_index; 5 of 6 targets do"),
    ({"target": Y, "vocab_size": 5}, ValueError, r"target\[5\] = 5 lies outside \[0, 5\)"),
    ({"vocab_size": 10}, ValueError, r"vocab_size must be an integer in \[1, 9\], the rows of linear_weight, found 10"),
    ({"vocab_size": 0}, ValueError, r"vocab_size must be an integer in \[1, 9\].*found 0"),
    ({"vocab_size": 8.0}, ValueError, r"vocab_size must be an integer in \[1, 9\].*found 8.0"),
    ({"temperature": 0.0}, ValueError, "temperature must be a positive number, found 0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be a positive number, found nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be a positive number, found inf"),
    ({"temperature": torch.ones(5)}, ValueError, r"temperature must be shaped like target \(6,\), found \(5,\)"),
    ({"temperature": torch.zeros(6)}, ValueError, r"temperature\[0\] must be a positive number, found 0"),
    ({"temperature": "1"}, ValueError, "temperature must be a positive number, found '1'"),
    ({"softcap": -30.0}, ValueError, "softcap must be a positive number, found -30.0"),
    ({"plan": "one pass"}, TypeError, "plan must be a Plan, found 'one pass': see Plan.choose"),
    # process groups
    ({"group": "world"}, TypeError, "group must be a process group of torch.distributed .* found 'world': pass"),
    ({"group": dist.ProcessGroup(0, 1)}, ValueError, r"group was given, but .* call init_process_group\(\) first"),
]  # fmt: skip

LOSS = [
    ({"advantages": 1.0}, TypeError, r"advantages must be a tensor shaped like target \(6,\), found float"),
    ({"advantages": torch.ones(5)}, ValueError, r"advantages must be shaped like target \(6,\), found \(5,\)"),
    ({"rewards": torch.ones(6, 1)}, ValueError, r"rewards must be shaped like target \(6,\), found \(6, 1\)"),
    ({"is_demo": torch.ones(6, device=META)}, ValueError, "is_demo is on meta but target is on cpu: move it there"),
    ({"token_weight": torch.ones(3)}, ValueError, r"token_weight must be shaped like target \(6,\), found \(3,\)"),
    ({"token_weight": 0.5}, TypeError, r"token_weight must be a tensor shaped like target \(6,\), found float"),
    ({"objective": "srft"}, TypeError, "objective must be CrossEntropy.*or a callable .*found 'srft'"),
    ({"objective": None}, TypeError, "objective must be CrossEntropy.*found None"),
    ({"objective": sk.grpo()}, ValueError, r"PolicyGradient\(.*needs the annotation advantages"),
    ({"objective": sk.grpo(), "old_logprob": torch.ones(6)}, TypeError, r"old_logprob: did you mean old_logprobs\?"),
    ({"rows": torch.ones(6)}, ValueError, "an annotation cannot be called rows, which is a method of Tokens"),
    ({"logprobs_old": torch.ones(6)}, TypeError, "logprobs_old: CrossEntropy reads none but advantages, old_"),
    ({"class_weight": torch.ones(6)}, TypeError, "unknown annotation class_weight: CrossEntropy reads none but"),
    ({"sequence_ids": torch.ones(6)}, TypeError, "sequence_ids must hold integers, found torch.float32, which may"),
    ({"advantages": torch.ones(6).bool()}, TypeError, "advantages must hold numbers, found torch.bool: write"),
    ({"objective": sk.grpo}, TypeError, r"objective is grpo itself, which makes one: call it, grpo\(\)"),
    ({"objective": sk.SRFT}, TypeError, r"objective is SRFT itself, which makes one: call it, SRFT\(\)"),
    ({"advantages": torch.ones(6).cfloat()}, TypeError, "advantages must hold real numbers, found torch.complex64"),
    ({"token_weight": torch.ones(6).cfloat()}, TypeError, "token_weight must hold real numbers, found torch.complex64"),
    ({"sequence_ids": torch.ones(6).bool()}, TypeError, "sequence_ids must hold integers, found torch.bool"),
    ({"rewards": Scaled(torch.ones(6))}, TypeError, "rewards is a .*Scaled, a tensor with operations of its own"),
    ({"is_demo": torch.full((6,), torch.nan)}, ValueError, "is_demo holds NaN, which is neither true nor false"),
    ({"partial_input_grad": 1}, TypeError, "partial_input_grad must be True or False, found 1"),
    ({"partial_input_grad": True}, ValueError, "partial_input_grad=True, but without group= the gradient .* is whole"),
    ({"counted": torch.ones(6)}, ValueError, "an annotation cannot be called counted, which tells the tokens"),
]  # fmt: skip

CROSS_ENTROPY = [
    ({"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', found 'avg'"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\], found 1.5"),
    ({"weight": torch.ones(8)}, ValueError, r"weight must hold one number per class, \(9,\), found shape \(8,\)"),
    ({"weight": [1.0] * 9}, TypeError, "weight must be a tensor, found list"),
    ({"weight": torch.ones(9).cfloat()}, TypeError, "weight must hold real numbers, found torch.complex64"),
    ({"linear_weight": Y, "target": W}, TypeError, "linear_weight must be .*torch.int64: were it and target exchanged"),
    ({"linear_weight": torch.nn.UninitializedParameter()}, TypeError, "a parameter of a lazy module, not initialised"),
    ({"weight": torch.ones(9, device=META)}, ValueError, "weight is on meta but input is on cpu: move it there"),
    ({"options": object(), "plan": sk.Plan()}, ValueError, "options and plan were both given: options is ignored"),
]  # fmt: skip


def test_other_classes_of_tensors_are_taken():
    class Named(torch.Tensor):
        """Without operations of its own."""

    expected = sk.linear_cross_entropy(X, W, Y)
    for kind in (Named, torch.nn.Parameter, torch.nn.Buffer):
        tensors = (tensor.as_subclass(Named) if kind is Named else kind(tensor.detach()) for tensor in (X, W))
        assert torch.equal(torch.Tensor(sk.linear_cross_entropy(*tensors, Y)), expected)


def test_numbers_of_numpy():
    """In eager calls; Dynamo has them as arrays."""
    small = sk.Plan(chunk_rows=np.int64(2), block_rows=np.int32(1), gradient_rows=np.int64(4))
    assert small == sk.Plan(chunk_rows=2, block_rows=1, gradient_rows=4) and type(small.chunk_rows) is int
    options = {"vocab_size": np.int64(7), "ignore_index": np.int16(5), "live_tokens": np.int32(6)}
    objective = sk.SRFT(demo_sft_coef=np.float64(0.5), rollout_coef=np.float32(0.5))
    sk.linear_loss(X, W, Y, objective, advantages=X[:, 0], is_demo=Y > 2)
    assert type(objective.rollout_coef) is float
    numbers = {"temperature": np.float32(0.5), "softcap": np.float64(9), "logit_scale": np.float16(2)}
    found = sk.linear_loss(X, W, Y, sk.sft(label_smoothing=np.float64(0.5)), plan=small, **options, **numbers)
    as_python = {name: value.item() for name, value in (options | numbers).items()}
    assert torch.equal(found.loss, sk.linear_loss(X, W, Y, sk.sft(label_smoothing=0.5), plan=small, **as_python).loss)
    assert sk.linear_logprobs(X, W, Y, extras=sk.Extras(top_k=np.int64(3))).extras.top_ids.shape == (6, 3)


def refused(function, changes, error, message):
    arguments = {"input": X, "linear_weight": W, "target": Y, **changes}
    with Recorder() as work, pytest.raises(error, match=message):
        function(**arguments)
    assert work.flops == 0


@pytest.mark.parametrize("changes, error, message", COMMON)
@pytest.mark.parametrize("function", ["linear_loss", "linear_logprobs", "linear_cross_entropy"])
def test_every_function(function, changes, error, message):
    more = {"objective": sk.sft()} if function == "linear_loss" else {}
    refused(getattr(sk, function), {**more, **changes}, error, message)


@pytest.mark.parametrize("changes, error, message", LOSS)
def test_linear_loss(changes, error, message):
    refused(sk.linear_loss, {"objective": sk.sft(), **changes}, error, message)


@pytest.mark.parametrize("changes, error, message", CROSS_ENTROPY)
def test_linear_cross_entropy(changes, error, message):
    refused(sk.linear_cross_entropy, changes, error, message)


def test_position_of_a_bad_target_in_a_batch():
    target = torch.zeros(2, 3, dtype=torch.long)
    target[1, 2] = 99
    with pytest.raises(ValueError, match=r"target\[1, 2\] = 99 lies outside \[0, 9\).*1 of 6 targets do"):
        sk.linear_logprobs(X.reshape(2, 3, 4), W, target)


def test_ignored_targets_may_be_anything():
    target = torch.tensor([0, 1, 2, 77, 77, 77])
    assert sk.linear_loss(X, W, target, sk.sft(), ignore_index=77).loss.isfinite()


def test_no_ignored_targets():
    with pytest.raises(ValueError, match=r"target\[0\] = -100 lies outside"):
        sk.linear_loss(X, W, torch.full((6,), -100), sk.sft(), ignore_index=None)


def test_user_callables_may_take_annotations_of_any_name():
    """A name close to a built-in one is a slip only for objectives that say what they read."""
    out = sk.linear_loss(X, W, Y, lambda stats, tokens: -stats.logprobs * tokens.reward, reward=torch.ones(6))
    assert out.loss > 0


@pytest.fixture
def one_rank():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_extras_of_a_divided_head(one_rank):
    assert sk.linear_logprobs(X, W, Y, group=one_rank).logprobs.isfinite().all()
    for function, more in ((sk.linear_logprobs, ()), (sk.linear_loss, (sk.sft(),))):
        with pytest.raises(ValueError, match=r"extras= with group= is not supported: .* drop one of the two"):
            function(X, W, Y, *more, group=one_rank, extras=sk.Extras(rank=True))


def test_a_head_that_is_a_dtensor(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    divided = DTensor.from_local(W, init_device_mesh("cpu", (1,)), [Shard(0)])
    for changes in ({"linear_weight": divided}, {"input": divided}):
        name = next(iter(changes))
        refused(sk.linear_logprobs, changes, TypeError, rf"{name} is a DTensor, divided .* as \(Shard\(dim=0\),\)")


def test_candidates_on_another_device():
    extras = sk.Extras(candidates=torch.zeros(6, 2, dtype=torch.long, device=META))
    message = r"Extras\(candidates=...\) is on meta but target on cpu: move it"
    refused(sk.linear_logprobs, {"extras": extras}, ValueError, message)


def test_missing_triton_is_told(monkeypatch):
    import sys

    from srft_kernels import rows

    plan = sk.Plan(backend="triton")
    monkeypatch.delitem(sys.modules, "srft_kernels.rows.triton_rows", raising=False)
    monkeypatch.delattr(rows, "triton_rows", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"the triton row backend needs triton ≥ 3\.6: pip install triton"):
        _ = plan.row_ops
    with pytest.raises(ValueError, match=r"Plan\(backend='cuda'\): expected 'torch' or 'triton'"):
        sk.Plan(backend="cuda")
