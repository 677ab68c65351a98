"""The error check: what is wrong is told, in every type, and what is only rounded is not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import truth as of_truth
from bench.cases import TASKS, Case, Shape
from bench.inputs import Inputs, make
from bench.peers import eager
from bench.providers import OURS
from bench.truth import TOLERANCE, Truth, truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASE = Case("full loss", "srft", Shape(256, 128, 4096), "peaked", live=0.9)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def known(request) -> tuple[Inputs, Truth, dict[str, Tensor]]:
    inputs = make(CASE, "cpu", request.param)
    return inputs, truth(inputs, TASKS[CASE.task]), OURS.load("cpu").call(CASE.task)(inputs)


def judged(inputs: Inputs, reference: Truth, results: dict[str, Tensor]) -> set[str]:
    return set(reference.past(reference.errors(results)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "task, source",
    [("cross entropy", "random"), ("srft", "random"), ("srft", "peaked"), ("two pass", "peaked"),
     ("frozen head", "peaked"), ("scoring", "peaked")],
)  # fmt: skip
def test_what_is_only_rounded_is_right(dtype, task, source):
    inputs = make(replace(CASE, task=task, inputs=source), "cpu", dtype)
    reference = truth(inputs, TASKS[task])
    for load in (OURS.load, eager):
        errors = reference.errors(load("cpu").call(task)(inputs))
        assert errors and not reference.past(errors), (errors, reference.allowed)


def test_who_is_spared_ignored_tokens_has_the_same_results():
    inputs = make(CASE, "cpu", torch.float32)
    reference, able = truth(inputs, TASKS["srft"]), eager("cpu")
    seen = []

    def statistics(x, weight, target):
        seen.append(len(x))
        return able.statistics(x, weight, target)

    results = replace(able, statistics=statistics, compacts=True).call("srft")(inputs)
    assert seen == [CASE.live_tokens] and not reference.verdict(reference.errors(results))
    assert len(results["logprobs"]) == len(inputs.target) and not results["entropy"][~inputs.live].any()


def test_ours_is_within_eagers_own_error(known):
    _, reference, results = known
    assert {"loss", "logprobs", "entropy", "dx", "dW", "dW others", "dx ignored"} <= set(reference.errors(results))
    assert judged(*known) == set()


def on_others(dw: Tensor, inputs: Inputs) -> Tensor:
    """(V, 1) whether an entry of the head is nobody's target."""
    return torch.ones(len(dw), 1, dtype=torch.bool).index_fill(0, inputs.target[inputs.live], False)


def without_the_last(inputs: Inputs, tokens: int) -> Tensor:
    """dW of the others, each weighted as before."""
    target = inputs.target.clone()
    target[-tokens:] = -100
    fewer = replace(inputs, target=target)
    return OURS.load("cpu").call(CASE.task)(fewer)["dW"] * (fewer.live.sum() / inputs.live.sum())


WRONG: dict[str, tuple[Callable[[dict[str, Tensor], Inputs], dict[str, Tensor]], set[str]]] = {
    "dx 3 % too long": (lambda r, i: {"dx": r["dx"] * 1.03}, {"dx scale"}),
    "dW 5 % too short where nobody's target is": (
        lambda r, i: {"dW": torch.where(on_others(r["dW"], i), r["dW"] * 0.95, r["dW"])},
        {"dW others scale"},
    ),
    "dW skipped where nobody's target is": (
        lambda r, i: {"dW": torch.where(on_others(r["dW"], i), 0, r["dW"])},
        {"dW others"},
    ),
    "dW not summed over the last chunk of tokens": (
        lambda r, i: {"dW": without_the_last(i, 40)},
        {"dW"},
    ),
    "entropies to one decimal": (lambda r, i: {"entropy": (r["entropy"] * 10).round() / 10}, {"entropy"}),
    "log-probs off by 5 %": (lambda r, i: {"logprobs": r["logprobs"] * 1.05}, {"logprobs"}),
    "loss divided by all tokens": (lambda r, i: {"loss": r["loss"] * 0.9}, {"loss"}),
    "one ignored token with a gradient": (
        lambda r, i: {"dx": r["dx"].index_fill(0, (~i.live).nonzero()[:1, 0], 1e-6)},
        {"dx ignored"},
    ),
    "NaN": (lambda r, i: {"dx": r["dx"] * float("nan")}, {"dx", "dx scale", "dx ignored"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(known, name):
    inputs, reference, results = known
    spoil, told = WRONG[name]
    spoilt = results | spoil(results, inputs)
    assert told <= judged(inputs, reference, spoilt)
    assert all(f"{error} " in reference.verdict(reference.errors(spoilt)) for error in told)


def test_bf16_entropies_pass_for_bf16_inputs_only(known):
    inputs, reference, results = known
    rounded = results | {"entropy": results["entropy"].bfloat16()}
    assert judged(inputs, reference, rounded) == ({"entropy"} if inputs.input.dtype == torch.float32 else set())


def test_eager_is_the_measure_on_a_part_of_many_tokens(monkeypatch):
    monkeypatch.setattr(of_truth, "YARDSTICK", 128)
    inputs = make(replace(CASE, inputs="random"), "cpu", torch.bfloat16)
    reference = truth(inputs, TASKS[CASE.task])
    assert reference.allowed["dx"] < TOLERANCE[torch.bfloat16]
    assert judged(inputs, reference, eager("cpu").call(CASE.task)(inputs)) == set()


def test_where_eager_cannot_run_the_bound_is_fixed(monkeypatch):
    def out_of_memory(device):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr("bench.peers.eager", out_of_memory)
    reference = truth(make(CASE, "cpu", torch.bfloat16), TASKS[CASE.task])
    assert reference.allowed["dx"] == reference.allowed["entropy"] == TOLERANCE[torch.bfloat16]
    assert reference.allowed["dx ignored"] == 0 and reference.allowed["dx scale"] == of_truth.SCALE


def test_what_is_too_much_to_check_is_said(monkeypatch):
    monkeypatch.setattr(of_truth, "AFFORDABLE", 0.0)
    inputs = make(CASE, "cpu", torch.float32)
    reference = truth(inputs, TASKS["srft"])
    errors = reference.errors(OURS.load("cpu").call("srft")(inputs))
    assert "loss and dW" in reference.unchecked and not {"loss", "dW", "dW others"} & set(errors)
    assert {"dx", "logprobs", "entropy", "dx ignored"} <= set(errors) and not reference.verdict(errors)
