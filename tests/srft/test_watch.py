import http.client
import json
import threading
import time
import urllib.error
import urllib.request

import pytest

from srft.cli import main
from srft.config import Config
from srft.errors import UserError
from srft.rundir import write_status
from srft.settings import to_toml
from srft.watch import Server, Watched


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(Config()))
    write_status(tmp_path, "running", 0, 4)
    step(tmp_path, 1)
    return tmp_path


def step(directory, number: int) -> None:
    row = {"step": number, "demo_entropy": 1.0, "rollout_entropy": 2.0, "demo_weight": 0.1, "rollout_weight": 0.2}
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.fixture
def server(run):
    with Server(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def got(server, path: str) -> str:
    with urllib.request.urlopen(server.address + path) as answer:
        return answer.read().decode()


def test_the_page_follows_the_run_and_outlives_it(server, run):
    before = got(server, "/version")
    page = got(server, "/")
    assert "still running" in page and f'!== "{before}"' in page and 'fetch("/version")' in page
    titles = [each.partition("</figcaption>")[0] for each in page.split("<figcaption>")[1:]]
    assert titles[:2] == ["Entropy", "Weights"]
    server.watched.rest = 0.0
    step(run, 2)
    assert got(server, "/version") != before
    write_status(run, "interrupted", 2, 4, "SIGKILL")
    server.watched.rest = 0.0
    assert "stopped after step 2 of 4 by SIGKILL" in got(server, "/")
    assert sorted(each.name for each in run.iterdir()) == ["config.toml", "metrics.jsonl", "status.json"]
    (run / "config.toml").write_bytes(b"\xff")
    for _ in range(2):
        step(run, 3)
        server.watched.rest = 0.0
        assert "stopped after step 2 of 4" in got(server, "/"), "the last page stays"
        assert server.watched.rest > 0.0, "and is not tried again at once"
        (run / "config.toml").unlink(missing_ok=True)


def test_a_page_is_not_made_again_before_it_has_rested(run):
    """A hundred times what making it took: then it costs a hundredth of a core at most."""
    watched = Watched(run)
    version, page = watched.current()
    step(run, 2)
    assert watched.current() == (version, page) and watched.rest > 0
    assert watched.rest - time.monotonic() > 0.5 * 0.01 / 0.01  # it takes a hundredth of a second at least
    watched.rest = 0.0
    assert watched.current()[0] != version
    step(run, 3)
    with (run / "evaluation.jsonl").open("w"):
        version, page = watched.current()
        watched.rest = 0.0
        assert watched.current() != (version, page)


def test_a_run_that_ends_is_told_at_once(run):
    watched = Watched(run)
    write_status(run, "finished", 4, 4)
    assert watched.rest > time.monotonic() and b"still running" not in watched.current()[1]


def test_a_page_that_cannot_be_made_is_not_tried_at_every_question(run, monkeypatch):
    watched, tries = Watched(run), []
    monkeypatch.setattr("srft.watch.html", lambda *_, **__: tries.append(1) or 1 / 0)
    write_status(run, "failed", 2, 4, "an error")
    for _ in range(3):
        assert b"still running" in watched.current()[1]
    assert len(tries) == 1


def test_only_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"
    connection = http.client.HTTPConnection(*server.server_address)
    connection.request("GET", "/", headers={"Host": "elsewhere.example:80"})
    assert connection.getresponse().status == 403
    for host, status in (("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1", 200), ("", 403)):
        connection = http.client.HTTPConnection(*server.server_address)
        connection.request("GET", "/", headers={"Host": host})
        assert connection.getresponse().status == status, host
    for path in ("/config.toml", "/../config.toml"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            got(server, path)


@pytest.mark.parametrize("arguments", [["--watch", "--port", "x"], ["--watch", "--port", "70000"], ["--port", "1"]])
def test_a_wrong_port_is_told(run, arguments, capsys):
    assert main(["report", str(run), *arguments]) == 2
    assert "expected a number from 0 (any that is free) to 65535, beside --watch" in capsys.readouterr().err


def test_what_cannot_be_watched_is_told(tmp_path, run):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.toml in it, so it is not the directory of a run"):
        Watched(tmp_path / "empty")
    with Server(run, 0) as server, pytest.raises(UserError, match=r"--port \d+: cannot be listened on"):
        Server(run, server.server_address[1])
