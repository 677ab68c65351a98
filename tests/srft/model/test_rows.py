import copy
import itertools
import re
import sys

import pytest
import torch

from srft.learn.packing import pack
from srft.model.attention import NAME
from srft.model.dropout import without_dropout
from srft.model.load import checkpoint_activations
from srft.model.rows import Rows, try_rows
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
    "gemma4": (
        "Gemma4TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "num_hidden_layers": 6,
            "vocab_size_per_layer_input": 258,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, **EXPERTS}),
}
PADDED = {
    "soft cap in attention": (
        "Gemma2Config",
        {"head_dim": 8, "sliding_window": 64},
        "attention (is eager|has softcap)",
    ),
    "attention of its own": ("FalconConfig", {"new_decoder_architecture": True}, "asks for sdpa by name"),
    "keeps the segments to itself": ("StableLmConfig", {}, "does not tell its attention the segments"),
    "a mask of its own": ("DogeConfig", {"is_moe": False}, "makes a mask of its own"),
    "alibi, no positions": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "attention is eager"),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, "attention is eager"),
    "recurrence": ("MambaConfig", {"state_size": 4}, "attention is eager"),
    "layers of chunks": (
        "Llama4TextConfig",
        {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32},
        "layers of chunked_attention",
    ),
    "counts the row": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
            "attention_chunk_size": None,
            "layer_types": ["full_attention"] * 2,
            "attn_temperature_tuning": True,
        },
        "attn_temperature_tuning",
    ),
    "chooses keys": (
        "DeepseekV32Config",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "index_topk": 16,
            "index_n_heads": 2,
            "index_head_dim": 16,
            **EXPERTS,
        },
        "",
    ),
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
        "layers of linear_attention",
    ),
}


def model_of(kind: str, **options):
    import transformers

    name, changes, *_ = (PACKED | PADDED)[kind]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**(SMALL | changes)), **options)


def quiet(model):
    """Without dropout, in fp64 where it can be; the experts' product is of fp32 at most."""
    loaded = loaded_model(model if hasattr(model.config, "num_experts_per_tok") else model.double())
    without_dropout(loaded.model)
    return loaded


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_each_kind_of_model_stands_as_it_can(kind):
    model = model_of(kind)
    own = model.config._attn_implementation
    rows = try_rows(model)
    assert rows == Rows(kind in PACKED, kind in PACKED)
    if kind in PACKED:
        assert not rows.reason and model.config._attn_implementation == NAME
    else:
        assert re.search(PADDED[kind][2], rows.reason) and model.config._attn_implementation == own


@pytest.mark.parametrize("kind", PACKED)
def test_loss_and_gradient_of_packed_rows_are_those_of_sequences_alone(kind):
    """Their attention alone is transformers' own."""
    sequences = some_sequences(common_prompts=True)
    apart = make(quiet(model_of(kind, attn_implementation="eager")))
    assert not apart.rows.packed
    loss, expected = gradients(apart, pack(sequences, token_budget=1))
    trainer = make(quiet(model_of(kind)))
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
    assert try_rows(model) == Rows(True, True) and model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_sequences_that_see_each_other_are_noticed(monkeypatch, dtype, shared):
    """Attention that knows no segments; and a convolution before the last layer, which blurs their ends a little."""
    from srft.model import attention

    def in_tiles(query, key, value, segments, window, options):
        yield torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, **options)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "in_tiles", in_tiles)
        assert try_rows(tiny_model().to(dtype)) == Rows()

    def blur(module, given):
        (states,) = given
        return (states + 0.5 * torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1],)

    model = tiny_model(num_hidden_layers=8).to(dtype)
    model.model.layers[-1].input_layernorm.register_forward_pre_hook(blur)
    rows = try_rows(model)
    assert rows == Rows() and rows.reason


def test_a_window_that_attention_is_not_told_of_is_noticed(monkeypatch):
    """Longer than the trial, which cannot see it."""
    from srft.model import attention

    def deaf(*given, sliding_window=None, **options):
        return packed_attention(*given, **options)

    packed_attention = attention.packed_attention
    model = model_of("mistral")
    model.config.sliding_window = 4096
    assert try_rows(copy.deepcopy(model)) == Rows(True, True)
    monkeypatch.setattr(attention, "packed_attention", deaf)
    assert try_rows(model).reason == "its attention is not told of a window"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("scaling", ["longrope", "dynamic"])
def test_sequences_of_other_frequencies_stand_apart(scaling):
    import transformers

    rope = {"rope_type": scaling, "original_max_position_embeddings": 64, "rope_theta": 1e4, "factor": 8.0}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if scaling == "longrope" else {}
    kind = transformers.Phi3Config if scaling == "longrope" else transformers.LlamaConfig
    for implementation in ("sdpa", "eager"):
        config = kind(**SMALL, rope_parameters=rope | factors, original_max_position_embeddings=64)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        boundary = 64 if scaling == "longrope" else SMALL["max_position_embeddings"]
        assert try_rows(model) == Rows(implementation == "sdpa", implementation == "sdpa", boundary)
    assert try_rows(model_of("phi3")).apart == sys.maxsize


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
    assert try_rows(model) == Rows(packed=True)
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
