import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import srft_kernels as sk
from srft import checkpoint
from srft.config import ModelConfig
from srft.errors import UserError
from srft.learn.packing import pack
from srft.model import head_of, hidden_states, load_merged, load_model, load_reference, merged
from srft.model.adapters import add_adapters, base_of, without_adapters
from tests.srft.conftest import byte_tokenizer, tiny_model
from tests.srft.test_trainer import make, some_sequences

pytest.importorskip("peft")
IDS = torch.arange(1, 25)[None]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def config(request, tmp_path) -> ModelConfig:
    tiny_model(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return ModelConfig(path=str(tmp_path / "base"), device="cpu", lora_rank=4, lora_alpha=8.0)


def moved(loaded):
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return loaded


def test_new_ones_change_nothing_and_are_all_that_is_trained(config):
    base, loaded = load_model(replace(config, lora_rank=0)), load_model(config)
    assert torch.equal(hidden_states(base.model, IDS), hidden_states(loaded.model, IDS))
    again = dict(load_model(config).model.named_parameters())  # on another rank, say
    assert all(torch.equal(weight, again[name]) for name, weight in loaded.model.named_parameters())
    assert loaded.rows == base.rows and loaded.rows.shared
    trained = {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    trainer = make(loaded, "--train.lr", "1e-2")
    before = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
    trainer._update(pack(some_sequences(), token_budget=30, rows=trainer.rows), 1, {})
    trainer._update(pack(some_sequences(), token_budget=30, rows=trainer.rows), 2, {})
    changed = {name for name, weight in loaded.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == trained


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_full_logits(config, checkpointing):
    loaded = moved(load_model(replace(config, gradient_checkpointing=checkpointing)))
    loaded.model.double()
    trainer = make(loaded, "--loss.preset", "sft", "--train.share_prompts", "false")
    sequences = [each for each in some_sequences() if each.is_demo]
    trainer.optimizer.step = lambda number: {}
    trainer._update(pack(sequences, token_budget=10**6, rows=trainer.rows), 1, {})
    weights = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    found = [weight.grad.clone() for weight in weights]
    losses = []
    for each in sequences:
        ids = torch.tensor([*each.prompt, *each.completion])
        logprobs = loaded.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        losses.append(-logprobs[len(each.prompt) - 1 :])
    expected = torch.autograd.grad(torch.cat(losses).mean(), weights)
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() > 0


def test_a_frozen_head_costs_no_product_for_its_gradient(config):
    """Three products of n × H × V for a head that is trained, two for one that is not."""
    flops = {}
    for rank in (0, 4):
        loaded = load_model(replace(config, lora_rank=rank))
        hidden = hidden_states(loaded.model, IDS)[0].detach().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            sk.linear_loss(hidden, target=IDS[0], objective=sk.sft(), **head_of(loaded.model)).loss.backward()
        flops[rank] = counter.get_total_flops() / (2 * hidden.numel() * 258)
    assert flops == {0: 3, 4: 2}


def test_the_reference_is_the_model_without_them(config):
    base, loaded = load_model(replace(config, lora_rank=0)), moved(load_model(config))
    reference = load_reference(config, loaded)
    assert reference is loaded
    trained = [weight.requires_grad for weight in loaded.model.parameters()]
    with without_adapters(reference.adapters):
        assert trained == [weight.requires_grad for weight in loaded.model.parameters()]
        assert torch.equal(hidden_states(loaded.model, IDS), hidden_states(base.model, IDS))
    assert not torch.equal(hidden_states(loaded.model, IDS), hidden_states(base.model, IDS))
    assert trained == [weight.requires_grad for weight in loaded.model.parameters()]
    assert load_reference(replace(config, reference=config.path), loaded) is loaded
    frozen = load_reference(replace(config, reference=f"{config.path}/"), loaded)
    assert frozen is not loaded
    options = ("--loss.options.kl_coef", "0.3")
    found = []
    for each in (reference, frozen):
        trainer = make(loaded, *options, reference=each)
        trainer.optimizer.step = lambda number: {"skipped_updates": 1.0}
        loaded.model.zero_grad()
        metrics = trainer._learn(pack(some_sequences(), token_budget=30, rows=trainer.rows), 1)
        found.append((metrics, [p.grad.clone() for p in loaded.model.parameters() if p.requires_grad]))
    (ours, ours_gradients), (theirs, theirs_gradients) = found
    assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True) and ours["ref_kl"] > 1e-4
    for a, b in zip(ours_gradients, theirs_gradients):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_reference_keeps_adapters_of_its_own(config, tmp_path):
    """Those that model.path has before training are a part of it."""
    checkpoint.save(moved(load_model(config)), tmp_path / "adapter")
    config = replace(config, path=str(tmp_path / "adapter"), lora_rank=0)
    loaded = load_model(config)
    expected = hidden_states(loaded.model, IDS)
    reference = load_reference(config, moved(loaded))
    with without_adapters(reference.adapters):
        assert torch.equal(hidden_states(reference.model, IDS), expected)
    assert not any(weight.requires_grad for weight in reference.model.parameters())


def test_the_model_without_them_has_no_dropout(config):
    loaded = load_model(replace(config, lora_dropout=0.5))
    assert loaded.model.training
    with without_adapters(loaded.adapters):
        assert not loaded.model.training
    assert loaded.model.training


def test_adapters_beside_embeddings_that_are_the_head_are_refused(config, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(config.path)
    own = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(base, own).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    directory = ModelConfig(path=str(tmp_path / "adapter"), device="cpu")
    if base.config.tie_word_embeddings:
        with pytest.raises(UserError, match="adapters beside the head, which srft does not train; merge them first"):
            load_model(directory)
    else:
        assert load_model(directory).adapters
    base = AutoModelForCausalLM.from_pretrained(config.path)
    own = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, own).save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    with pytest.raises(UserError, match="it has whole embeddings beside its adapters; merge them first"):
        load_model(replace(directory, path=str(tmp_path / "whole")))


def test_what_is_saved_is_read_by_peft_and_merged_by_transformers(config, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = moved(load_model(config))
    expected = hidden_states(loaded.model, IDS)
    checkpoint.save(loaded, tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == config.path
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    again = load_model(ModelConfig(path=str(tmp_path / "adapter"), device="cpu"))
    assert torch.equal(hidden_states(again.model, IDS), expected) and again.adapters
    base = AutoModelForCausalLM.from_pretrained(config.path)
    assert torch.equal(hidden_states(PeftModel.from_pretrained(base, str(tmp_path / "adapter")).model, IDS), expected)
    for name, model in (("read", load_merged(config, tmp_path / "adapter", loaded)), ("final", merged(loaded))):
        assert model.adapters is None and all(weight.requires_grad for weight in model.model.parameters())
        checkpoint.save(model, tmp_path / name)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (hidden_states(plain, IDS) - expected).norm() <= 1e-5 * expected.norm()
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in tiny_model().named_parameters()} | (
        set() if plain.config.tie_word_embeddings else {"lm_head.weight"}
    )


def test_packed_rows_are_sequences_alone(config):
    loaded = moved(load_model(config))
    found = []
    for rows in (replace(loaded.rows, packed=False, shared=False), loaded.rows):
        trainer = make(loaded)
        trainer.optimizer.step = lambda number: {}
        loaded.model.zero_grad()
        trainer._update(pack(some_sequences(common_prompts=True), token_budget=60, rows=rows), 1, {})
        found.append([p.grad.clone() for p in loaded.model.parameters() if p.requires_grad])
    for ours, theirs in zip(*found):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_targets": ["lm_head"]}, "lm_head is the head, beside which adapters would train nothing; leave it out"),
        ({"lora_targets": ["all-linear", "q_proj"]}, "give names of layers, or 'all-linear' alone"),
        ({"lora_targets": []}, "give names of layers, or 'all-linear' alone"),
        ({"lora_targets": ["q_prj"]}, r"no layer is called 'q_prj'; there are .*q_proj.* or 'all-linear'"),
    ],
)
def test_wrong_targets_are_named(config, changes, message):
    with pytest.raises(UserError, match=message):
        load_model(replace(config, **changes))


def test_the_embedding_that_is_the_head_has_none(tiny_dir):
    with pytest.raises(UserError, match="embed_tokens is the head"):
        load_model(ModelConfig(path=str(tiny_dir), device="cpu", lora_rank=2, lora_targets=["embed_tokens"]))
    loaded = load_model(ModelConfig(path=str(tiny_dir), device="cpu", lora_rank=2, lora_targets=["q_proj"]))
    assert sum(weight.requires_grad for weight in loaded.model.parameters()) == 4


def test_wrong_adapters_are_named(config, tmp_path):
    checkpoint.save(load_model(config), tmp_path / "adapter")
    directory = ModelConfig(path=str(tmp_path / "adapter"), device="cpu")
    with pytest.raises(UserError, match=r"model.lora_rank 8: the adapters in .* have rank 4; leave it out"):
        load_model(replace(directory, lora_rank=8))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"model.path '.*adapter': the model of its adapters, '.*base': there is no such"
    ):
        load_model(directory)
    for text, found in (("{}", "it has no base_model_name_or_path"), ("{", "it cannot be read: ")):
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=f"adapter_config.json: {found}.*; it has to name the model"):
            load_model(directory)


def test_adapters_of_another_kind_are_refused(config, tmp_path):
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(config.path)
    get_peft_model(base, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapters of IA3; srft reads plain LoRA: merge others into their model"):
        load_model(ModelConfig(path=str(tmp_path / "adapter"), device="cpu"))


def test_adapters_of_the_embedded_model_name_it(embedded, tmp_path):
    add_adapters(copy.deepcopy(embedded.model), ModelConfig(lora_rank=1)).save_pretrained(tmp_path)
    assert base_of(tmp_path) == "smollm2"


def test_without_the_package_it_says_what_to_install(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(UserError, match=r"'peft' is needed for model.lora_targets"):
        load_model(config)
