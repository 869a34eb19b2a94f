"""A web server before another one, which can be made to fail as servers do."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HANG = 60  # seconds, longer than any test waits
SKIPPED = {"connection", "transfer-encoding", "keep-alive", "server", "date"}


class Faulty:
    """Hands requests on to a server; `mode` says what goes wrong.

    Modes: "up"; "500", "401", "403" answer so; "hang" takes a request and never answers; "deaf"
    hands it on and never answers, so that it happens though nobody hears of it; "down" refuses
    connections.

    Args:
        target: Address of the server behind.
    """

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.mode = "up"
        self.only = ""  # requests whose path has this fail, others do not
        self.requests: list[str] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._server: ThreadingHTTPServer | None = None
        self.turn("up")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def turn(self, mode: str, only: str = "") -> None:
        """Fail from now on in this way."""
        self.mode, self.only = mode, only
        if mode == "down" and self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        elif mode != "down" and self._server is None:
            faulty = self

            class Handler(BaseHTTPRequestHandler):
                def log_message(self, *_args: object) -> None:
                    pass

                def answer(self) -> None:
                    faulty.answer(self)

                do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

            class Server(ThreadingHTTPServer):
                daemon_threads, allow_reuse_address, block_on_close = True, True, False

                def handle_error(self, *_args: object) -> None:
                    pass

            self._server = Server(("127.0.0.1", self.port), Handler)
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        mode = self.mode if self.only in handler.path else "up"
        self.requests.append(f"{mode} {handler.command} {handler.path}")
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if mode.isdigit():
            handler.send_response(int(mode))
            handler.send_header("Content-Length", "6")
            handler.end_headers()
            handler.wfile.write(b"sorry\n")
            return
        if mode == "hang":
            time.sleep(HANG)
            return
        behind = http.client.HTTPConnection(str(self.target.hostname), self.target.port)
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in SKIPPED}
        behind.request(handler.command, handler.path, body or None, headers)
        found = behind.getresponse()
        content = found.read()
        if mode == "deaf":
            time.sleep(HANG)
            return
        with suppress(OSError):
            handler.send_response(found.status)
            for name, value in found.getheaders():
                if name.lower() not in {*SKIPPED, "content-length"}:
                    handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)


@contextmanager
def faulty(target: str) -> Iterator[Faulty]:
    """One before `target`, to the end of the block."""
    server = Faulty(target)
    try:
        yield server
    finally:
        server.turn("down")
