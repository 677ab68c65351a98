"""The head's arguments and the hidden states reproduce every model's own logits."""

import pytest
import torch
import transformers

import srft_kernels as sk
from srft.errors import UserError
from srft.model.head import check_head, head_of, hidden_states
from tests.srft.conftest import tiny_model

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def logits_from_parts(model, ids, mask):
    return sk.reference.logits(hidden_states(model, ids), **head_of(model))


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("Llama", {}, {"softcap": None, "logit_scale": 1.0}),
        ("Llama", {"tie_word_embeddings": True}, {}),
        ("Qwen3", {"head_dim": 8}, {}),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5}, {"softcap": 0.5}),
        ("Cohere", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 8.0}, {"logit_scale": 0.125}),
        ("Phi", {}, {}),  # a bias in the head
        ("GPTNeoX", {}, {}),
    ],
)
def test_head_and_hidden_states_give_the_models_own_logits(family, settings, expected):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3).add_(0.01 * torch.randn_like(parameter))  # logits large enough to feel a soft cap
    ids = torch.randint(3, 99, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        ours, theirs = logits_from_parts(model, ids, mask), model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()])
    assert {name: head_of(model)[name] for name in expected} == expected
    check_head(model)


def test_a_tied_head_is_the_embedding_itself():
    model = tiny_model(tie_word_embeddings=True)
    assert head_of(model)["linear_weight"] is model.get_input_embeddings().weight
    model = tiny_model(tie_word_embeddings=False)
    assert head_of(model)["linear_weight"] is not model.get_input_embeddings().weight


def test_a_padded_vocabulary_is_known():
    model = tiny_model()
    assert head_of(model)["vocab_size"] is None
    model.config.vocab_size = 250
    assert head_of(model)["vocab_size"] == 250


def test_what_a_model_does_with_its_padding_does_not_matter():
    class Masked(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            output.logits[..., 250:] = -torch.inf
            return output

    model = Masked(tiny_model().config)
    model.config.vocab_size = 250
    check_head(model)


def test_an_unknown_kind_of_head_is_refused():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            output.logits = 1.5 * output.logits
            return output

    with pytest.raises(UserError, match=r"Odd: its output layer works in a way that srft does not know: logits differ"):
        check_head(Odd(tiny_model().config))


def test_hidden_states_make_no_logits(tiny):
    calls = []
    tiny.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.ones(2, 5, dtype=torch.long)
    assert hidden_states(tiny.model, ids).shape == (2, 5, 32) and not calls


def test_a_model_whose_tokens_see_what_follows_is_refused():
    config = transformers.Gemma3TextConfig(**SMALL, head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(UserError, match="its tokens see those that follow them, so it is no causal LM"):
        check_head(transformers.Gemma3ForCausalLM(config))


def test_a_soft_cap_by_any_name_shows_before_the_model_is_trained(monkeypatch):
    """Its logits are still so small that a cap hardly changes them."""
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "lru_width": 32}
    config = transformers.RecurrentGemmaConfig(**size, intermediate_size=64, logits_soft_cap=30.0)
    model = transformers.RecurrentGemmaForCausalLM(config)
    assert head_of(model)["softcap"] == 30.0
    check_head(model)
    monkeypatch.setattr("srft.model.head.head_of", lambda model: head_of(model) | {"softcap": None})
    with pytest.raises(UserError, match="its output layer works in a way"):
        check_head(model)


def test_hidden_states_have_the_type_of_the_head():
    """Mamba's final norm gives fp32, whatever the model's type."""
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**size)).bfloat16()
    check_head(model)
    ids = torch.arange(4)[None]
    assert hidden_states(model, ids).dtype == torch.bfloat16
