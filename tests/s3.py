"""A real S3 server on loopback (moto's), and a proxy before it that can fail in the ways a network does."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

BUCKET = "bucket"
CODES = {"500": "InternalError", "409": "ConditionalRequestConflict", "403": "AccessDenied"}
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def moto_server(folder: Path) -> Iterator[int]:
    """Its port, while it is up, with an empty bucket."""
    port = free_port()
    with (folder / "moto.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log,
                                  env=os.environ | CREDENTIALS)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                    connection.request("PUT", f"/{BUCKET}")
                    assert connection.getresponse().status == 200
                    break
                except OSError:
                    assert time.monotonic() < deadline and server.poll() is None, (folder / "moto.log").read_text()
                    time.sleep(0.1)
            yield port
        finally:
            server.terminate()
            server.wait(30)


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on, but for those that `fault` names a way to fail for."""

    protocol_version = "HTTP/1.1"
    target: ClassVar[int]
    fault: ClassVar[Callable[[str, str], str | None]]
    one_at_a_time = threading.Lock()  # S3 decides conditional puts one by one, moto in as many threads as there are

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = type(self).fault(self.command, self.path)
        if fault in CODES:
            self._answer(int(fault), [("Content-Type", "application/xml")],
                         f"<Error><Code>{CODES[fault]}</Code><Message>injected</Message></Error>".encode())
            return
        if fault and fault.startswith("slow"):
            time.sleep(float(fault[4:]))
        headers = {k: v for k, v in self.headers.items() if not (fault == "unconditional" and k.lower() == "if-none-match")}
        with self.one_at_a_time:
            connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        if fault == "lost":  # it has arrived, and nobody hears of it
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._answer(answer.status, answer.getheaders(), data)

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(key, value)
        length = dict((k.lower(), v) for k, v in headers).get("content-length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815 - the names that the base class calls

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def proxy(target: int, fault: Callable[[str, str], str | None]) -> Iterator[str]:
    """The address of a proxy before that port. `fault(method, path)` is one of CODES, `lost`, `slow<seconds>`,
    `unconditional` or nothing."""
    handler = type("Failing", (Proxy,), {"target": target, "fault": staticmethod(fault)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Faults:
    """Every so many matching requests one fails, in turn in each of the given ways; counts how many."""

    def __init__(self, *ways: str, every: int = 2, method: str = "PUT", path: str = "") -> None:
        self.ways, self.every, self.method, self.path = ways, every, method, path
        self.seen, self.made, self.lock = 0, 0, threading.Lock()

    def __call__(self, method: str, path: str) -> str | None:
        if method != self.method or not re.search(self.path, path):
            return None
        with self.lock:
            self.seen += 1
            if self.seen % self.every:
                return None
            self.made += 1
            return self.ways[self.made % len(self.ways)]
