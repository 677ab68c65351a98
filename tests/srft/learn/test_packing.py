import pytest
import torch

from srft.learn.packing import Bin, Sequence, bins_by_prompt, pack, split_by_budget, token_weights
from srft.model import Rows, Segment

PADDED, PACKED, SHARED = Rows(), Rows(packed=True), Rows(packed=True, shared=True)


def sequences(*shapes: tuple[int, int, bool]) -> list[Sequence]:
    """(prompt length, completion length, is_demo) each; every token id occurs once."""
    ids = iter(range(1, 10_000))
    return [
        Sequence(
            [next(ids) for _ in range(p)], [next(ids) for _ in range(c)], demo, reward=float(i), advantage=-float(i)
        )
        for i, (p, c, demo) in enumerate(shapes)
    ]


MIXED = ((3, 2, False), (1, 5, True), (4, 1, False), (2, 7, False), (6, 3, True))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_groups_hold_every_bin_once_within_the_budget(budget, padded):
    lengths = [3, 9, 1, 1, 7, 5, 5, 8]
    groups = split_by_budget([Bin([i], length, length) for i, length in enumerate(lengths)], budget, padded)
    assert sorted(i for group in groups for each in group for i in each.members) == list(range(len(lengths)))
    for group in groups:
        tokens = [each.tokens for each in group]
        assert (len(group) * max(tokens) if padded else sum(tokens)) <= budget or len(group) == 1
    if budget == 16:  # 9 + 7, 8 + 5 + 3, 5 + 1 + 1; 9, 8 + 7, 5 + 5 + 3, 1 + 1
        assert len(groups) == (4 if padded else 3)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("budget", [1, 9, 1000])
