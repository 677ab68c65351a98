import itertools
import sys

import pytest
import torch

from srft.learn.packing import pack
from srft.model.attention import use_packed_attention
from srft.model.dropout import without_dropout
from srft.model.load import checkpoint_activations
from srft.model.rows import Rows, rows_of
from tests.srft.conftest import loaded_model, tiny_model
from tests.srft.test_trainer import fresh, gradients, make, some_sequences

SMALL = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}
PACKED = {
    "llama": ("LlamaConfig", {}),
    "llama, untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 6}),
    "phi3": ("Phi3Config", {"sliding_window": 7}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {}),  # learned absolute positions
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, **EXPERTS}),
}
PADDED = {
    "soft cap in attention": ("Gemma2Config", {"head_dim": 8, "sliding_window": 64}),
    "attention of its own": ("FalconConfig", {"new_decoder_architecture": True}),
    "keeps the segments to itself": ("StableLmConfig", {}),
    "alibi, no positions": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "recurrence": ("MambaConfig", {"state_size": 4}),
    "layers of chunks": ("Llama4TextConfig", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32}),
    "recurrent and full layers": (
        "Qwen3NextConfig",
        {
            "head_dim": 8,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 0,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}


def model_of(kind: str, **options):
    import transformers

    name, changes = (PACKED | PADDED)[kind]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**(SMALL | changes)), **options)


def quiet(model):
    """Without dropout, in fp64 where it can be; the experts' product is of fp32 at most."""
    without_dropout(model if hasattr(model.config, "num_experts_per_tok") else model.double())
    return model


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_each_kind_of_model_stands_as_it_can(kind):
    model = model_of(kind)
    use_packed_attention(model)
    assert rows_of(model) == Rows(kind in PACKED, kind in PACKED)


@pytest.mark.parametrize("kind", PACKED)
def test_loss_and_gradient_of_packed_rows_are_those_of_sequences_alone(kind):
    """Their attention alone is transformers' own."""
    sequences = some_sequences(common_prompts=True)
    apart = make(loaded_model(quiet(model_of(kind, attn_implementation="eager"))))
    assert not apart.rows.packed
    loss, expected = gradients(apart, pack(sequences, token_budget=1))
    trainer = make(loaded_model(quiet(model_of(kind))))
    checkpoint_activations(trainer.loaded.model)
    for rows in (trainer.rows, Rows(packed=True)):
        for budget in (30, 10_000):
            parts = pack(sequences, token_budget=budget, rows=rows)
            assert any(len(m.segments.of) > 1 for m in parts)
            other_loss, other = gradients(trainer, parts)
            assert other_loss == pytest.approx(loss, rel=1e-5)
            # Norms and frequencies are fp32 in fp64 models too; the bias of keys has a gradient of 0 but for rounding.
            total = torch.stack([b.norm() for b in expected]).norm()
            assert all((a - b).norm() <= 1e-5 * b.norm() + 1e-7 * total for a, b in zip(other, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_trial_allows_for_rounding_and_leaves_the_model_as_it_was(dtype):
    model = tiny_model().to(dtype).train()
    use_packed_attention(model)
    assert rows_of(model) == Rows(True, True) and model.training


def test_attention_that_does_not_follow_the_segments_is_noticed(monkeypatch):
    from srft.model import attention

    def in_tiles(query, key, value, segments, window, options):
        yield query

    model = tiny_model()
    use_packed_attention(model)
    monkeypatch.setattr(attention, "in_tiles", in_tiles)
    assert rows_of(model) == Rows()


def test_a_window_that_attention_is_not_told_of_is_noticed():
    model = model_of("mistral")
    use_packed_attention(model)
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = None
    model.config = type(model.config)(**(model.config.to_dict() | {"sliding_window": 4096}))
    model.set_attn_implementation("srft")
    assert rows_of(model) == Rows()


def test_sequences_of_other_frequencies_stand_apart():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 1e4}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    import transformers

    config = transformers.Phi3Config(**SMALL, rope_parameters=rope | factors, original_max_position_embeddings=64)
    model = transformers.AutoModelForCausalLM.from_config(config)
    use_packed_attention(model)
    assert rows_of(model).apart == 64


def test_flash_attention_is_told_where_sequences_end():
    """By the arguments that transformers' own has; prompts are not shared there."""
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface

    def flash(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, cu_seq_lens_k=None, **options):
        assert mask is None or (mask.shape[0] == 1 and cu_seq_lens_q is None)
        ends = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        assert cu_seq_lens_k is None or cu_seq_lens_k.tolist() == ends
        parts = [
            scaled_dot_product_attention(
                *(x[:, :, a:b] for x in (query, key, value)), is_causal=True, scale=scaling, enable_gqa=True
            )
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(parts, 2).transpose(1, 2), None

    AttentionInterface.register("flash_of_a_test", flash)
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_of_a_test"  # by its setter transformers looks for a package
    assert rows_of(model) == Rows(packed=True)
    trainer, plain = make(loaded_model(model)), make(fresh())
    loss, expected = gradients(plain, pack(some_sequences(True), token_budget=1))
    other_loss, other = gradients(trainer, pack(some_sequences(True), token_budget=1000, rows=trainer.rows))
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(other, expected))


def test_a_step_is_the_same_packed_shared_and_padded():
    lines = {}
    for name in ("shared", "packed", "padded"):
        loaded = fresh()
        if name == "padded":
            loaded.rows = Rows()
        trainer = make(loaded, "--train.share_prompts", str(name == "shared").lower())
        assert trainer.rows == Rows(name != "padded", name == "shared", sys.maxsize)
        lines[name] = [trainer.step(number)[0] for number in range(1, 4)]
    for shared, packed, padded in zip(*lines.values()):
        assert (
            shared["padded_tokens"] < 0.6 * packed["padded_tokens"]
            and packed["padded_tokens"] < padded["padded_tokens"]
        )
        for name in ("loss", "grad_norm", "demo_entropy", "rollout_entropy"):
            assert shared[name] == pytest.approx(padded[name], rel=1e-4)
            assert packed[name] == pytest.approx(padded[name], rel=1e-4)
