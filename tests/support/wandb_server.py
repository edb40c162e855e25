"""What `wandb sync` needs of a wandb server, on this machine: it keeps what it is sent."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Received:
    """Where the server is, and what it was sent."""

    url: str
    run_ids: list[str] = field(default_factory=list)
    history: dict[int, dict] = field(default_factory=dict)  # place in the history → line
    files: dict[str, bytes] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)  # names of the artifacts that hold them

    def answer(self, query: str, variables: dict) -> dict:
        """GraphQL's `data` for what the client asks; all that it does not need is left out."""
        data: dict = {"serverInfo": {"features": []}} if "serverInfo" in query else {}
        if "upsertBucket" in query:
            self.run_ids.append(variables.get("name") or self.run_ids[-1])
            project = {"id": "1", "name": variables.get("project") or "p", "entity": {"id": "1", "name": "me"}}
            known = {"config": "{}", "historyLineCount": len(self.history)}
            data["upsertBucket"] = {"bucket": {"id": "1", "name": self.run_ids[-1], "project": project, **known}}
        if "createArtifact(" in query:  # as though it were there already: its content comes as a file of the run, too
            self.tables.append(variables["input"]["artifactCollectionName"])
            artifact = {"id": "1", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "1"}}}
            data["createArtifact"] = {"artifact": artifact}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            data["createRunFiles"] = {"runID": "1", "uploadHeaders": [], "files": files}
        return data

    def stream(self, parts: dict) -> None:
        """Lines of the history, each with its place."""
        sent = parts.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for place, line in enumerate(sent["content"], start=sent["offset"]):
            self.history[place] = json.loads(line)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: Received

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        reply: dict = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            reply = {"data": self.received.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.startswith("/upload/"):
            self.received.files[self.path.removeprefix("/upload/")] = body
        elif self.path.endswith("/file_stream"):
            self.received.stream(json.loads(body))
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _handle


@contextmanager
def wandb_server() -> Iterator[Received]:
    """A server on a free port of this machine, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    received = Received(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"received": received})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
