"""A real HTTP server in this process that answers JSON with JSON, and can be told to fail as servers do."""

import itertools
import json
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "reset", "hang", "garbage")


@dataclass
class Raw:
    """An answer that is given as it is."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """Where it is, what it was asked, and how it failed."""

    url: str = ""
    calls: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)  # path, headers, body
    faults: list[str] = field(default_factory=list)


@contextmanager
def serving(answer: Callable[[Any], object], fault_rate: float = 0.0, seed: int = 0) -> Iterator[Server]:
    """A server on a free port; `fault_rate` of its calls fail, by each of `FAULTS` in turn.

    Args:
        answer: what came → what goes back: JSON, a `Raw`, or the name of a fault.
    """
    server, over, lock = Server(), threading.Event(), threading.Lock()
    chance, kinds = random.Random(seed), itertools.cycle(FAULTS)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                fault = next(kinds) if chance.random() < fault_rate else None
                server.calls.append((self.path, dict(self.headers), asked))
            found = fault or answer(asked)
            if isinstance(found, str):
                server.faults.append(found)
            self.send(found)

        def send(self, found: object) -> None:
            if found == "hang":
                over.wait()
                self.close_connection = True
                return
            if found == "drip":  # bytes for ever, each soon enough for a limit that counts from the last
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                while not over.wait(0.02):
                    self.wfile.write(b" ")
            if found == "reset":  # closed without a goodbye
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.shutdown(socket.SHUT_RD)
                self.connection.close()
                self.close_connection = True
                return
            if found == "500":
                found = Raw(500, b"<html>Internal Server Error</html>", {"Content-Type": "text/html"})
            if found == "garbage":
                found = Raw(200, b'{"scores": [0.1, 0.', {"Content-Type": "application/json"})
            if not isinstance(found, Raw):
                found = Raw(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
            self.send_response(found.status)
            for name, value in {"Content-Length": str(len(found.body)), **found.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(found.body)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """A client that went away is no news."""

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_port}"
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            over.set()
            listening.shutdown()
