"""`srft data check`: what is in data files, and what is wrong with them."""

import json
from pathlib import Path

import pytest

from srft.cli import main

pytest.importorskip("jsonargparse")
INPUTS = Path(__file__).parents[1] / "data"


def check(capsys, *arguments):
    code = main(["data", "check", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def write(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_columns_counts_and_lengths(capsys):
    code, out, _ = check(capsys, INPUTS / "openr1.jsonl")
    assert code == 0
    for line in (
        f"{INPUTS}/openr1.jsonl: 3 rows, 0 of them broken",
        "  prompt         from problem (3 rows)",
        "  demonstration  from generations (3 rows)",
        "  answer         from answer (3 rows)",
        "  3 examples, 3 demonstrations, 3 answers",
        "  reward functions get the columns problem, solution, generations, correctness_math_verify",
        "    up to      64        3  ████████████████████████████████████████",
        "2 examples to train on, 1 prompts held out",
    ):
        assert line in out.splitlines(), out


def test_a_part_that_no_column_has_says_which_names_are_known(capsys):
    _, out, _ = check(capsys, INPUTS / "trl.jsonl")
    assert "  answer         none; known names: answer, final_answer, ground_truth, reward_model.ground_truth, a" in out
    _, out, _ = check(capsys, INPUTS / "trl.jsonl", "--data.columns.answer", "completion")
    assert "  answer         from completion (3 rows)" in out


def test_every_broken_row_is_named(tmp_path, capsys):
    fine = {"prompt": "a", "answer": 1}
    rows = [fine, "{", {"prompt": "b\ud83d"}, {"x": 1}, {"prompt": "b", "completion": 3}, {"prompt": "c"}]
    path = write(tmp_path / "train.jsonl", rows)
    code, out, err = check(capsys, path)
    assert code == 2 and "4 of 6 rows are broken" in err
    broken = [line.removeprefix("  broken: ") for line in out.splitlines() if line.startswith("  broken: ")]
    assert [line.removeprefix(f"{path}:").partition(":")[0] for line in broken] == ["2", "3", "4", "5"]


def test_repeated_prompts(tmp_path, capsys):
    rows = [{"prompt": "a", "answer": 1}] * 2 + [{"prompt": "b", "answer": each} for each in (1, 2)] + [{"prompt": "c"}]
    path = write(tmp_path / "train.jsonl", rows)
    _, out, _ = check(capsys, path)
    assert f"  2 prompts come more than once, such as {path}:1 and {path}:2" in out
    assert f"  1 of them with the same demonstration and answer, such as {path}:1 and {path}:2" in out
    assert f"  1 of them with different answers, such as {path}:3 and {path}:4" in out


def test_held_out_prompts_that_are_in_the_training_file(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", [{"prompt": each} for each in ("What is 2 + 2?", "Who?", "Why?")])
    test = write(tmp_path / "test.jsonl", [{"prompt": each} for each in ("what is  2+2", "Why?", "When?")])
    _, out, _ = check(capsys, train, "--data.eval_file", test)
    assert f"{test}: 3 rows" in out and "2 examples to train on, 3 prompts held out" in out
    assert f"1 held-out prompts are in the training file too; it is trained without them, such as {test}:2 and" in out
    assert f"alone, such as {test}:1 and {train}:1" in out


def test_tokens_and_what_the_chat_template_refuses(tmp_path, tiny_dir, capsys):
    tools = json.dumps([{"name": "add"}])
    rows = [{"prompt": "x" * length, "completion": "y"} for length in (5, 50)] + [{"prompt": "z", "tools": tools}]
    path = write(tmp_path / "train.jsonl", rows)
    code, out, err = check(capsys, path, "--model.path", tiny_dir, "--data.max_prompt_tokens", "40")
    assert code == 2 and "1 of 3 rows are broken" in err
    assert f"  prompts, tokens: shortest 24, median 24, 99 % up to 24, longest 69 ({path}:2)" in out
    assert f"  demonstrations, tokens: shortest 2, median 2, 99 % up to 2, longest 2 ({path}:2)" in out
    assert "  1 prompts are longer than data.max_prompt_tokens 40: data.overlong" in out
    assert f"  broken: {path}:3: tools: the chat template of the tokenizer does not show them" in out


def test_settings_of_a_file(tmp_path, capsys):
    config = tmp_path / "my.toml"
    config.write_text(f"[data]\ntrain_file = ['{INPUTS}/trl.jsonl', '{INPUTS}/gsm8k.jsonl']\n")
    code, out, _ = check(capsys, config)
    assert code == 0 and f"{INPUTS}/trl.jsonl, {INPUTS}/gsm8k.jsonl: 6 rows" in out
    assert check(capsys, INPUTS / "trl.jsonl", INPUTS / "gsm8k.jsonl")[1] == out


def test_nothing_to_check(tmp_path, capsys):
    for arguments in (["data"], ["data", "check"], ["data", "look", "x.jsonl"]):
        assert main(arguments) == 2
        assert "srft data check takes files to check: srft data check train.jsonl" in capsys.readouterr().err
    (tmp_path / "my.toml").write_text("")
    assert "data.train_file is not set" in check(capsys, tmp_path / "my.toml")[2]


def test_help_has_the_table_of_names(capsys):
    assert main(["data", "--help"]) == 0
    assert "  demonstration  demonstration > completion > generations > solution | output | " in capsys.readouterr().out
