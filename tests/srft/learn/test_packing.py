import pytest
import torch

from srft.learn.packing import Sequence, bins_by_prompt, pack, pays, split_by_budget, token_weights


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


@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_groups_hold_every_sequence_once_within_the_budget(budget):
    lengths = [3, 9, 1, 1, 7, 5, 5, 8]
    groups = split_by_budget(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) * max(lengths[i] for i in group) <= budget or len(group) == 1


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("budget", [1, 9, 1000])
@pytest.mark.parametrize("share_up_to", [0, 7])
def test_ranks_share_the_tokens_and_make_equally_many_microbatches(ranks, budget, share_up_to):
    options = {"token_budget": budget, "share_up_to": share_up_to}
    (whole,) = pack(sequences(*MIXED), token_budget=1000)
    parts = [pack(sequences(*MIXED), **options, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert sum(any(len(m.target) for m in part) for part in parts) == min(ranks, len(MIXED))
    found = {}
    for m in (m for part in parts for m in part):
        assert m.input_ids.numel() <= budget or len(m.input_ids) == 1
        for i, row in enumerate(m.step_index.tolist()):
            assert row not in found
            found[row] = m.target[i], {name: values[i] for name, values in m.annotations.items()}
    assert sorted(found) == list(range(len(whole.target)))
    for i, row in enumerate(whole.step_index.tolist()):
        assert found[row] == (whole.target[i], {name: values[i] for name, values in whole.annotations.items()})
    assert pack([], **options, rank=1, ranks=ranks) == []


def test_a_sequence_longer_than_the_budget_is_alone():
    assert split_by_budget([10, 2, 2], 4) == [[0], [1, 2]]


@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_every_completion_token_is_predicted_from_the_position_before_it(budget):
    everything = sequences(*MIXED)
    seen = {}
    for m in pack(everything, token_budget=budget, pad_id=0):
        width = m.input_ids.shape[1]
        for row, at, target in zip(m.hidden_index.tolist(), m.step_index.tolist(), m.target.tolist()):
            line, column = divmod(row, width)
            assert m.attention_mask[line, column] == 1
            assert m.input_ids[line, column] == target - 1  # ids count upwards through each prompt and completion
            seen[at] = target
        assert (m.input_ids[m.attention_mask == 0] == 0).all()
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
    assert bins_by_prompt(mixed, 100) == ([[0, 2, 3], [1]], [6, 2])
    (m,) = pack(mixed, token_budget=100, share_up_to=100)
    assert m.input_ids.tolist() == [[1, 2, 3, 6, 9, 10], [4, 5, 0, 0, 0, 0]]
    assert m.position_ids.tolist() == [[0, 1, 2, 3, 3, 4], [0, 1, 0, 0, 0, 0]]
    assert m.target.tolist() == [6, 7, 9, 10, 11, 12, 8]
    assert m.hidden_index.tolist() == [2, 3, 2, 4, 5, 2, 7]
    assert m.step_index.tolist() == [0, 1, 3, 4, 5, 6, 2]
    assert m.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    assert m.attention_mask[1, 0, :2].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]


def test_a_group_longer_than_the_budget_becomes_several_rows():
    group = [Sequence([1, 2, 3], [4] * n) for n in (4, 3, 5, 1, 9)]
    for budget in (1, 6, 8, 12, 100):
        rows, lengths = bins_by_prompt(group, budget)
        assert [i for row in rows for i in row] == list(range(5))
        for row, length in zip(rows, lengths):
            assert length == 3 + sum(len(group[i].completion) - 1 for i in row)
            assert length <= budget or len(row) == 1
    assert rows == [[0, 1, 2, 3, 4]]


def test_without_a_common_prompt_the_model_makes_its_own_mask():
    (m,) = pack(sequences(*MIXED), token_budget=1000, share_up_to=1000)
    assert m.attention_mask.ndim == 2 and m.position_ids is None


def test_rows_beyond_the_limit_never_meet_shared_ones():
    long = Sequence([7, 8], [9] * 30)
    parts = pack([Sequence([1, 2], [3, 4]), long, Sequence([1, 2], [5, 6])], token_budget=1000, share_up_to=16)
    assert [m.attention_mask.ndim for m in parts] == [4, 2]


def test_long_completions_do_not_share_a_short_prompt():
    assert pays(100, 300, 30) and pays(1000, 4000, 500)
    assert not pays(100, 500, 500)


def test_nothing_packs_to_nothing():
    assert pack([], token_budget=10) == []
