"""`grpo-kit push` against a server that speaks the hub's few calls: what arrives, and what each failure says."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment
from grpo_kit.runs.card import save_with_card
from grpo_kit.runs.push import plan_upload


class Hub(ThreadingHTTPServer):
    """The hub's answers to create, preupload and commit; it keeps the files that arrive."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.refuse = 0  # the status to answer everything with, where it is not 0


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        if self.server.refuse:
            return self._answer({"error": "no"}, self.server.refuse)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"http://{self.headers['Host']}/somebody/policy", "id": "somebody/policy"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer({"files": [how | {"path": file["path"]} for file in json.loads(body)["files"]]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer({"commitUrl": f"http://{self.headers['Host']}/somebody/policy/commit/1", "commitOid": "1"})

    def do_GET(self) -> None:
        self._answer({}, self.server.refuse or 404)

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        return found

    def _answer(self, data: dict, status: int = 200) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def run(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a policy and its card."""
    folder = tmp_path_factory.mktemp("pushed") / "run"
    save_with_card(kit.policy, kit.config, folder / "best", iteration=3)
    load_config("tiny").save(folder / "config.json")
    return folder


def _push(run: Path, address: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "grpo_kit.cli", "push", str(run), *(options or ("somebody/policy", "--yes"))]
    own = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HOME": str(run / "home")}
    environment = {name: value for name, value in (os.environ | own | variables).items() if value}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, input="n\n")


def _one_line(found: subprocess.CompletedProcess) -> str:
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "Traceback" not in found.stderr, found.stderr
    return found.stderr


def test_what_arrives_is_the_policy_with_its_card(run: Path, hub: Hub):
    found = _push(run, f"http://127.0.0.1:{hub.server_port}", "somebody/policy", "--private", "--yes")
    assert found.returncode == 0, found.stderr
    assert "MB, to somebody/policy: README.md" in found.stdout and "uploaded: http" in found.stdout
    (created,) = hub.created
    assert created["name"] == "policy" and (created.get("private") or created.get("visibility") == "private")
    sent = {file.relative_to(run / "best").as_posix(): file.read_bytes() for file in (run / "best").rglob("*.*")}
    assert sent.items() <= hub.files.items() and b"hf_test" not in b"".join(hub.files.values())


def test_nothing_is_uploaded_before_somebody_says_yes(run: Path, hub: Hub):
    found = _push(run, f"http://127.0.0.1:{hub.server_port}", "somebody/policy")
    assert found.returncode == 1 and "Upload?" in found.stdout
    assert not hub.created and not hub.files


def test_each_failure_is_one_line(run: Path, hub: Hub):
    address = f"http://127.0.0.1:{hub.server_port}"
    assert "HF_HUB_OFFLINE is set" in _one_line(_push(run, address, HF_HUB_OFFLINE="1"))
    assert "no token on this machine" in _one_line(_push(run, address, HF_TOKEN=""))
    assert "cannot be reached" in _one_line(_push(run, "http://127.0.0.1:9"))
    hub.refuse = 403
    assert "the hub answered 403 for somebody/policy; log in again" in _one_line(_push(run, address))
    assert not hub.files


@pytest.mark.parametrize("name", ["a/b/c", "white space", "", "../up", "-x/y"])
def test_a_name_that_is_no_repositorys_is_refused_before_anything_else(run: Path, name: str):
    with pytest.raises(Exception, match=r"repository '.*': allowed: owner/name") as error:
        plan_upload(run, name)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_there_is_one_line(run: Path):
    with pytest.raises(Exception, match=r"iter_000007: no policy there; checkpoints: none"):
        plan_upload(run, "somebody/policy", checkpoint=7)
