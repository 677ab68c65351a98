"""Settings: TOML, overrides, and what is said about wrong ones."""

import dataclasses
from pathlib import Path

import pytest

from srft.config import Config
from srft.errors import UserError
from srft.settings import SECTIONS, check_keys, fields_of, help_text, load, read_recipe, recipes, to_toml
from srft.words import ADVICE, WORDS, key_of

pytest.importorskip("jsonargparse")

RECIPES = Path(__file__).parents[2] / "srft" / "recipes"


def message(*overrides: str, path: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        load(path, list(overrides))
    return str(error.value)


def test_load_without_anything_is_the_default():
    assert load() == Config()


def test_later_sources_win(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('[train]\nlr = 1e-5\nsteps = 7\n[data]\ntasks = ["gsm_symbolic"]\n')
    config = load(str(file), ["--train.lr", "2e-6"])
    assert (config.train.lr, config.train.steps, config.data.tasks) == (2e-6, 7, ["gsm_symbolic"])


def test_overrides_of_every_kind():
    arguments = [
        "--data.tasks",
        "a",
        "b",
        "--run.tensorboard",
        "--train.steps=3",
        "--model.gradient_checkpointing",
        "true",
    ]
    arguments += ["--data.task_args.chain_sum.max_terms", "4", "--loss.options.entropy_sign", "-1"]
    arguments += ["--loss.options.x.y=hello", "--data.train_file", "12", "--run.dir", "a: b"]
    config = load(None, arguments)
    assert config.data.tasks == ["a", "b"]
    assert config.run.tensorboard and config.model.gradient_checkpointing
    assert config.train.steps == 3
    assert config.data.task_args["chain_sum"]["max_terms"] == 4
    assert config.data.task_args["chain_sum"]["min_terms"] == Config().data.task_args["chain_sum"]["min_terms"]
    assert config.loss.options == {"entropy_sign": -1, "x": {"y": "hello"}}
    assert (config.data.train_file, config.run.dir) == ("12", "a: b")
    assert load(None, ["--data.tasks", '["c", "d"]']).data.tasks == ["c", "d"]
    assert load(None, ["--data.task_args", "{leg_counting = {max_animals = 3}}"]).data.task_args == {
        "leg_counting": {"max_animals": 3}
    }


def test_one_file_or_several(tmp_path):
    for given, expected in ((["a"], "a"), (["a", "b"], ["a", "b"]), (['["a"]'], ["a"])):
        config = load(None, ["--data.train_file", *given])
        assert config.data.train_file == expected
        (tmp_path / "again.toml").write_text(to_toml(config))
        assert load(str(tmp_path / "again.toml")) == config


def test_overrides_leave_the_defaults_alone():
    load(None, ["--data.task_args.chain_sum.max_terms", "9"])
    assert Config().data.task_args["chain_sum"]["max_terms"] != 9


def test_to_toml_loads_back(tmp_path):
    config = load(None, ["--data.task_args.chain_sum.max_terms", "4", "--loss.options.gamma", "0.1"])
    config.data.system_prompt = 'quotes " and \\ and\nlines, é, \x7f, # no comment'
    config.train.lr = 1e-300
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load(str(file)) == config


@pytest.mark.parametrize("name", ["gsm_symbolic.toml", "your_data.toml"])
def test_recipes_load(name):
    assert load(str(RECIPES / name)) != Config()


def test_help_names_every_key():
    assert all(f"--{section}." in help_text() for section in vars(Config()))
    assert "--train.lr " in help_text() and "constant, cosine, linear" in help_text()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--train.lrr", "1"], "command line: unknown key 'train.lrr'; did you mean 'train.lr'? (`srft train --help`"),
        (["--trian.lr", "1"], "unknown key 'trian.lr'; did you mean 'train.lr'?"),
        (["--lr", "1"], "unknown key 'lr'; did you mean 'train.lr'?"),
        (["--rollout.temprature", "1"], "unknown key 'rollout.temprature'; did you mean 'rollout.temperature'?"),
        (["--train.lr", "fast"], "train.lr: expected a number, found 'fast'"),
        (["--train.lr", "nan"], "train.lr: expected a number, found 'nan'"),
        (["--train.steps", "2.5"], "train.steps: expected a whole number, found '2.5'"),
        (["--train.steps", "null"], "train.steps: expected a whole number, found 'null'"),
        (["--train.steps", "-1"], "train.steps: expected at least 0, found -1"),
        (["--rollout.top_p", "1.5"], "rollout.top_p: expected more than 0 and at most 1, found 1.5"),
        (["--train.beta2", "1"], "train.beta2: expected at least 0 and less than 1, found 1.0"),
        (["--rollout.temperature", "0"], "rollout.temperature: expected more than 0, found 0.0"),
        (["--model.dtype", "bfloat"], "model.dtype: expected one of auto, float32, bfloat16, found 'bfloat'"),
        (["--model.dtype", "float16"], "model.dtype: expected one of auto, float32, bfloat16, found 'float16'"),
        (["--run.tensorboard", "maybe"], "run.tensorboard: expected true or false, found 'maybe'"),
        (["--data.task_args", "3"], "data.task_args: expected a table, found 3"),
        (["--train.lr"], "--train.lr: expected one value, found none"),
        (["--train.lr", "1", "2"], "--train.lr: expected one value, found 1 2"),
        (["--train.lr.x", "1"], "--train.lr.x: train.lr is one value and has no keys of its own"),
        (["train.lr", "1"], "unexpected argument 'train.lr': settings are written --section.key value"),
    ],
)
def test_wrong_overrides_are_named(overrides, expected):
    assert expected in message(*overrides)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("learning_rate", "here it is 'train.lr'"),
        ("train.learning_rate", "here it is 'train.lr'"),
        ("run.wandb", "here it is 'run.tracker'"),
        ("train.betas", "here it is 'train.beta1' and 'train.beta2'"),
        ("rollout.num_generations", "here it is 'rollout.per_prompt'"),
        ("actor_rollout_ref.rollout.n", "here it is 'rollout.per_prompt'"),
        ("train.batch_size", "here it is 'train.prompts_per_step'"),
        ("max_completion_length", "here it is 'rollout.max_new_tokens'"),
        ("loss.epsilon_high", "here it is 'loss.options.clip_high'"),
        ("loss.clip_low", "here it is 'loss.options.clip_low'"),
        ("loss.beta", "the KL term to model.reference is in the loss"),
        ("model.lora_r", "here it is 'model.lora_rank'"),
        ("lora_config", "LoRA is model.lora_rank, lora_alpha"),
        ("train.gradient_accumulation_steps", "microbatches are as many as train.token_budget tokens each make"),
        ("train.warmup_ratio", "it is a number of steps here: train.warmup_steps"),
        ("model.name", "here it is 'model.path'"),
        ("config", "a TOML file is the first argument"),
    ],
)
def test_other_trainers_words_are_known(key, expected):
    assert f"unknown key {key!r}; {expected}" in message(f"--{key}", "1")