@pytest.mark.parametrize("rows", [PADDED, PACKED, SHARED])
def test_ranks_share_the_tokens_and_make_equally_many_microbatches(ranks, budget, rows):
    options = {"token_budget": budget, "rows": rows}
    (whole,) = pack(sequences(*MIXED), token_budget=1000)
    parts = [pack(sequences(*MIXED), **options, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert sum(any(len(m.target) for m in part) for part in parts) == min(ranks, len(MIXED))
    found = {}
    for m in (m for part in parts for m in part):
        assert m.input_ids.numel() <= budget or (len(m.segments.of) if m.segments else len(m.input_ids)) == 1
        for i, row in enumerate(m.step_index.tolist()):
            assert row not in found
            found[row] = m.target[i], {name: values[i] for name, values in m.annotations.items()}
    assert sorted(found) == list(range(len(whole.target)))
    for i, row in enumerate(whole.step_index.tolist()):
        assert found[row] == (whole.target[i], {name: values[i] for name, values in whole.annotations.items()})
    assert pack([], **options, rank=1, ranks=ranks) == []


def test_a_sequence_longer_than_the_budget_is_alone():
    bins = [Bin([i], length, length) for i, length in enumerate([2, 10, 2])]
    assert split_by_budget(bins, 4, padded=False) == split_by_budget(bins, 4, padded=True) == [[bins[1]], bins[::2]]


@pytest.mark.parametrize("rows", [PADDED, PACKED])
@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_every_completion_token_is_predicted_from_the_position_before_it(budget, rows):
    everything = sequences(*MIXED)
    seen, tokens = {}, 0
    for m in pack(everything, token_budget=budget, pad_id=0, rows=rows):
        for row, at, target in zip(m.hidden_index.tolist(), m.step_index.tolist(), m.target.tolist()):
            assert m.input_ids.flatten()[row] == target - 1  # ids count upwards through each prompt and completion
            seen[at] = target
        tokens += int((m.input_ids != 0).sum())
        assert not rows.packed or (m.input_ids != 0).all()
    assert tokens == sum(len(s.prompt) + len(s.completion) - 1 for s in everything)
    assert [seen[i] for i in range(len(seen))] == [token for s in everything for token in s.completion]


def test_annotations_belong_to_their_tokens():
    everything = sequences(*MIXED)
    for m in pack(everything, token_budget=14):
        for i, target in enumerate(m.target.tolist()):
            number = next(n for n, s in enumerate(everything) if target in s.completion)
            row = {name: values[i].item() for name, values in m.annotations.items()}
            assert row["sequence_ids"] == number
            assert row["rewards"] == everything[number].reward
            assert row["advantages"] == everything[number].advantage
            assert row["is_demo"] == everything[number].is_demo


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_weights_do_not_depend_on_the_cut(average):
    def weights(budget):
        parts = pack(sequences(*MIXED), token_budget=budget, average=average, max_length=9)
        return dict(
            zip(
                torch.cat([m.step_index for m in parts]).tolist(),
                torch.cat([m.annotations["token_weight"] for m in parts]),
            )
        )

    assert weights(1) == weights(13) == weights(1000)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_each_part_is_an_average_of_its_own(average):
    is_demo = torch.tensor([True] * 3 + [False] * 5)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    weights = token_weights(is_demo, ids, average, 1)
    assert weights[is_demo].sum() == pytest.approx(1) and weights[~is_demo].sum() == pytest.approx(1)
    if average == "sequence":
        assert weights[3:6].sum() == pytest.approx(weights[6:].sum())


def test_constant_average_divides_by_sequences_and_the_length_limit():
    is_demo = torch.tensor([False] * 5)
    weights = token_weights(is_demo, torch.tensor([0, 0, 0, 1, 1]), "constant", 10)
    assert weights.tolist() == pytest.approx([1 / 20] * 5)


@pytest.mark.parametrize("demo", [True, False])
def test_one_kind_alone(demo):
    (m,) = pack(sequences((2, 3, demo), (2, 1, demo)), token_budget=100)
    assert m.annotations["token_weight"].tolist() == pytest.approx([1 / 4] * 4)


def test_completions_share_a_row_of_their_prompt():
    prompt, other = [1, 2, 3], [4, 5]
    mixed = [Sequence(prompt, [6, 7]), Sequence(other, [8]), Sequence(prompt, [9, 10, 11]), Sequence(prompt, [12])]
    assert bins_by_prompt(mixed, SHARED, 100) == [Bin([0, 2, 3], 6, 5), Bin([1], 2, 2)]
    (m,) = pack(mixed, token_budget=100, rows=SHARED)
    assert m.input_ids.tolist() == [[1, 2, 3, 6, 9, 10, 4, 5]]
    assert m.segments.of == [Segment(0, 3), Segment(3, 4, (0, 3)), Segment(4, 6, (0, 3)), Segment(6, 8)]
    assert m.target.tolist() == [6, 7, 9, 10, 11, 12, 8]
    assert m.hidden_index.tolist() == [2, 3, 2, 4, 5, 2, 7]
    assert m.step_index.tolist() == [0, 1, 3, 4, 5, 6, 2]


def test_a_group_longer_than_the_budget_becomes_several_bins():
    group = [Sequence([1, 2, 3], [4] * n) for n in (4, 3, 5, 1, 9)]
    for budget in (1, 6, 8, 12, 100):
        bins = bins_by_prompt(group, SHARED, budget)
        assert [i for each in bins for i in each.members] == list(range(5))
        for each in bins:
            assert each.tokens == 3 + sum(len(group[i].completion) - 1 for i in each.members)
            assert each.tokens <= budget or len(each.members) == 1
    assert len(bins) == 1


def test_where_prompts_are_not_shared_each_sequence_has_its_own():
    group = [Sequence([1, 2, 3], [4] * n) for n in (4, 3)]
    (m,) = pack(group, token_budget=100, rows=PACKED)
    assert m.segments.of == [Segment(0, 6), Segment(6, 11)]
    (m,) = pack(group, token_budget=100, rows=PADDED)
    assert m.segments is None and m.input_ids.tolist() == [[1, 2, 3, 4, 4, 4], [1, 2, 3, 4, 4, 0]]


def test_a_bin_may_be_as_long_as_the_budget():
    group = [Sequence([1, 2, 3], [4] * 4), Sequence([1, 2, 3], [4] * 3)]
    assert len(bins_by_prompt(group, SHARED, 8)) == 1 and len(bins_by_prompt(group, SHARED, 7)) == 2


def test_few_share_a_prompt_that_is_long_beside_what_they_write():
    """The prompt's keys, once for each, may not outweigh all else."""
    (one, *others) = bins_by_prompt([Sequence([1] * 1000, [2, 3])] * 40, SHARED, 10_000)
    assert 12 <= len(one.members) <= 18 and len(others) == 2
    assert len(bins_by_prompt([Sequence([1] * 30, [2] * 40)] * 64, SHARED, 10_000)) == 1


def test_completions_of_one_prompt_are_for_all_ranks():
    group = [Sequence([1, 2, 3], [4] * 20)] * 16
    parts = [pack(group, token_budget=10_000, rows=SHARED, rank=rank, ranks=4) for rank in range(4)]
    targets = [sum(len(m.target) for m in part) for part in parts]
    assert sum(targets) == 320 and max(targets) <= 2 * min(targets)


@pytest.mark.parametrize("packed", [True, False])
def test_sequences_of_other_frequencies_never_meet(packed):
    group = [Sequence([1, 2], [3] * n) for n in (2, 30, 15, 40)]  # 16 tokens of the third reach the backbone
    parts = pack(group, token_budget=1000, rows=Rows(packed, packed, apart=16))
    assert [m.annotations["sequence_ids"].unique().tolist() for m in parts] == [[0, 2], [1, 3]]


def test_nothing_packs_to_nothing():
    assert pack([], token_budget=10) == []
