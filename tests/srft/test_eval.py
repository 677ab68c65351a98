"""`srft eval`, from files to the table."""

import json
from pathlib import Path

import pytest

from srft import eval as eval_module
from srft.benchmarks import load_sets
from srft.data import build_prompter
from srft.errors import UserError
from srft.eval import main_eval
from srft.rollout import Engine, Rollout
from srft.settings import load
from tests.srft.conftest import byte_tokenizer

MADE = Path(__file__).parents[1] / "data" / "benchmarks"


def sets(*entries: str, options: tuple[str, ...] = ()):
    return load_sets(load(None, ["--eval.sets", *map(str, entries), *options]))


def paper(directory: Path) -> list[str]:
    """The sets of the recipe, from the made files."""
    return [each["file"].replace("benchmarks/", f"{directory}/") for each in load(recipes=["benchmarks"]).eval.sets]


class Half(Engine):
    """Knows every answer, and gives it in each second sample."""

    def __init__(self, loaded):
        self.prompter = build_prompter(byte_tokenizer(), load().data)
        examples = [example for each in sets(*MADE.iterdir()) for example in each.examples]
        self.answers = {tuple(self.prompter.encode_prompt(each)): each.answer for each in examples}

    def generate(self, prompts, samples, *, numbers, seed, **settings):
        texts = [[f"#### {self.answers[tuple(p)] if i % 2 == 0 else 'none'}" for i in range(samples)] for p in prompts]
        return [[Rollout([*self.prompter.ids(text), 0], True) for text in of_prompt] for of_prompt in texts]


@pytest.fixture
def half(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_module, "build_engine", lambda name, loaded: Half(loaded))


def test_the_papers_table_from_one_command(tiny_dir, tmp_path, half, capsys):
    (tmp_path / "benchmarks").symlink_to(MADE)
    config = load(None, ["--model.device", "cpu", "--rollout.max_new_tokens", "9", "--eval.dir", "e"], ["benchmarks"])
    main_eval(config, str(tiny_dir))
    *_, written = out = capsys.readouterr().out.splitlines()
    assert written == "written: e/table.md"
    table = [line.split("  ") for line in out[-12:-1]]
    assert [line[0].strip() for line in table] == [
        *("set", "AIME 24", "AMC 23", "MATH-500", "Minerva", "OlympiadBench", "maths: mean of 5"),
        *("ARC-C", "GPQA-D", "MMLU-Pro", "out of distribution: mean of 3"),
    ]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "e/table.md").read_text().splitlines()
    ]
    by_name = {row[0]: row[1:] for row in rows if row}
    assert by_name["AIME 24"] == ["2", "32", "0.500", "0.125 – 0.875", "1.000", "0.281 – 1.000", "1.000", "9.5"]
    assert by_name["MATH-500"][:3] == ["2", "1", "1.000"] and by_name["GPQA-D"][:3] == ["2", "1", "1.000"]
    assert by_name["maths: mean of 5"][2] == "0.800" and by_name["out of distribution: mean of 3"][2] == "1.000"
    found = json.loads((tmp_path / "e/scores.json").read_text())
    assert [each["set"] for each in found["sets"]] == [
        name for name in by_name if name in {s.name for s in load_sets(config)}
    ]
    assert found["means"][0]["group"] == "maths" and found["means"][0]["reward"] == pytest.approx(0.8)
    assert found["sets"][0]["pass_at"]["2"] == pytest.approx(1 - 120 / 496)  # C(16, 2) / C(32, 2) pairs are wrong
    lines = [json.loads(line) for line in (tmp_path / "e/generations.jsonl").read_text().splitlines()]
    assert len(lines) == 19 and lines[0]["set"] == "AIME 24" and len(lines[0]["completions"]) == 32


