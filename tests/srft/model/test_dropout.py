"""Training computes what sampling computes: no dropout, of whatever kind."""

import pytest
import torch
import transformers

import srft_kernels as sk
from srft.config import ModelConfig
from srft.errors import UserError
from srft.model import head_of, hidden_states, load_model
from srft.model.dropout import without_dropout
from tests.srft.conftest import byte_tokenizer

SMALL = {"vocab_size": 258, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def logprobs(model) -> torch.Tensor:
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        hidden = hidden_states(model, ids)[0, :-1]
        return sk.linear_logprobs(hidden, target=ids[0, 1:], **head_of(model)).logprobs


def save(directory, name, **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SMALL | settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", GPT2),  # nn.Dropout, 0.1 by default
        ("llama", WIDE | {"attention_dropout": 0.3}),  # a number of the module
        ("falcon", WIDE | {"attention_dropout": 0.3, "hidden_dropout": 0.3}),  # read from the config in forward
        ("opt", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
         | {"num_attention_heads": 4, "layerdrop": 0.5, "dropout": 0.1}),  # whole layers
        ("mixtral", WIDE | {"num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.5}),
    ],
)  # fmt: skip
def test_training_mode_computes_what_evaluation_mode_does(tmp_path, name, settings):
    save(tmp_path, name, **settings)
    kept = load_model(ModelConfig(str(tmp_path), device="cpu", dropout=True)).model
    assert not torch.allclose(logprobs(kept.train()), logprobs(kept.eval()))
    model = load_model(ModelConfig(str(tmp_path), device="cpu")).model
    assert model.training
    torch.testing.assert_close(logprobs(model), logprobs(kept), atol=1e-6, rtol=0)
    torch.testing.assert_close(logprobs(model.eval()), logprobs(kept), atol=1e-6, rtol=0)


def test_a_checkpoint_keeps_the_rates_of_its_config(tmp_path):
    save(tmp_path / "model", "gpt2", **GPT2)
    model = load_model(ModelConfig(str(tmp_path / "model"), device="cpu")).model
    model.save_pretrained(tmp_path / "again")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").resid_pdrop == 0.1


def test_noise_that_cannot_be_turned_off_is_refused():
    class Noisy(transformers.GPT2Model):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            if self.training:
                output.last_hidden_state = output.last_hidden_state * 1.1
            return output

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | SMALL))
    model.transformer = Noisy(model.config)
    with pytest.raises(UserError, match=r"model\.dropout false: GPT2LMHeadModel .* in training mode \(by 10\.0%"):
        without_dropout(model)