def test_a_section_of_another_trainer_is_known(tmp_path):
    (tmp_path / "my.toml").write_text("[lora]\nr = 8\n")
    assert "unknown section [lora]; LoRA is model.lora_rank, lora_alpha" in message(path=str(tmp_path / "my.toml"))


def test_the_words_lead_to_keys_that_there_are():
    known = {f"{section}.{name}" for section in SECTIONS for name in fields_of(section)} | {"train.epochs"}
    assert {key_of(key) for key in WORDS} <= known
    words = [word for theirs in WORDS.values() for word in theirs.split()]
    assert not set(words) & known and not set(words) & {word for theirs in ADVICE.values() for word in theirs.split()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nlr = = 2\n", ":2: not valid TOML"),
        ("[train]\nlearning_rate = 1\n", ": unknown key 'train.learning_rate'"),
        ("[trainer]\nlr = 1\n", ": unknown section [trainer]; did you mean 'train'? (sections: model, data, rollout"),
        ("lr = 1\n", ": unknown key 'lr'; did you mean 'train.lr'?"),
        ("train = 3\n", ": train: expected a table [train], found 3"),
        ("[train]\nsteps = 1.5\n", ": train.steps: expected a whole number, found 1.5"),
        ("[train]\nsteps = -1\n", ": train.steps: expected at least 0, found -1"),
        ('[data]\ntasks = "chain_sum"\n', ": data.tasks: expected a list of texts, found 'chain_sum'"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, expected):
    file = tmp_path / "my.toml"
    file.write_text(text)
    assert message(path=str(file)).startswith(f"{file}{expected}")


def test_a_wrong_value_of_the_command_line_is_not_blamed_on_the_file(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[train]\nlr = 1\nsteps = 1\n")
    assert message("--train.lr", "fast", path=str(file)) == "train.lr: expected a number, found 'fast'"
    assert message("--eval.samples", "0", path=str(file)) == "eval.samples: expected at least 1, found 0"


def test_a_file_that_is_not_there():
    assert message(path="none.toml").startswith("none.toml: cannot be read as a configuration: ")


def test_recipes_are_over_the_file_and_under_the_command_line(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[loss]\npreset = "chord"\noptions = {mu = 0.3}\nadvantage_std = false\n[train]\nlr = 1e-3\n')
    config = load(str(file), ["--loss.average", "token"], ["grpo"])
    assert (config.loss.preset, config.loss.options, config.loss.advantage_std) == ("grpo", {}, True)
    assert config.loss.average == "token" and config.train.lr == 1e-3
    assert load(None, [], ["grpo", "dapo"]) == load(None, [], ["dapo"])
    with pytest.raises(UserError, match=r"recipe 'gropo' is not known; did you mean 'grpo'.* \(recipes: bench"):
        load(None, [], ["gropo"])
    with pytest.raises(UserError, match=r"recipe 'c.toml' is not known; a file is the first argument"):
        load(None, [], ["c.toml"])


def test_a_recipe_of_a_method_says_all_of_it():
    """So that none of another method's settings stays, whatever it is put over."""
    methods = {name: read_recipe(name) for name in recipes() if "loss" in read_recipe(name)}
    keys = {name: {*check_keys(tree, "")} - {"loss.hpt_threshold"} for name, tree in methods.items()}
    assert len(methods) == 10 and len(set(map(frozenset, keys.values()))) == 1
    for name in methods:
        for other in methods:
            over_other = load(None, [], [other, name])
            assert dataclasses.replace(over_other.loss, hpt_threshold=0.0) == load(None, [], [name]).loss


def test_recipes_say_in_a_line_what_they_are():
    assert len(recipes()) == 15 and all(20 < len(said) <= 120 for said in recipes().values())


def test_texts_in_tables_stay_texts(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[data]\ncolumns = {answer = "123", prompt = "off"}\n'
        'template_args = {a = "true", b = ["1", "no"], c = {d = "~"}}\n'
        '[eval]\nsets = [{file = "a", name = "2024"}, "off"]\n'
    )
    config = load(str(tmp_path / "c.toml"), ["--data.task_args.chain_sum.x", '"5"'])
    assert config.data.columns == {"answer": "123", "prompt": "off"}
    assert config.data.template_args == {"a": "true", "b": ["1", "no"], "c": {"d": "~"}}
    assert config.eval.sets == [{"file": "a", "name": "2024"}, "off"] and config.data.task_args["chain_sum"]["x"] == "5"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("False", False),
        ("off", False),
        ("true", True),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.5e2", -50.0),
        ("5", 5),
        ("a: b", "a: b"),
    ],
)
def test_values_of_tables_on_the_command_line_need_no_quotes(text, value):
    found = load(None, ["--data.template_args.x", text]).data.template_args["x"]
    assert found == value and type(found) is type(value)


def test_a_list_without_values_is_refused():
    assert message("--train.stages") == "--train.stages: expected one value at least, found none; an empty list is []"
    assert load(None, ["--data.tasks", "[]"]).data.tasks == [] and load(None, ["--eval.sets", "[ab].jsonl"]).eval.sets
