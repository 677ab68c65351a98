import json
import re
from html.parser import HTMLParser

import pytest

from srft.config import Config
from srft.errors import UserError
from srft.report import build
from srft.rundir import write_status
from srft.settings import to_toml

VOID = {"meta", "br", "img", "input", "link", "path", "use", "rect", "line"}


class Checker(HTMLParser):
    """Every element is closed in order, and nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            assert name not in ("src", "srcset") and not (name in ("href", "xlink:href") and not value.startswith("#"))
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()


def generation(task: str, completion: str, reward: float | None) -> dict:
    return {
        "task": task,
        "prompt": "What is <b>2 + 3</b>?",
        "answer": "5",
        "completions": [completion],
        "rewards": [reward],
        "finished": [False],
        "tokens": [4],
    }


def scores(reward: float | None) -> dict:
    return {"prompts": 2, "reward": reward, "pass_at": {"1": reward}, "finished": 0.5, "tokens": 4.0}


def evaluation(step: int, reward: float | None, *tasks: str) -> dict:
    return {
        "step": step,
        **scores(reward),
        "samples": 1,
        "seed": 17,
        "tasks": {task: scores(reward) for task in tasks},
        "generations": [generation(task, f"after {step} steps & more", reward) for task in tasks],
    }


@pytest.fixture
def run_dir(tmp_path):
    def write(steps=(), evaluations=(), samples=()):
        (tmp_path / "config.toml").write_text(to_toml(Config()))
        for name, rows in {"metrics": steps, "evaluation": evaluations, "samples": samples}.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return write


def checked(path) -> str:
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert len(set(checker.ids)) == len(checker.ids)  # two figures must not share a clip path
    references = set(re.findall(r"url\(#([^)]+)\)", page))
    assert references <= set(checker.ids)
    assert not re.search(r"@import|url\((?!#)", page)
    return page


def line(step: int) -> dict:
    keys = ["loss", "reward_mean", "demo_entropy", "rollout_entropy", "grad_norm", "seconds_rollout", "seconds_train"]
    return {"step": step, **{key: step / (i + 1) for i, key in enumerate(keys)}, "clip_fraction": None}


def test_a_whole_run_is_one_self_contained_page(run_dir):
    sample = {"step": 3, "task": "sums", "prompt": "1 + 1", "completion": "<script>alert(1)</script>"}
    sample |= {"reward": None, "advantage": 0.5, "finished": True}
    directory = run_dir(
        [line(i) for i in range(1, 4)],
        [evaluation(0, 0.031, "sums", "words"), evaluation(3, 0.478, "sums", "words")],
        [sample],
    )
    page = checked(build(directory))
    assert "0.031 → " in page and "0.478" in page
    assert "after 0 steps &amp; more" in page and "after 3 steps &amp; more" in page
    assert "&lt;b&gt;2 + 3&lt;/b&gt;" in page and "<script>" not in page
    assert page.count("<svg") >= 5 and "currentColor" in page and "prefers-color-scheme: dark" in page
    assert "per_prompt" in page and "words" in page


@pytest.mark.parametrize(
    "steps, evaluations",
    [([], []), ([line(1)], []), ([], [evaluation(0, 0.1, "sums")]), ([line(1)], [evaluation(0, None, "sums")] * 2)],
)
def test_an_unfinished_run_has_a_page_too(run_dir, steps, evaluations):
    checked(build(run_dir(steps, evaluations)))


def test_the_headline_is_good_only_where_the_reward_rose(run_dir):
    for after, kind in [(0.1, ""), (0.1001, ""), (0.2, "good"), (0.0, "bad"), (None, "bad")]:
        page = checked(build(run_dir([line(1)], [evaluation(0, 0.1, "sums"), evaluation(1, after, "sums")])))
        assert f'0.100 → <span class="{kind}">' in page and "before and after 1 step ·" in page


@pytest.mark.parametrize(
    "status, expected",
    [
        (("finished", 1, 1), ""),
        (("interrupted", 1, 9, "SIGTERM", "srft train --resume x"), "stopped after step 1 of 9 by SIGTERM; srft train"),
        (("interrupted", 0, 9, "Ctrl-C"), "stopped before its first step by Ctrl-C"),
        (("failed", 1, 9, "RuntimeError: <boom>"), "stopped after step 1 of 9 by an error: RuntimeError: &lt;boom&gt;"),
        (("running", 0, 9), "still running, or killed without a word, after step 1 of 9"),
    ],
)
def test_a_stopped_run_says_why(run_dir, status, expected):
    directory = run_dir([line(1)], [evaluation(0, 0.1, "sums")])
    write_status(directory, *status)
    page = checked(build(directory))
    assert expected in page and ('<div class="bad">' in page) == bool(expected)
    (directory / "interrupted-1").mkdir()
    assert "as it was after step 1, where the run was stopped, is in interrupted-1" in checked(build(directory))


def test_what_a_run_does_not_have_is_not_shown(run_dir):
    sample = {"step": 1, "task": "sums", "prompt": "1", "completion": "2", "reward": None, "advantage": None}
    page = checked(
        build(run_dir([line(1) | {"demo_tokens": 5, "rollout_tokens": 0}], [], [sample | {"finished": True}]))
    )
    assert "clip_fraction" not in page and ">rollout tokens<" not in page and ">demonstration tokens<" in page
    assert "step 1 · sums<" in page.replace("\n", "")


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.toml"):
        build(tmp_path)


def test_a_missing_package_is_told_before_anything_is_done(run_dir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"jinja2.*srft-kernels\[train\]"):
        build(run_dir())
