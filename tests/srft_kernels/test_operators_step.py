"""A training step compiled whole: a Llama of SmolLM2-135M's shape, cut to two layers, and the loss in one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import srft_kernels as sk

from .compiling import assert_bitwise, compiled, fresh, gradients  # noqa: F401

V = 49152
LENGTHS = (24, 31, 17)  # of the sequences of one step


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=V, num_hidden_layers=2, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def batch(length: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(ids, their next tokens with a prompt left out, annotations), two sequences."""
    g = torch.Generator().manual_seed(length)
    ids = torch.randint(V, (2, length + 1), generator=g)
    target = ids[:, 1:].clone()
    target[:, : length // 4] = -100
    columns = {"advantages": torch.randn(2, length, generator=g), "rewards": torch.ones(2, length)}
    return ids[:, :-1], target, columns | {"is_demo": torch.tensor([[True], [False]]).expand(2, length)}


def of_hidden(hidden: Tensor, head: Tensor, target: Tensor, columns: dict[str, Tensor]) -> sk.LossOutput:
    return sk.linear_loss(hidden, head, target, sk.srft_paper(), **columns)


def test_a_step_in_one_graph(model):
    """No graph break, a second graph for any number of tokens and then no more, gradients as without."""

    def loss(ids: Tensor, target: Tensor, columns: dict[str, Tensor]) -> Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state
        return of_hidden(hidden, model.lm_head.weight, target, columns).loss

    def step(function, *arguments) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        found = function(*arguments)
        found.backward()
        return found.detach(), [parameter.grad for parameter in model.parameters()]

    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(loss, backend=counter)
    for length in LENGTHS:
        arguments = batch(length)
        found, expected = step(graph, *arguments), step(loss, *arguments)
        torch.testing.assert_close(found[0], expected[0])
        for one, other in zip(found[1], expected[1], strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_the_loss_in_it_is_bitwise_the_same(model):
    ids, target, columns = batch(LENGTHS[0])
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
    hidden.requires_grad_()

    def call(hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        out = of_hidden(hidden, head, target, columns)
        return out.loss, out.logprobs, out.entropy

    leaves = hidden, model.lm_head.weight
    found, expected = compiled(call)(*leaves), call(*leaves)
    assert_bitwise(found, expected)
    assert_bitwise(gradients(found[0], *leaves), gradients(expected[0], *leaves))
