"""With which code, and on which machine, a run was made."""

import json
import subprocess
from types import SimpleNamespace

import torch

from srft import origin as module
from srft.origin import commit, origin


def test_what_a_published_number_needs_beside_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["anything", "train", "--train.steps", "3"])
    found = origin(SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16))
    assert json.loads(json.dumps(found)) == found and found["command"] == "srft train --train.steps 3"
    assert found["dtype"] == "bfloat16" and found["torch"] and found["transformers"] and " × " in found["machine"]


def test_the_commit_is_that_of_the_code_and_says_where_it_is_changed(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, "-C", tmp_path, *arguments], check=True, capture_output=True, text=True
        ).stdout

    package = tmp_path / "srft"
    package.mkdir()
    monkeypatch.setattr(module, "HERE", package.resolve())
    assert commit() == ""
    git("init", "-q")
    assert commit() == ""  # no commit yet
    (package / "a.py").write_text("1")
    git("add", "-A")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")[:12]
    assert commit() == head
    (tmp_path / "results.json").write_text("{}")
    assert commit() == head  # what is not in the repository does not change the code
    (package / "a.py").write_text("2")
    assert commit() == f"{head}+"
    monkeypatch.setattr(module, "HERE", (package / "site-packages").resolve())
    (package / "site-packages").mkdir()
    assert commit() == ""  # installed into an environment that lies in somebody's repository
