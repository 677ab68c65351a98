"""Methods beside each other, by hand."""

import math

import numpy
import pytest
from scipy.stats import t

from srft.errors import UserError
from srft.study.comparison import BETTER, UNPAIRED, UNSURE, WORSE, Comparison, compare
from tests.srft.study.records import a_record, a_set, a_step

PROMPTS = 12


def runs(method: str, *of_seeds: list[list[float]], on: str = "here", **train) -> list[dict]:
    return [a_record(method, seed, [a_set("sums", rewards, on=on)], **train) for seed, rewards in enumerate(of_seeds)]


def cells(records: list[dict], against: str = "") -> dict:
    found = compare(records, against)
    return found.outcome.cells(found.against)


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
    cells_of = found.outcome.cells("srft")
    assert found.outcome.score == "avg@2" and found.outcome.prompts == PROMPTS
    assert cells_of["srft"].score.mean == pytest.approx(15 / 36) and cells_of["srft"].verdict == ""
    assert [cells_of[name].verdict for name in ("good", "bad", "alike")] == [BETTER, WORSE, UNSURE]
    assert cells_of["good"].difference.mean == pytest.approx(34 / 36 - 15 / 36)
    assert cells(records, "good")["srft"].verdict == WORSE


def test_differences_are_paired_by_seed_and_prompt():
    """Seeds and prompts that are all over the place, and a method that is a little better on each of them."""
    levels = numpy.random.default_rng(0).uniform(0, 0.9, (3, PROMPTS)).tolist()
    base = [[[level, level] for level in of_seed] for of_seed in levels]
    more = [[[level + 0.05, level + 0.05] for level in of_seed] for of_seed in levels]
    noise = numpy.random.default_rng(1).normal(0, 0.02, (3, PROMPTS))
    more = [[[a + e, a + e] for a, e in zip(*of_seed)] for of_seed in zip([[r[0] for r in row] for row in more], noise)]
    assert cells([*runs("srft", *base), *runs("more", *reversed(more))])["more"].verdict == UNSURE  # other seeds
    found = cells([*runs("srft", *base), *runs("more", *more)])["more"]
    assert found.verdict == BETTER and found.difference.mean == pytest.approx(0.05, abs=0.02)


def test_one_seed_borrows_the_spread_of_others_and_alone_cannot_tell():
    several = [*runs("srft", right(4), right(5), right(6)), *runs("other", right(6), right(5), right(7))]
    one = runs("one", right(11))
    assert cells([*several, *one])["one"].verdict == BETTER
    found = cells([*runs("srft", right(4)), *one])["one"]
    assert found.verdict == UNPAIRED and found.difference.mean > 0
    # differences of seeds: other − srft = 2, 0, 1 of 12 prompts; of `one` 7 more prompts are right
    found = cells([*several, *one])["one"].difference
    by_seeds, by_prompts = (1 / 12) ** 2, (7 / 12 * 5 / 12) / 11
    freedom = (by_seeds + by_prompts) ** 2 / (by_seeds**2 / 2 + by_prompts**2 / 11)
    half = t.ppf(0.975, freedom) * math.sqrt(by_seeds + by_prompts)
    assert found.interval == pytest.approx((7 / 12 - half, 7 / 12 + half))


def test_seeds_that_only_one_method_has_are_left_out_of_the_difference():
    found = cells([*runs("srft", right(4), right(5)), *runs("more", right(6), right(6), right(12))])["more"]
    assert found.score.mean == pytest.approx(24 / 36) and found.seeds == 3
    assert found.difference.mean == pytest.approx(3 / 24) and found.paired == 2
    apart = [{**runs("more", right(6))[0], "seed": 7}]
    found = compare([*runs("srft", right(4)), *apart])
    assert found.outcome.cells("srft")["more"].difference is None
    assert found.remarks == ["more: no seed in common with srft."]


def test_the_base_is_paired_with_every_seed():
    base = {**runs("base", right(1))[0], "steps": [], "curve": []}
    records = [base, *runs("srft", right(4), right(5), right(6)), *runs("one", right(9))]
    found = cells(records, "srft")["base"]
    assert found.verdict == WORSE and found.difference.mean == pytest.approx(1 / 12 - 15 / 36)
    back = cells(records, "base")["srft"]
    assert back.difference.mean == pytest.approx(-found.difference.mean) and back.paired == 3
    # how seeds differ is not told by a method that has none
    assert cells(records, "srft")["one"].verdict == UNPAIRED


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
        ("others: prompts of 2 sets", "avg"),
    ]  # fmt: skip
    scores = {each: [column.cells("srft")[each].score.mean for column in found.columns] for each in ("srft", "grpo")}
    assert scores["srft"] == pytest.approx([0.25, 0.5, 1, 0, 1, 2 / 5])  # the prompts of a group count alike
    assert scores["grpo"] == pytest.approx([0.5, 5 / 6, 1, 1, 1, 1])


