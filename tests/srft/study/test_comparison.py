"""Methods beside each other, by hand."""

import math

import numpy
import pytest
from scipy.stats import t

from srft.errors import UserError
from srft.study.comparison import BETTER, UNPAIRED, UNSURE, WORSE, compare, curve
from tests.srft.study.records import a_record, a_set, a_step

PROMPTS = 12


def runs(method: str, *of_seeds: list[list[float]], on: str = "here", **train) -> list[dict]:
    return [a_record(method, seed, [a_set("sums", rewards, on=on)], **train) for seed, rewards in enumerate(of_seeds)]


def right(count: int, samples: int = 2) -> list[list[float]]:
    """Rewards of prompts, of which the first `count` are right in each sample."""
    return [[float(prompt < count)] * samples for prompt in range(PROMPTS)]


def test_scores_differences_and_verdicts():
    records = [
        *runs("srft", right(4), right(5), right(6)),
        *runs("good", right(11), right(12), right(11)),
        *runs("bad", right(0), right(0), right(0)),
        *runs("alike", right(5), right(4), right(6)),
    ]
    found = compare(records)
    assert found.against == "srft" and [each.name for each in found.ordered] == ["good", "srft", "alike", "bad"]
    cells = found.outcome.cells
    assert found.outcome.score == "avg@2" and found.outcome.prompts == PROMPTS
    assert cells["srft"].score.mean == pytest.approx(15 / 36) and cells["srft"].verdict == ""
    assert [cells[name].verdict for name in ("good", "bad", "alike")] == [BETTER, WORSE, UNSURE]
    assert cells["good"].difference.mean == pytest.approx(34 / 36 - 15 / 36)
    assert compare(records, "good").outcome.cells["srft"].verdict == WORSE


def test_differences_are_paired_by_seed_and_prompt():
    """Seeds and prompts that are all over the place, and a method that is a little better on each of them."""
    levels = numpy.random.default_rng(0).uniform(0, 0.9, (3, PROMPTS)).tolist()
    base = [[[level, level] for level in of_seed] for of_seed in levels]
    more = [[[level + 0.05, level + 0.05] for level in of_seed] for of_seed in levels]
    found = compare([*runs("srft", *base), *runs("more", *reversed(more))], "srft")
    assert found.outcome.cells["more"].verdict == UNSURE  # other seeds
    found = compare([*runs("srft", *base), *runs("more", *more)], "srft")
    difference = found.outcome.cells["more"].difference
    assert difference.interval == pytest.approx((0.05, 0.05)) and found.outcome.cells["more"].verdict == BETTER


def test_one_seed_borrows_the_spread_of_others_and_alone_cannot_tell():
    several = [*runs("srft", right(4), right(5), right(6)), *runs("other", right(6), right(5), right(7))]
    one = runs("one", right(11))
    assert compare([*several, *one]).outcome.cells["one"].verdict == BETTER
    found = compare([*runs("srft", right(4)), *one])
    assert found.outcome.cells["one"].verdict == UNPAIRED and found.outcome.cells["one"].difference.mean > 0
    # differences of seeds: other − srft = 2, 0, 1 of 12 prompts; of `one` 7 more prompts are right
    found = compare([*several, *one]).outcome.cells["one"].difference
    by_seeds, by_prompts = (1 / 12) ** 2, (7 / 12 * 5 / 12) / 11
    freedom = (by_seeds + by_prompts) ** 2 / (by_seeds**2 / 2 + by_prompts**2 / 11)
    half = t.ppf(0.975, freedom) * math.sqrt(by_seeds + by_prompts)
    assert found.interval == pytest.approx((7 / 12 - half, 7 / 12 + half))


def test_seeds_that_only_one_method_has_are_left_out_of_the_difference():
    found = compare([*runs("srft", right(4), right(5)), *runs("more", right(6), right(6), right(12))])
    assert found.outcome.cells["more"].score.mean == pytest.approx(24 / 36)
    assert found.outcome.cells["more"].difference.mean == pytest.approx(3 / 24)
    apart = [{**runs("more", right(6))[0], "seed": 7}]
    assert compare([*runs("srft", right(4)), *apart]).outcome.cells["more"].difference is None


def test_the_base_is_paired_with_every_seed():
    base = {**runs("base", right(1))[0], "steps": [], "curve": []}
    found = compare([base, *runs("srft", right(4), right(5), right(6))])
    assert found.against == "srft" and found.outcome.cells["base"].verdict == WORSE
    assert found.outcome.cells["base"].difference.mean == pytest.approx(1 / 12 - 15 / 36)


def test_sets_passes_and_groups():
    def run(method, sums, words, texts):
        sets = [a_set("sums", sums), a_set("words", words, "others"), a_set("texts", texts, "others")]
        return a_record(method, 0, sets)

    first = run("srft", [[1, 0, 0, 0]] * 4, [[0.0]] * 3, [[1.0]] * 2)
    second = run("grpo", [[1, 1, 0, 0]] * 4, [[1.0]] * 3, [[1.0]] * 2)
    found = compare([first, second])
    names = [(each.name, each.score) for each in found.columns]
    assert names == [
        ("sums", "avg@4"), ("sums", "pass@2"), ("sums", "pass@4"), ("words", "avg@1"), ("texts", "avg@1"),
        ("others: 2 sets", "avg"),
    ]  # fmt: skip
    scores = {each: [column.cells[each].score.mean for column in found.columns] for each in ("srft", "grpo")}
    assert scores["srft"] == pytest.approx([0.25, 0.5, 1, 0, 1, 2 / 5])  # the prompts of a group count alike
    assert scores["grpo"] == pytest.approx([0.5, 5 / 6, 1, 1, 1, 1])


def test_what_was_measured_in_another_way_is_no_cell():
    found = compare([*runs("srft", right(4)), *runs("other", right(6), on="elsewhere")])
    assert set(found.outcome.cells) == {"srft"} and [each.name for each in found.ordered] == ["srft", "other"]


@pytest.mark.parametrize(
    ("records", "against", "message"),
    [
        ([], "", "there is no run to compare"),
        (runs("srft", right(4)), "stf", r"--against stf: there is no such method.* \(srft\)"),
        ([*runs("srft", right(4)), *runs("srft", right(4))], "", "srft: two runs of seed 0"),
        (
            [*runs("srft", right(4)), a_record("srft", 1, [], lr=1.0)],
            "",
            "srft: its runs differ in train.lr: 5e-05",
        ),
        ([a_record("srft", 0, [])], "", "srft was measured on nothing: give its runs eval.sets"),
    ],
)
def test_what_cannot_be_compared_is_refused(records, against, message):
    with pytest.raises(UserError, match=message):
        compare(records, against)


def test_budgets_and_curves():
    records = runs("srft", right(4), right(5), updates_per_rollout=2)
    found = compare(records).methods["srft"]
    assert found.budget == {"updates": 4, "trained": 60, "generated": 50, "seconds": 6}
    assert curve(found, "updates", "reward") == [(0, 0), (4, 0.75)]
    assert curve(found, "trained", "reward") == [(0, 0), (60, 0.75)]
    assert curve(found, "seconds", "reward_mean") == [(3, 0), (6, pytest.approx(0.1))]
    assert curve(found, "generated", "demo_share") == [(25, 0.75), (50, 0.75)]
    assert curve(found, "updates", "rollout_entropy") == []
    records[1]["steps"].append(a_step(3, reward_mean=1.0))
    assert [x for x, _ in curve(compare(records).methods["srft"], "updates", "reward_mean")] == [2, 4]
