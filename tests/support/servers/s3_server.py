"""A real S3-compatible server on loopback (moto's, a process of its own), and a proxy that fails.

moto keeps objects in the server's memory; the proxy stands in for everything that can go wrong on
the way to it: refused connections, lost ones, 503, bodies that end early.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

ACCESS_KEY = "AKIATESTTESTTESTTEST"
SECRET_KEY = "test/secret+of+nobody"


@dataclass(frozen=True)
class S3Server:
    """A server that runs: its port, and what a process needs in its environment to use it."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """One unsigned request, beside the code under test."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket; returns its URL."""
        status, body = self.request("PUT", f"/{name}")
        assert status == 200, body
        return f"s3://{name}"

    def reset_auth(self, unchecked: int | None = None) -> None:
        """Check credentials after `unchecked` requests; None: never."""
        count = "Infinity" if unchecked is None else str(unchecked)
        status, body = self.request("POST", "/moto-api/reset-auth", count.encode())
        assert status == 200, body


def environment(port: int, patience: float = 10) -> dict[str, str]:
    """Variables with which obstore and boto talk to 127.0.0.1:`port`."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "MOTE_RETRY_SECONDS": str(patience),
    }


@contextmanager
def running_server(log: Path) -> Iterator[S3Server]:
    """Start moto_server on a free port, wait until it answers, end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        open(log, "wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, "moto_server does not answer"
                    time.sleep(0.02)
            yield S3Server(port)
        finally:
            process.kill()


class FailingProxy:
    """Hands requests on to the server, except for those it was told to fail.

    `fail` lists what happens to the next requests, one entry each: "503", "drop" (closed without
    an answer), an int (the answer is cut after so many bytes of body) or "ok". `only` restricts
    that to one method. `requests` are those that came: method, path, range. `before` is called
    with the number of each. Between `stop` and `start` connections are refused.
    """

    def __init__(self, target: int) -> None:
        self.fail: list[str | int] = []
        self.only = ""
        self.requests: list[tuple[str, str, str]] = []
        self.before: Callable[[int], None] = lambda number: None
        self._lock = Lock()
        self._target = target
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def start(self) -> None:
        """Listen, on the same port as before."""
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _next(self, method: str, path: str, span: str) -> str | int:
        with self._lock:
            self.requests.append((method, path, span))
            self.before(len(self.requests))
            if self.fail and self.only in ("", method):
                return self.fail.pop(0)
            return "ok"

    def _forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._target, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FailingProxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate = self.owner._next(self.command, self.path, self.headers.get("Range") or "")
        self.close_connection = True  # a stopped proxy must not go on answering
        if fate == "drop":
            return
        if fate == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return
        status, headers, content = self.owner._forward(
            self.command, self.path, dict(self.headers), body
        )
        self.send_response_only(status)
        kept = [(k, v) for k, v in headers if k.lower() not in ("transfer-encoding", "connection")]
        if not any(key.lower() == "content-length" for key, _ in kept):
            kept.append(("Content-Length", str(len(content))))
        for key, value in kept:
            self.send_header(key, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content[:fate] if isinstance(fate, int) else content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
