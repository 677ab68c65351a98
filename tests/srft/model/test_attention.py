import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from srft.learn.packing import Sequence, pack, predictors
from srft.model import Rows, Segment, Segments, hidden_states
from srft.model.attention import LONG, NAME, ROWS, arguments, packed_attention, use_packed_attention, varlen
from tests.srft.conftest import tiny_model

# Lengths of prompts, and of what shares each: small ones under one mask, longer ones under several, or under none
GROUPS = {
    "small": [(3, [4, 1, 2]), (1, [1]), (5, [])],
    "large": [(20, [ROWS + 30, 5]), (ROWS + 9, [7, ROWS + 1]), (2 * ROWS + 3, [])],
    "mixed": [(ROWS - 1, [1, 1, 1]), (ROWS, []), (1, [ROWS]), (LONG, [LONG]), (700, [3, 300])],
    "long": [(LONG + 1, [9, LONG - 1]), (5, [LONG + ROWS + 1, 2]), (LONG + 5, [LONG + 3])],
    "alone": [(11, [])],
}


MODULE, READY = torch.nn.Module(), torch.ones(1, 1, 1, 1, dtype=torch.bool)


def row_of(groups) -> Segments:
    segments, at = [], 0
    for prompt, others in groups:
        span = at, at + prompt
        segments.append(Segment(*span))
        at += prompt
        for own in others:
            segments.append(Segment(at, at + own, span))
            at += own
    return Segments(segments)


def states(segments: Segments, heads=4, key_heads=2, width=8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, segments.of[-1].end, width) for n in (heads, key_heads, key_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def alone(query, key, value, segments: Segments, window: int | None) -> torch.Tensor:
    """Each segment behind a prompt of its own, by the definition."""
    parts = []
    for each in segments.of:
        at = torch.tensor([*range(*each.prompt), *range(each.start, each.end)])
        q, k, v = query[:, :, each.start : each.end], key[:, :, at], value[:, :, at]
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (k, v))
        ahead = torch.arange(len(at)) - torch.arange(each.before, len(at))[:, None]
        seen = (ahead <= 0) & (ahead > -(window or math.inf))
        scores = (q @ k.mT * 0.3).masked_fill(~seen, -math.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 6, ROWS - 1, 400, LONG + 9])
@pytest.mark.parametrize("groups", GROUPS)
def test_outputs_and_gradients_are_those_of_sequences_alone(groups, window):
    segments = row_of(GROUPS[groups])
    given = states(segments)
    found, _ = packed_attention(MODULE, *given, READY, scaling=0.3, sliding_window=window, segments=segments)
    assert found.is_contiguous()
    expected = alone(*given, segments, window)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((each * weight).sum(), given) for each in (found, expected)]
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    for ours, theirs in zip(*gradients):
        assert (ours - theirs).norm() <= 1e-12 * (1 + theirs.norm())


def test_positions_continue_those_of_the_prompt():
    segments = row_of([(2, [1, 2]), (3, [])])
    assert segments.owners.tolist() == [
        [0, 0, 2, 3, 3, 5, 5, 5],
        [-1, -1, 0, 0, 0, -1, -1, -1],
        [0, 1, 2, 2, 3, 0, 1, 2],
    ]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("window", [None, 6])
def test_the_gpus_attention_is_given_the_same(monkeypatch, window, grouped):
    """torch's varlen_attn has no CPU kernel: what it is called with is computed here as its documentation says."""
    from srft.model import attention

    def varlen_attn(query, key, value, ends, key_ends, most, most_keys, *, scale, window_size, enable_gqa=None):
        assert enable_gqa == (True if grouped else None) and window_size[1] == 0
        parts = []
        for a, b, c, d in zip(ends, ends[1:], key_ends, key_ends[1:]):
            q, k, v = (x[i:j].transpose(0, 1)[None] for x, i, j in ((query, a, b), (key, c, d), (value, c, d)))
            assert q.shape[2] <= most and k.shape[2] <= most_keys
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            ahead = torch.arange(k.shape[2]) - torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]  # lower right
            seen = (ahead <= 0) & (ahead >= (-window_size[0] if window_size[0] >= 0 else -math.inf))
            parts.append((q @ k.mT * scale).masked_fill(~seen, -math.inf).softmax(-1) @ v)
        return torch.cat(parts, 2)[0].transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attention", lambda: (varlen_attn, grouped))
    for groups in GROUPS.values():
        segments = row_of(groups)
        given = states(segments)
        found, expected = varlen(*given, segments, window, 0.3), alone(*given, segments, window)
        assert (found - expected).norm() <= 1e-12 * expected.norm()


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                self.most = max(self.most, each.untyped_storage().nbytes() // each.element_size())
        return out


@pytest.mark.parametrize("window", [None, 1024])
@pytest.mark.parametrize("rows", [Rows(), Rows(packed=True), Rows(packed=True, shared=True)])
def test_nothing_of_the_square_of_a_length_is_made(rows, window):
    """8,192 tokens of one sequence, then a prompt that two completions of 4,096 share, and values smaller than keys."""
    from transformers import MistralConfig, MistralForCausalLM

    if window and not rows.packed:
        pytest.skip("the masks of windows are transformers' own there")
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=window, max_position_embeddings=8192,
        )
    )  # fmt: skip
    use_packed_attention(model)
    sequences = [Sequence([1] * 8000, [2] * 193), *(Sequence([3] * 4000, [4] * 4097) for _ in range(2))]
    with Largest() as largest:
        parts = pack(sequences, token_budget=12300, rows=rows)
        for m in parts:
            predictors(model, m).sum().backward()
        if rows.packed:
            assert any(m.segments.shared for m in parts) == rows.shared
            row = Segments([Segment(0, 8192)])
            query, value = torch.randn(1, 2, 8192, 24, requires_grad=True), torch.randn(1, 2, 8192, 16)
            packed_attention(MODULE, query, query, value, READY, sliding_window=window, segments=row)[
                0
            ].sum().backward()
    assert 8192 * 16 <= largest.most <= 16 * 8192 * 16  # 33 MB of masks and scores would be 67,108,864