def test_the_same_seed_gives_the_same_numbers_whatever_is_written_together(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--eval.sets", str(MADE / "arc_c.jsonl"), str(MADE / "aime24.jsonl"), "--eval.samples", "3"]
    options += ["--model.device", "cpu", "--rollout.max_new_tokens", "4"]
    found = []
    for number, (size, seed) in enumerate([(64, 1), (1, 1), (64, 2)]):
        config = load(None, [*options, "--eval.dir", str(number), "--eval.seed", str(seed)])
        config.eval.batch_size = size
        found.append([each.generations for each in main_eval(config, str(tiny_dir))])
    assert found[0] == found[1] and found[0] != found[2]


def test_a_set_that_cannot_be_scored_does_not_cost_the_others(tiny_dir, tmp_path, half, monkeypatch, capsys):
    def reward(self, prompt, completion, answer, finished, choices=None):
        return None if choices else 1.0

    monkeypatch.setattr("srft.rewards.builtin.MathVerify.one", reward)
    files = [str(MADE / name) for name in ("arc_c.jsonl", "aime24.jsonl")]
    config = load(None, ["--eval.sets", *files, "--model.device", "cpu", "--reward.workers", "0", "--eval.dir", "e"])
    assert [each.reward for each in main_eval(config, str(tiny_dir))] == [1.0]
    assert "warning: arc_c is left out: reward.name 'math_verify': none of 12 completions" in capsys.readouterr().err
    table = (tmp_path / "e" / "table.md").read_text()
    assert "| aime24 |" in table and "arc_c is left out: reward.name" in table
    assert json.loads((tmp_path / "e" / "scores.json").read_text())["left_out"][0].startswith("arc_c is left out")


def test_a_hang_of_math_verify_costs_one_sample(tiny_dir, tmp_path, half, monkeypatch, capsys):
    def generate(self, prompts, samples, **settings):
        texts = ["#### 012", "\\boxed{9^{9^{9^{9}}}}", "#### 3"]
        return [[Rollout([*self.prompter.ids(text), 0], True) for text in texts] for _ in prompts]

    monkeypatch.setattr(Half, "generate", generate)
    options = ["--eval.set_prompts", "1", "--eval.samples", "3", "--reward.timeout", "3", "--eval.dir", "e"]
    config = load(None, ["--eval.sets", str(MADE / "aime24.jsonl"), "--model.device", "cpu", *options])
    (found,) = main_eval(config, str(tiny_dir))
    assert found.generations[0]["rewards"] == [1.0, 0.0, 0.0] and found.reward == pytest.approx(1 / 3)
    assert found.scored == pytest.approx(2 / 3) and found.generations[0]["failed"] == 1 and found.pass_at[3] == 1
    assert "aime24: 33.33% of the completions were not scored and count as wrong" in capsys.readouterr().out
    assert "33.33% of the completions" in (tmp_path / "e" / "table.md").read_text()
    (line,) = (tmp_path / "e" / "generations.jsonl").read_text().splitlines()
    assert json.loads(line)["rewards"] == [1.0, None, 0.0]


def test_a_directory_with_something_in_it_is_refused(tiny_dir, tmp_path, half):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine").touch()
    config = load(None, ["--eval.sets", str(MADE / "aime24.jsonl"), "--model.device", "cpu", "--eval.dir", "e"])
    with pytest.raises(UserError, match=r"eval.dir: e exists and is not empty"):
        main_eval(config, str(tiny_dir))


def test_held_out_prompts_are_a_table_and_json_and_repeat_themselves(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {
        "model.device": "cpu",
        "data.tasks": "chain_sum",
        "eval.prompts": 3,
        "eval.samples": 2,
        "rollout.max_new_tokens": 5,
    }
    config = load(None, [word for key, value in settings.items() for word in (f"--{key}", str(value))])
    results = [main_eval(config, str(tiny_dir)) for _ in range(2)]
    assert results[0] == results[1]
    *_, text = capsys.readouterr().out.strip().splitlines()
    scores = json.loads(text)
    assert scores["model"] == str(tiny_dir) and scores["prompts"] == 3 and set(scores["pass_at"]) == {"1", "2"}
    assert "generations" not in scores
    assert len(list((tmp_path / "evals").iterdir())) == 2
    assert "| chain_sum | 3 |" in next((tmp_path / "evals").glob("*/table.md")).read_text()


def test_a_checkpoint_that_is_none_is_told_as_such(tmp_path, monkeypatch):
    def asked(*_, **__):
        raise OSError("the hub was asked")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("none", "runs/none", "./none", str(tmp_path / "none")):
        with pytest.raises(UserError, match=r"^--checkpoint '.*none': there is no such directory"):
            main_eval(load(None, []), name)
    with pytest.raises(UserError, match="the hub was asked"):
        main_eval(load(None, []), "org/none")


def test_rows_that_are_left_out_are_told_beside_the_table(tiny_dir, tmp_path, half, capsys):
    long = {"problem": "a " * 400, "answer": "1"}
    file = tmp_path / "made.jsonl"
    file.write_text((MADE / "aime24.jsonl").read_text() + json.dumps(long) + "\nno row\n")
    options = ["--model.device", "cpu", "--rollout.max_new_tokens", "9", "--data.max_prompt_tokens", "200"]
    config = load(None, [*options, "--eval.dir", "e", "--eval.sets", f'{{file = "{file}", broken = "drop"}}'])
    (found,) = main_eval(config, str(tiny_dir))
    assert found.prompts == 2
    told = "made: 2 of 4 rows are left out, which are broken, without an answer, or too long"
    assert told in capsys.readouterr().out and told in (tmp_path / "e" / "table.md").read_text()
    for overlong in ("cut", "drop"):  # is for training data
        kept = load(None, [*options, "--data.overlong", overlong, "--eval.sets", str(file), "--eval.set_prompts", "3"])
        file.write_text((MADE / "aime24.jsonl").read_text() + json.dumps(long))
        with pytest.raises(UserError, match=r"made.jsonl:3: the prompt has .* tokens"):
            main_eval(kept, str(tiny_dir))


def test_a_reward_gets_all_completions_of_held_out_prompts_at_once(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rew.py").write_text(
        "def count(prompts, completions, **_):\n    return [len(completions)] * len(completions)\n"
    )
    options = ["--model.device", "cpu", "--rollout.max_new_tokens", "2", "--eval.prompts", "9", "--eval.samples", "2"]
    config = load(None, [*options, "--eval.batch_size", "1", "--reward.name", "rew.py:count"])
    assert main_eval(config, str(tiny_dir))[0].reward == 18


def test_sets_of_tasks_are_graded_by_their_scorers(tiny_dir, tmp_path, monkeypatch, capsys):
    class Right(Half):
        def __init__(self, loaded):
            self.prompter = build_prompter(byte_tokenizer(), load().data)
            examples = [each for made in load_sets(config) for each in made.examples]
            self.answers = {tuple(self.prompter.encode_prompt(each)): each.answer for each in examples}

    entries = ['{task = "chain_sum", prompts = 3}', '{task = "spell_backward", prompts = 3, name = "words"}']
    options = ["--model.device", "cpu", "--rollout.max_new_tokens", "9", "--eval.samples", "2", "--eval.dir", "e"]
    config = load(None, ["--eval.sets", *entries, str(MADE / "aime24.jsonl"), *options])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_module, "build_engine", lambda name, loaded: Right(loaded))
    assert [each.reward for each in main_eval(config, str(tiny_dir))] == [0.5, pytest.approx(0.5, abs=0.1), 0.5]
    table = (tmp_path / "e" / "table.md").read_text()
    assert "| words | 3 | 2 |" in table and "reasoning-gym: mean of 2" in table


def test_a_set_may_have_a_temperature_of_its_own(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entry = 'task = "chain_sum", prompts = 3, samples = 3'
    sets = [f"{{{entry}}}", f'{{{entry}, name = "greedy", temperature = 0}}']
    main_eval(load(None, ["--rollout.max_new_tokens", "5", "--eval.dir", "e", "--eval.sets", *sets]), str(tiny_dir))
    assert "greedy: temperature 0" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "e/generations.jsonl").read_text().splitlines()]
    different = {
        name: [len({*row["completions"]}) for row in rows if row["set"] == name] for name in ("chain_sum", "greedy")
    }
    assert different["greedy"] == [1, 1, 1] and max(different["chain_sum"]) > 1
    first, second = json.loads((tmp_path / "e/scores.json").read_text())["sets"]
    assert first["on"] != second["on"]  # they are not to be compared
