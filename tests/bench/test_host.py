"""A small call's kernels and dispatched operations, counted on a CPU."""

import pytest

pytest.importorskip("triton")

import srft_kernels as sk
from bench import host


@pytest.mark.parametrize("objective", [sk.sft(), sk.srft_paper(), sk.grpo()], ids=repr)
@pytest.mark.parametrize("masked", [False, True])
def test_a_small_call(objective, masked):
    """At most 12 kernels forward and 4 backward, and half of the 84 operations that a call dispatched before."""
    forward, backward = host.counted(objective, masked)
    assert len(forward.kernels) <= 12 and len(backward.kernels) <= 4, (forward, backward)
    assert forward.dispatches <= 42 and backward.dispatches <= 4
    assert forward.kernels.count("mm") == 3 and forward.kernels.count("_loss_gradient_kernel") == 1
    assert ("_prepare_kernel" in forward.kernels) is masked
    assert backward.kernels == ["_scale_kernel", "_scale_kernel"]
    assert not {"scalar_tensor", "cat", "full"} & set(forward.kernels) or not masked


def test_the_host_is_timed():
    assert 1e-6 < host.host_seconds(sk.sft(), True, 0.01) < 1