def test_a_packed_row_without_its_segments_is_refused():
    query = torch.zeros(1, 1, 3, 4)
    with pytest.raises(NotImplementedError, match="does not tell its attention the segments"):
        packed_attention(torch.nn.Module(), query, query, query, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="fewer queries than keys, and no mask to say which"):
        packed_attention(torch.nn.Module(), query[:, :, :2], query, query, None)
    row = row_of([(3, [])])
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match=f"its attention has {name}"):
            packed_attention(MODULE, query, query, query, READY, segments=row, **{name: 30.0})
    for mask in (None, torch.ones(1, 1, 3, 3, dtype=torch.bool), torch.zeros(1, 1, 1, 1)):
        with pytest.raises(NotImplementedError, match="makes a mask of its own"):
            packed_attention(MODULE, query, query, query, mask, segments=row)


def test_masks_are_for_few_tokens_or_for_some_behind_more():
    """A long one without a mask has its prompt's queries computed once more."""
    few, long = Segment(0, LONG), Segment(0, LONG + 1)
    assert not few.long and long.long and Segment(9, LONG + 10, (0, 9)).long
    assert not Segment(5000, 5000 + LONG + 1, (0, 5000)).long and Segment(5000, 5000 + 4 * LONG + 1, (0, 5000)).long


@pytest.mark.parametrize("size", [5, 11])
def test_values_may_be_of_another_size_than_keys(size):
    segments = row_of(GROUPS["large"])
    query, key, value = states(segments)
    value = states(segments, width=size)[2]
    found, _ = packed_attention(MODULE, query, key, value, READY, scaling=0.3, segments=segments)
    expected = alone(query, key, value, segments, None)
    assert found.shape == expected.shape and (found - expected).norm() <= 1e-12 * expected.norm()
    default, _ = packed_attention(MODULE, query, key, value, READY, segments=segments)
    again, _ = packed_attention(MODULE, query, key, value, READY, scaling=8**-0.5, segments=segments)
    assert torch.equal(default, again)


@pytest.mark.parametrize(("dropout", "count", "gpus"), [(0.0, 2, True), (0.1, 2, False), (0.0, 1, False)])
def test_when_a_gpu_takes_its_own(monkeypatch, dropout, count, gpus):
    """Not for dropout, which it has none of, nor for one sequence."""
    from srft.model import attention

    monkeypatch.setattr(attention, "varlen_takes", lambda *_: True)
    monkeypatch.setattr(attention, "varlen", lambda *_: "varlen")
    segments = row_of([(3, [])] * count)
    found, _ = packed_attention(MODULE, *states(segments), READY, dropout=dropout, segments=segments)
    assert (isinstance(found, str)) == gpus


def test_a_gpu_is_told_of_a_row_once():
    segments = row_of(GROUPS["small"])
    assert segments.flash_arguments(torch.device("cpu")) is segments.flash_arguments(torch.device("cpu"))
    assert row_of(GROUPS["small"]).flash_arguments(torch.device("cpu")) is not segments.flash_arguments(
        torch.device("cpu")
    )


def test_what_a_model_is_called_with_is_told_from_a_mask():
    model = tiny_model()
    use_packed_attention(model)
    given = arguments(model, row_of([(2, [1])]))
    assert given["position_ids"].tolist() == [[0, 1, 2]] and torch.equal(given["attention_mask"], READY)


def test_elsewhere_it_is_transformers_own(tmp_path):
    """Padding and caches of generation, logits of the whole model; and nothing of it is saved."""
    model, plain = tiny_model().eval(), tiny_model(attn_implementation="sdpa").eval()
    use_packed_attention(model)
    assert model.config._attn_implementation == NAME and plain.config._attn_implementation == "sdpa"
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    for call in (
        lambda m: m(input_ids=ids, attention_mask=mask).logits,
        lambda m: m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False),
        lambda m: m.generate(ids[1:, :1], attention_mask=mask[1:, :1], max_new_tokens=3, do_sample=False),
    ):
        assert torch.equal(call(model), call(plain))
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_dropout_of_attention_is_the_models():
    model = tiny_model(attention_dropout=0.5).train()
    use_packed_attention(model)
    ids = torch.arange(1, 9)[None]
    row = Segments([Segment(0, 8)])
    torch.manual_seed(0)
    one, another = hidden_states(model, ids, row), hidden_states(model, ids, row)
    assert not torch.equal(one, another)
    assert torch.equal(hidden_states(model.eval(), ids, row), hidden_states(model, ids, row))
