"""Benchmark sets: `srft eval` from their files to the table."""

import json
from pathlib import Path

import pytest

from srft import benchmarks
from srft.benchmarks import load_sets, main_eval
from srft.data import build_prompter
from srft.errors import UserError
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
    monkeypatch.setattr(benchmarks, "build_engine", lambda name, loaded: Half(loaded))


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
    for number, (chunk, seed) in enumerate([(1024, 1), (3, 1), (1024, 2)]):
        monkeypatch.setattr(benchmarks, "CHUNK", chunk)
        config = load(None, [*options, "--eval.dir", str(number), "--eval.seed", str(seed)])
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
    assert "aime24" in (tmp_path / "e" / "table.md").read_text()


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


def test_a_set_has_settings_of_its_own():
    file = MADE / "olympiadbench.jsonl"
    own = 'name = "OB", group = "g", samples = 7, prompts = 2, columns = {answer = "final_answer"}'
    (one,) = sets(f'{{file = "{file}", {own}}}')
    assert (one.name, one.group, one.samples, len(one.examples)) == ("OB", "g", 7, 2)
    plain, limited = sets(file)[0], sets(file, options=("--eval.set_prompts", "1"))[0]
    assert (plain.name, plain.group, plain.samples, len(plain.examples)) == ("olympiadbench", "math-verify", 4, 3)
    assert len(limited.examples) == 1 and sets(MADE / "gpqa_d.csv")[0].group == "letter"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("none.jsonl", r"eval.sets\[1\]: none.jsonl: there is no such file"),
        ("none.*", r"eval.sets\[1\]: none.\*: no file of a known format"),
        ('{fil = "a"}', r"eval.sets\[1\]: unknown key 'fil'; did you mean 'file'"),
        ('{name = "a"}', r"eval.sets\[1\]: file: a value is needed"),
        ('{file = "a", samples = 0}', r"eval.sets\[1\]: samples: expected a whole number of 1 at least, found 0"),
        ('{file = "a", samples = true}', r"eval.sets\[1\]: samples: expected a whole number"),
        ("{file = 3}", r"eval.sets\[1\]: file: expected the name of a file, found 3"),
        (f'{{file = "{MADE}/aime25.jsonl", columns = {{answer = "key"}}}}', "no row has a column 'key'"),
    ],
)
def test_what_is_no_set_is_refused(entry, message):
    with pytest.raises(UserError, match=message):
        sets(entry)


def test_two_sets_of_one_name_are_refused():
    with pytest.raises(UserError, match="two sets are called 'aime24'"):
        sets(MADE / "aime24.jsonl", MADE / "aime24.jsonl")


def test_a_row_that_cannot_be_graded_is_refused(tmp_path):
    file = tmp_path / "made.jsonl"
    file.write_text('{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": null, "level": 3}\n')
    with pytest.raises(
        UserError, match=r"eval.sets\[1\]: .*made.jsonl:2: no answer is known.*other columns: problem, level"
    ):
        sets(file)


def test_a_solution_without_its_answer_is_refused(tmp_path):
    file = tmp_path / "minerva.jsonl"
    file.write_text((MADE / "minerva.jsonl").read_text() + '{"problem": "a", "solution": "It is 3."}')
    with pytest.raises(UserError, match=r"minerva.jsonl:4: no answer is known"):
        sets(file)


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
