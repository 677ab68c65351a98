"""A small case from inputs to rows: errors, wrong and absent providers, noise."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import bench.measure
from bench.cases import TASKS, Case, Shape, cases
from bench.inputs import ENTROPY, Unavailable, make
from bench.measure import Row, everyone, measure
from bench.providers import COMPILED, FILTERED, OURS, Abilities, Provider, bare_products
from bench.table import table
from bench.truth import truth

OURS_AND_EAGER = [provider for provider in everyone() if provider.name in ("srft_kernels", "eager")]
SMALL = Case("full loss", "srft", Shape(128, 32, 512), "peaked")


def scaled(device: str) -> Abilities:
    """Gradients 1 % too large, the loss right: what a wrong 1/N does."""

    def loss(inputs, task):
        value, logprobs, entropy = OURS.load(device).losses["srft"](inputs, task)
        return value.detach() + 1.01 * (value - value.detach()), logprobs, entropy

    return Abilities(dict.fromkeys(TASKS, loss))


def absent(device: str) -> Abilities:
    raise Unavailable("never-written is not installed")


def broken(device: str) -> Abilities:
    raise RuntimeError("out of luck")


STRANGE = [Provider("scaled", scaled), Provider("absent", absent), Provider("broken", broken)]


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.provider: row for row in measure(SMALL, [OURS, *STRANGE], "cpu", rounds=3)}


def test_ours_is_right_and_carries_its_evidence(rows):
    row = rows["srft_kernels"]
    assert row.status == "ok" and len(row.seconds) == 3
    assert row.extra["error"] < 1e-4 and set(row.extra["errors"]) >= {"loss", "logprobs", "entropy", "dx", "dW"}
    assert row.extra["returned_bytes"] == 4 * (128 * 32 + 512 * 32)
    assert {"tflops", "ratio_to_products", "peak_bytes", "peak_from", "uncertainty", "noisy"} <= set(row.extra)


def test_a_wrong_provider_is_wrong_and_not_fast(rows):
    row = rows["scaled"]
    assert row.status == "wrong" and "dx" in row.reason and not row.seconds
    assert "tflops" not in row.extra and "ratio_to_products" not in row.extra
    shown = next(line for line in table(rows.values()).splitlines() if "scaled" in line)
    assert "WRONG" in shown and "0.01" in shown


def test_who_is_not_there_is_listed(rows):
    text = table(rows.values())
    assert "never-written is not installed" in text and "RuntimeError: out of luck" in text


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_right_against_fp64(task):
    case = replace(SMALL, task=task, live=0.5)
    found = {row.provider: row for row in measure(case, OURS_AND_EAGER, "cpu", rounds=1)}
    for name in ("srft_kernels", "eager"):
        assert found[name].status == "ok", found[name].reason
        assert found[name].extra["error"] < 1e-4


def test_an_approximation_is_right_where_the_task_allows_it():
    case = replace(SMALL, task="srft, gradients to 1%", shape=Shape(128, 64, 4096))
    (row,) = measure(case, [FILTERED], "cpu", rounds=1)
    assert row.status == "ok", row.reason
    assert row.extra["errors"]["dx"] < 1e-2 == row.extra["allowed"]["dx"]
    assert FILTERED.load("cpu").call("srft") is None  # and takes no part where it does not


def test_in_a_graph_it_is_the_same_loss(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # no C++ to be compiled
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = replace(SMALL, task="srft, in a graph")
    found = measure(case, [OURS, COMPILED], "cpu", rounds=2)
    assert [(row.provider, row.status) for row in found] == [(OURS.name, "ok"), (COMPILED.name, "ok")], found
    assert found[0].extra["errors"] == found[1].extra["errors"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert COMPILED.load("cpu").call("srft") is None  # and takes no part in other groups


def test_truth_is_autograd_in_fp64():
    """The sampled gradients against plain autograd through full logits."""
    inputs = make(SMALL, "cpu", torch.float64)
    for task in ("srft", "two pass"):
        found = truth(inputs, TASKS[task]).errors(Abilities(statistics=statistics).call(task)(inputs))
        assert set(found) >= {"loss", "logprobs", "entropy", "dx", "dW"}
        assert max(found.values()) < 1e-6  # objectives are given fp32 statistics


def statistics(x, weight, target):
    logp = (x @ weight.t()).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def test_peaked_rows_have_the_entropy_of_a_policy():
    inputs = make(replace(SMALL, shape=Shape(128, 128, 2048)), "cpu", torch.float32)
    _, entropy = statistics(inputs.input, inputs.weight, inputs.target)
    assert ENTROPY[0] - 0.01 <= entropy.min() and entropy.max() <= ENTROPY[1] + 0.01


def test_masked_inputs_have_the_live_tokens_they_say():
    case = replace(SMALL, live=0.25)
    inputs = make(case, "cpu", torch.float32)
    assert int(inputs.live.sum()) == case.live_tokens == 32
    task = TASKS["cross entropy"]
    assert case.flops == 2 * 3 * 32 * 32 * 512
    bare_products(inputs, task)(inputs)


def test_every_group_is_there_for_every_device():
    groups = {"full loss", "scoring", "two pass", "frozen head", "masked batches", "cost against N", "cost against V",
              "peak memory", "1 M tokens", "filtered backward", "compiled", "small calls"}  # fmt: skip
    for device in ("cpu", "cuda"):
        made = cases(device)
        assert {case.group for case in made} == groups and len(set(map(str, made))) == len(made)
    assert any(case.shape.tokens == 2**20 for case in cases("cuda"))
    assert all("scaled down" in case.note for case in cases("cpu") if case.group == "1 M tokens")


def test_on_cuda_ours_has_its_time_in_a_warm_cache_too(monkeypatch):
    monkeypatch.setattr(bench.measure, "kind_of", lambda device: "cuda")
    found = {row.provider: row for row in measure(SMALL, OURS_AND_EAGER, "cpu", rounds=3)}
    assert found["srft_kernels"].extra["dtype"] == "bfloat16" and found["srft_kernels"].status == "ok"
    assert min(found["srft_kernels"].extra[name] for name in ("hot_seconds", "hot_products_seconds")) > 0
    assert "hot_seconds" not in found["eager"].extra
