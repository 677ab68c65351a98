import pytest
import torch

import srft_kernels as sk
from srft.errors import UserError
from srft.model import LoadedModel, head_of, hidden_states
from srft.rollout import build_engine
from srft.rollout.transformers_engine import TransformersEngine
from tests.srft.conftest import byte_tokenizer, tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18]]
SETTINGS = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 3, "batch_size": 8}


def loaded(model, eos_ids: set[int]) -> LoadedModel:
    return LoadedModel(model.train(), byte_tokenizer(), torch.device("cpu"), torch.float32, eos_ids, 0)


def sliding_model():
    """Gemma 2: soft caps, and layers whose window is shorter than the sequences here."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=6,
            final_logit_softcapping=5.0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def absolute_model():
    """GPT-2: learned absolute positions, which a padded row must count from its own start."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**settings, eos_token_id=0, pad_token_id=0, bos_token_id=0))


@pytest.mark.parametrize("make", [tiny_model, sliding_model, absolute_model])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_padding_and_shared_prefill_leave_the_distribution_alone(make, batch_size):
    """The log-probs that the training path computes are those that generate sampled from, token by token."""
    model = make()
    engine = TransformersEngine(loaded(model, {0, 1, 2, 3}))
    seen: list[torch.Tensor] = []  # logits (rows, V) of every decoding step, in the order of the batches

    def watch(module, inputs, output):
        if output.logits.shape[1] == 1:
            seen.append(output.logits[:, -1])

    batches: list[tuple[list[int], list[list[int]], list[torch.Tensor]]] = []
    original = engine._batch

    def record(prompts, owners, *settings):
        seen.clear()
        tokens = original(prompts, owners, *settings)
        steps = seen[-len(tokens[0]) :]  # before them: the shared prefill
        batches.append((owners, tokens, [s.clone() for s in steps]))
        return tokens

    engine._batch = record
    handle = model.register_forward_hook(watch)
    groups = engine.generate(PROMPTS, 3, **SETTINGS | {"batch_size": batch_size})
    handle.remove()
    assert [len(group) for group in groups] == [3] * len(PROMPTS)

    model.eval()
    head = head_of(model)
    compared = 0
    for owners, rows, steps in batches:
        for r, (owner, row) in enumerate(zip(owners, rows)):
            tokens = engine._rollout(row).tokens
            ids = torch.tensor([PROMPTS[owner] + tokens])
            with torch.no_grad():
                hidden = hidden_states(model, ids)[0, len(PROMPTS[owner]) - 1 : -1]
                ours = sk.linear_logprobs(hidden, target=torch.tensor(tokens), **head).logprobs
            theirs = torch.stack([steps[t][r].log_softmax(-1)[token] for t, token in enumerate(tokens)])
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
            compared += len(tokens)
    assert compared > 50


def test_end_of_sequence_is_kept_and_ends_the_completion():
    engine = TransformersEngine(loaded(tiny_model(), set(range(0, 258, 4))))
    rollouts = [r for group in engine.generate(PROMPTS, 8, **SETTINGS) for r in group]
    assert any(r.finished for r in rollouts) and any(len(r.tokens) > 1 for r in rollouts)
    for r in rollouts:
        ends = [i for i, token in enumerate(r.tokens) if token in engine.eos_ids]
        assert ends == ([len(r.tokens) - 1] if r.finished else [])
        assert r.finished or len(r.tokens) == SETTINGS["max_new_tokens"]


def test_without_end_of_sequence_every_rollout_is_cut():
    engine = TransformersEngine(loaded(tiny_model(), set()))
    for group in engine.generate(PROMPTS, 2, **SETTINGS):
        assert all(len(r.tokens) == 12 and not r.finished for r in group)


