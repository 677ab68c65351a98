"""The report of a run as it goes on, on a page that a browser on this machine sees.

    srft report --watch RUN_DIR          # http://127.0.0.1:8000

Only this machine: the server listens on the loopback address, and answers nobody who calls it by another name. It reads
the run's files and writes nothing, so that run and page outlive each other.
"""

import contextlib
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import urlsplit

from srft.errors import UserError
from srft.report import html
from srft.rundir import read_status

LOOPBACK = "127.0.0.1"
PORT = 8000
SHARE = 0.01  # of a core's time that making the page may take
READ = ("metrics.jsonl", "evaluation.jsonl", "status.json")


class Watched:
    """The page of a run: made when it is asked for, where the run has written, and not too often."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.lock = Lock()
        self.make(self.written())  # raises UserError where there is no run

    def current(self) -> tuple[str, bytes]:
        """(version, page)"""
        with self.lock:
            # Where the run is gone, or something else than a run has written there, its last page stays.
            with contextlib.suppress(Exception):
                written = self.written()
                ended = written.partition(" ")[0] != self.tried.partition(" ")[0]
                if written != self.version and (ended or time.monotonic() >= self.rest):
                    self.make(written)
            return self.version, self.page

    def make(self, written: str) -> None:
        started, self.tried = time.process_time(), written
        try:
            self.page, self.version = html(self.directory, live=written).encode(), written
        finally:
            self.rest = time.monotonic() + (time.process_time() - started) / SHARE

    def written(self) -> str:
        """What the run is doing, and a text that changes when it has written."""
        found = [each.stat() for name in READ if (each := self.directory / name).exists()]
        state = (read_status(self.directory) or {"state": "unknown"})["state"]
        return " ".join([state, *(f"{each.st_size}.{each.st_mtime_ns}" for each in found)])


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in (LOOPBACK, "localhost"):
            return self.send_error(403)  # a page of elsewhere whose name was made to mean this machine
        if self.path not in ("/", "/version"):
            return self.send_error(404)
        version, page = self.server.watched.current()
        kind, body = ("text/html; charset=utf-8", page) if self.path == "/" else ("text/plain", version.encode())
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: it is asked every few seconds."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Nothing: a browser that loads the page again hangs up."""

    def __init__(self, directory: Path, port: int = PORT):
        self.watched = Watched(directory)
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            raise UserError(f"--port {port}: cannot be listened on: {error.strerror}; take another one") from error

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}"


def main_watch(directory: str, port: int = PORT) -> None:
    """Serve until Ctrl-C."""
    with Server(Path(directory), port) as server:
        print(f"{directory}: {server.address}, until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
