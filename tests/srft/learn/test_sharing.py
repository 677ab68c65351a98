import pytest
import torch

from srft.learn.packing import pack
from srft.learn.sharing import sharing_limit
from tests.srft.conftest import tiny_model
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
KINDS = {
    "llama": ("LlamaConfig", {}, 512),
    "gpt2": ("GPT2Config", {}, 512),  # learned absolute positions
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}, 512),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 64}, 64),
    "mistral": ("MistralConfig", {"sliding_window": 50}, 50),
    "qwen2": ("Qwen2Config", {"use_sliding_window": False}, 512),
    "window too short to try": ("MistralConfig", {"sliding_window": 16}, 0),
    "alibi, no positions": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}, 0),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, 0),
    "recurrence": ("MambaConfig", {"state_size": 4}, 0),
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
        0,
    ),
}


def model_of(kind: str, attention: str = "sdpa"):
    import transformers

    name, changes, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(SMALL | changes))
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_of_each_kind_of_model(kind):
    attention = "eager" if kind in ("recurrence", "alibi, no positions", "bloom", "gemma2") else "sdpa"
    assert sharing_limit(model_of(kind, attention)) == KINDS[kind][2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_trial_allows_for_rounding_and_leaves_the_model_as_it_was(dtype, attention):
    model = tiny_model(attn_implementation=attention).to(dtype).train()
    assert sharing_limit(model) == 512 and model.training


def test_attention_that_does_not_follow_the_mask_is_noticed():
    from transformers import AttentionInterface

    def causal_whatever_the_mask(module, query, key, value, attention_mask, **options):
        return sdpa(module, query, key, value, None, **options)

    sdpa = AttentionInterface()["sdpa"]
    AttentionInterface.register("deaf", causal_whatever_the_mask)
    assert sharing_limit(tiny_model(attn_implementation="deaf")) == 0


@pytest.mark.parametrize(
    "kind, attention",
    [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gemma2", "eager"), ("mistral", "sdpa")],
)
def test_the_gradient_is_that_of_rows_of_their_own(kind, attention):
    loaded = fresh(torch.float64)
    loaded.model = model_of(kind, attention).to(torch.float64).eval()  # GPT-2 has dropout
    trainer = make(loaded)
    sequences = some_sequences(common_prompts=True)
    loss, expected = gradients(trainer, pack(sequences, token_budget=10_000))
    for budget in (25, 10_000):
        shared = pack(sequences, token_budget=budget, share_up_to=trainer.share_up_to)
        assert any(m.position_ids is not None for m in shared)
        other_loss, other = gradients(trainer, shared)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        error = 1e-12 if kind == "gpt2" else 1e-5  # the norms of the others are fp32 in fp64 models too
        assert all((a - b).norm() <= error * b.norm() + 1e-15 for a, b in zip(other, expected))


def test_a_step_is_the_same_with_and_without_sharing():
    lines = {}
    for share in ("true", "false"):
        trainer = make(fresh(), "--train.share_prompts", share)
        assert trainer.share_up_to == (512 if share == "true" else 0)
        lines[share] = [trainer.step(number)[0] for number in range(1, 4)]
    for with_sharing, without in zip(lines["true"], lines["false"]):
        assert with_sharing["padded_tokens"] < 0.6 * without["padded_tokens"]
        for name in ("loss", "grad_norm", "demo_entropy", "rollout_entropy"):
            assert with_sharing[name] == pytest.approx(without[name], rel=1e-3)