def test_what_was_measured_in_another_way_is_no_cell():
    found = compare([*runs("srft", right(4)), *runs("other", right(6), on="elsewhere")])
    assert set(found.outcome.cells("srft")) == {"srft"} and [each.name for each in found.ordered] == ["srft", "other"]
    assert found.remarks == ["other: not measured on sums as srft was."]
    part = [*runs("srft", right(4)), runs("srft", right(4), right(4), on="elsewhere")[1]]
    with pytest.raises(UserError, match="no scores of completions to compare"):
        compare(part)


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
        ([a_record("srft", 0, [])], "", "no run: no scores of completions to compare"),
        ([*runs("a", right(4)), a_record("b", 0, [])], "b", "b: no scores of completions to compare"),
    ],
)
def test_what_cannot_be_compared_is_refused(records, against, message):
    with pytest.raises(UserError, match=message):
        compare(records, against)


def of(found: Comparison, x: str, y: str) -> list[tuple[float, float]]:
    return found.curve(found.methods["srft"], x, y)


def test_budgets_and_curves():
    records = runs("srft", right(4), right(5), updates_per_rollout=2)
    found = compare(records)
    assert found.methods["srft"].budget == {"updates": 4, "trained": 120, "generated": 50, "seconds": 6}
    assert of(found, "updates", "reward") == [(0, 0), (4, 0.75)]
    assert of(found, "trained", "reward") == [(0, 0), (120, 0.75)]
    assert of(found, "seconds", "reward_mean") == [(3, 0), (6, pytest.approx(0.1))]
    assert of(found, "generated", "demo_share") == [(25, 0.75), (50, 0.75)]
    assert of(found, "updates", "rollout_entropy") == []
    records[1]["steps"].append(a_step(3, reward_mean=1.0, updates=1))
    found = compare(records)
    assert [x for x, _ in of(found, "updates", "reward_mean")] == [2, 4]
    assert found.methods["srft"].budget["updates"] == 4.5


def test_what_steps_do_not_say_is_not_known():
    records = runs("srft", right(4))
    for step in records[0]["steps"]:
        del step["generated_tokens"]
    found = compare(records)
    assert math.isnan(found.methods["srft"].budget["generated"]) and found.methods["srft"].budget["trained"] == 60
    assert of(found, "generated", "reward_mean") == []


def test_held_out_rewards_that_were_measured_in_another_way_are_not_drawn():
    records = [*runs("srft", right(4)), *runs("other", right(4))]
    records[1]["curve"][1]["on"] = "elsewhere"
    found = compare(records)
    assert len(of(found, "updates", "reward")) == 2
    assert len(found.curve(found.methods["other"], "updates", "reward")) == 1


def test_prompts_that_are_missing_from_one_record_are_not_taken_for_others():
    with pytest.raises(UserError, match=r"sums: records have 11 and 12 prompts of it"):
        compare([*runs("srft", right(4)), *runs("other", right(4)[1:])])
    with pytest.raises(UserError, match=r"sums: none of its prompts was scored in all runs"):
        compare([*runs("srft", right(4)), *runs("other", [[None, None]] * PROMPTS)])


def test_other_train_prompts_files_and_types_are_told():
    records = [*runs("srft", right(4), right(5)), *runs("seeds", right(4), right(5)), *runs("files", right(4))]
    records[3]["settings"]["data"]["seed"] = 0
    records[0]["origin"]["files"], records[4]["origin"]["files"] = "abc", "def"
    records[0]["origin"]["dtype"], records[4]["origin"]["dtype"] = "float32", "bfloat16"
    assert compare(records).remarks == [
        "seeds: with the same train.seed it had other train prompts than srft (data.seed).",
        "files: its runs differ from those of srft in the type of the model.",
        "files: its runs differ from those of srft in what was in their data files.",
    ]
    records[1]["origin"]["files"] = "abd"
    with pytest.raises(UserError, match="srft: its runs differ in what was in their data files: abc and abd"):
        compare(records)
    del records[1]["origin"]["files"]  # of an earlier version
    records[0]["origin"]["dtype"], records[1]["origin"]["dtype"] = "float32", "bfloat16"
    with pytest.raises(UserError, match="srft: its runs differ in the type of the model: float32 and bfloat16"):
        compare(records)


def test_what_was_not_scored_is_left_out_of_all():
    """A prompt that one run could not score counts in none; of one that was scored in part the rest does."""
    one, another = [[1.0, 0.0], [None, None], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0], [None, 1.0]]
    found = compare([*runs("srft", one), *runs("other", another)])
    scores = {name: cell.score.mean for name, cell in found.outcome.cells("srft").items()}
    assert scores == {"srft": 0.75, "other": 0.5} and found.outcome.prompts == 2


def test_runs_of_one_method_may_differ_in_what_changes_no_number():
    records = runs("srft", right(4), right(5))
    records[1]["settings"]["run"]["checkpoint_every"] = 7
    records[1]["settings"]["rollout"]["batch_size"] = 7
    records[1]["settings"]["eval"]["sets"] = ["others"]
    assert compare(records).outcome.cells("srft")["srft"].seeds == 2