def test_seeded_and_the_global_random_state_is_left_alone():
    engine = TransformersEngine(loaded(tiny_model(), {0}))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = engine.generate(PROMPTS, 4, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert engine.generate(PROMPTS, 4, **SETTINGS) == first
    assert engine.generate(PROMPTS, 4, **SETTINGS | {"seed": 4}) != first


def test_a_completion_does_not_depend_on_what_it_is_generated_with():
    together = TransformersEngine(loaded(tiny_model(), {0, 1, 2, 3})).generate(
        PROMPTS, 3, **SETTINGS | {"batch_size": 64}
    )
    assert (
        TransformersEngine(loaded(tiny_model(), {0, 1, 2, 3})).generate(PROMPTS, 3, **SETTINGS | {"batch_size": 2})
        == together
    )
    engine = TransformersEngine(loaded(tiny_model(), {0, 1, 2, 3}))
    five = SETTINGS | {"batch_size": 5}
    assert engine.generate(PROMPTS[1::2], 3, **five, numbers=[1, 3]) == together[1::2]
    assert engine.generate(PROMPTS, 2, **five) == [group[:2] for group in together]
    twice = engine.generate([PROMPTS[0], PROMPTS[0]], 3, **five)  # one prompt, drawn twice: other samples
    assert twice[0] == together[0] != twice[1]


def test_the_models_own_generation_settings_do_not_reach_the_samples():
    plain = TransformersEngine(loaded(tiny_model(), {0})).generate(PROMPTS, 4, **SETTINGS)
    model = tiny_model()
    settings = {"repetition_penalty": 5.0, "top_k": 1, "min_p": 0.9, "suppress_tokens": list(range(50, 200))}
    model.generation_config.update(**settings)
    assert TransformersEngine(loaded(model, {0})).generate(PROMPTS, 4, **SETTINGS) == plain
    assert model.generation_config.top_k == 1 and model.training  # both are put back


def test_more_than_the_fifty_likeliest_tokens_can_be_sampled():
    groups = TransformersEngine(loaded(tiny_model(), set())).generate(
        [[5, 6]], 128, max_new_tokens=1, temperature=1.0, top_p=1.0, seed=0, batch_size=64
    )
    assert len({r.tokens[0] for r in groups[0]}) > 60


def test_temperature_zero_is_greedy():
    engine = TransformersEngine(loaded(tiny_model(), {0}))
    for group in engine.generate(PROMPTS, 3, **SETTINGS | {"temperature": 0.0, "batch_size": 3}):
        assert group[0] == group[1] == group[2]


def test_sampled_frequencies_follow_the_temperature_and_the_nucleus():
    model = tiny_model(vocab_size=8)
    engine = TransformersEngine(loaded(model, set()))
    model.get_output_embeddings().weight.data.mul_(20)
    with torch.no_grad():
        probabilities = (model(torch.tensor([[5, 6]])).logits[0, -1] / 0.7).softmax(-1)
    for top_p in (1.0, 0.6):
        ordered, order = probabilities.sort(descending=True)
        keep = ordered.cumsum(0) - ordered < top_p
        expected = torch.zeros(8).index_copy(0, order, ordered * keep)
        (group,) = engine.generate(
            [[5, 6]], 4000, max_new_tokens=1, temperature=0.7, top_p=top_p, seed=0, batch_size=4000
        )
        counts = torch.bincount(torch.tensor([r.tokens[0] for r in group]), minlength=8) / 4000
        torch.testing.assert_close(counts, expected / expected.sum(), atol=0.04, rtol=0)


def test_unknown_engine_is_named():
    with pytest.raises(UserError, match=r"rollout\.engine.*'magic'"):
        build_engine("magic", None)


def test_a_cache_that_rows_cannot_share_is_not_shared():
    """LFM2's layers keep the last inputs of a convolution: no prompt is computed ahead, and the samples are right."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0}
    model = Lfm2ForCausalLM(Lfm2Config(**settings, layer_types=["conv", "full_attention"]))
    engine = TransformersEngine(loaded(model, {0}))
    together = engine.generate(PROMPTS, 3, **SETTINGS)
    assert together == engine.generate(PROMPTS, 3, **SETTINGS | {"batch_size": 1})
    ids = torch.tensor([PROMPTS[0]] * 2)
    assert engine._prefill(ids, torch.ones_like(ids), torch.tensor([0, 1])) is None


def test_a_cache_that_the_model_does_not_take_is_not_shared():
    from transformers import LlamaForCausalLM

    class Own(LlamaForCausalLM):
        def forward(self, *arguments, cache=None, past_key_values=None, **named):
            return super().forward(*arguments, **named)

    engine = TransformersEngine(loaded(Own(tiny_model().config), {0}))
    ids = torch.tensor([PROMPTS[0]] * 2)
    assert engine._prefill(ids, torch.ones_like(ids), torch.tensor([0, 1])) is None


def recurrent_models():
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RwkvConfig, RwkvForCausalLM

    size = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    gemma = {"num_hidden_layers": 3, "num_attention_heads": 2, "lru_width": 32}
    yield RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**size, **gemma))
    yield RwkvForCausalLM(RwkvConfig(**size, num_hidden_layers=2, attention_hidden_size=32))


@pytest.mark.parametrize("number", [0, 1])
def test_models_whose_padding_or_cache_does_not_hold_generate_what_they_do_alone(number):
    """RWKV and RecurrentGemma do not mask padding, and RWKV's cache holds for one row alone."""
    model = list(recurrent_models())[number]
    engine = TransformersEngine(loaded(model, {0}))
    assert not engine.masks_padding and engine.cache_holds == (number == 0)
    prompts = [*PROMPTS, [30, 31]]
    together = engine.generate(prompts, 2, **SETTINGS | {"temperature": 0.0, "max_new_tokens": 8})
    model.eval()
    for prompt, rows in zip(prompts, together):
        ids = torch.tensor([prompt])
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert [row.tokens for row in rows] == [ids[0, len(prompt) :].tolist()] * 2
    ours = TransformersEngine(loaded(tiny_model(), {0}))
    assert ours.masks_padding and ours.cache_holds
