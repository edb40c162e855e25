"""A class's progress on the wall: takes the lines of those who joined with this address, and shows them as they come.

`python -m tools.board` prints the address for `gk.course.join("nickname", board="http://…")`. Everyone on the local
network can see the page and send lines to it: nicknames, exercises, minutes and named mistakes, no code. The lines are
kept in a file; a second start with the same file goes on with it.
"""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import typer

from grpo_kit.config import KitError
from grpo_kit.course.progress import LONGEST, class_page, parsed

LONGEST_LINE = 2_000  # bytes
MOST_LINES = 20_000
REFRESH = b'<meta http-equiv="refresh" content="5">'
WAITING = "<!DOCTYPE html><html lang='en'><title>Class</title><h1>Nobody has checked an exercise yet</h1></html>"


class Board(ThreadingHTTPServer):
    """The server; lines go to `file`, each once."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], file: Path) -> None:
        super().__init__(address, Handler)
        self.file, self.lock = file, threading.Lock()
        self.lines = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()

    def add(self, line: str) -> bool:
        """Keep a line, unless it is no line of progress or there are too many; whether it is kept."""
        row = parsed(line)
        if row is None or len(row["nickname"]) > LONGEST or len(line.splitlines()) != 1:
            return False
        with self.lock:
            if line not in self.lines and len(self.lines) < MOST_LINES:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
                self.lines.add(line)
        return line in self.lines

    def page(self) -> bytes:
        """The page of the class as it is now, which a browser asks for again after some seconds."""
        out = self.file.with_suffix(".html")
        with self.lock:
            try:
                class_page([self.file], out)
                text = out.read_bytes()
            except KitError:
                text = WAITING.encode()
        return text.replace(b"<title>", REFRESH + b"<title>", 1)


class Handler(BaseHTTPRequestHandler):
    """GET gives the page, POST takes one line."""

    server: Board
    timeout = 10

    def do_GET(self) -> None:
        """Answer with the page, whatever the path is."""
        self._answer(200, self.server.page())

    def do_POST(self) -> None:
        """Take a line of progress; 400 for anything else."""
        try:
            length = int(self.headers.get("Content-Length", ""))
            good = 0 < length <= LONGEST_LINE and self.server.add(self.rfile.read(length).decode("utf-8"))
        except ValueError:  # no number, or no text
            good = False
        self._answer(204 if good else 400, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is logged of who asked."""


def main(
    file: Annotated[Path, typer.Option(help="where the lines are kept")] = Path("board.jsonl"),
    host: Annotated[str, typer.Option(help="127.0.0.1: this machine alone")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="of the address")] = 8765,
) -> None:
    """Serve the board until Ctrl-C."""
    try:
        board = Board((host, port), file)
    except OSError as error:
        raise typer.BadParameter(f"port {port} on {host}: {error.strerror}; name another --port") from None
    address = f"http://{host if host != '0.0.0.0' else own_address()}:{board.server_port}"
    typer.echo(f'the board: {address}   learners: gk.course.join("nickname", board="{address}")   Ctrl-C ends it')
    try:
        board.serve_forever()
    except KeyboardInterrupt:
        typer.echo(f"{len(board.lines)} lines in {file}")
    finally:
        board.server_close()


def own_address() -> str:
    """This machine's address on the local network, by the route that leads out; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737)
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


if __name__ == "__main__":
    typer.run(main)
