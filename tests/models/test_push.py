"""`grpo-kit push` against a server that speaks the hub's few calls: what arrives, and what each failure says."""

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import validate_repo_id
from support.config_files import save_config

from grpo_kit.cli import main
from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.card import save_with_card
from grpo_kit.models.push import plan_upload
from grpo_kit.runs.checkpoint import save_checkpoint

TOKEN = "hf_canary"


class Hub(ThreadingHTTPServer):
    """The hub's answers to create, validate-yaml, preupload, LFS and commit; it keeps what was committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict] = []
        self.stored: dict[str, bytes] = {}  # large files by their hash
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse = 0  # the status to answer everything with, where it is not 0


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuse:
            return self._answer({"error": "No write\naccess here"}, self.server.refuse)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"{self.server.address}/somebody/policy", "id": "somebody/policy"})
        if self.path == "/api/validate-yaml":
            errors = [{"message": text} for text in _wrong(json.loads(body)["content"])]
            return self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        if "/preupload/" in self.path:
            return self._answer({"files": [_how(file["path"]) for file in json.loads(body)["files"]]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [one | {"actions": self._place(one["oid"])} for one in json.loads(body)["objects"]]
            return self._answer({"transfer": "basic", "objects": objects})
        return self._commit([json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.rsplit("/", 1)[1]
        self.server.stored[self.path.rsplit("/", 1)[1]] = content
        self._answer({})

    def do_GET(self) -> None:
        self._answer({}, self.server.refuse or 404)

    def _place(self, oid: str) -> dict:
        return {"upload": {"href": f"{self.server.address}/store/{oid}", "header": {}}}

    def _commit(self, lines: list[dict]) -> None:
        for line in lines:
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                self.server.files[line["value"]["path"]] = self.server.stored[line["value"]["oid"]]
        self._answer({"commitUrl": f"{self.server.address}/somebody/policy/commit/1", "commitOid": "1"})

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


def _how(path: str) -> dict:
    """Weights are large files, as the hub has it."""
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


def _wrong(card: str) -> list[str]:
    """The hub's objection to a base model that is none of its own."""
    base = ModelCard(card).data.base_model
    try:
        return [] if base is None else validate_repo_id(base) or []
    except ValueError:
        return [f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.']


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def run(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a policy and its card, a checkpoint, and a file that an editor left."""
    folder = tmp_path_factory.mktemp("pushed") / "run"
    save_with_card(kit.policy, kit.config, folder / "best", iteration=3)
    (folder / "best" / ".README.md.swp").write_text("an editor's")
    optimizer = torch.optim.AdamW(kit.policy.trainable_parameters()).state_dict()
    save_checkpoint(
        folder / "checkpoints", 5, lambda place: save_with_card(kit.policy, kit.config, place, 5), optimizer
    )
    save_config(load_config("tiny"), folder / "config.json")
    return folder


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def one_line(self) -> str:
        """The line that it failed with."""
        assert self.returncode == 2 and self.stderr.count("\n") == 1 and "Traceback" not in self.stderr, self.stderr
        assert TOKEN not in self.stdout + self.stderr
        return self.stderr


@pytest.fixture
def push(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> Callable[..., Said]:
    """The command in this process, whose hub's client has what the variables of a new one would tell it."""

    def pushed(address: str, *options: str, offline: bool = False, token: str = TOKEN, folder: Path = run) -> Said:
        known = {"ENDPOINT": address, "HF_HUB_OFFLINE": offline, "HF_TOKEN_PATH": str(tmp_path / "no token")}
        known |= {"HF_HUB_DISABLE_XET": True}  # large files by LFS, which a small server can speak
        for name, value in known.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
        capsys.readouterr()
        try:
            main(["push", str(folder), *(options or ("somebody/policy", "--yes"))])
        except SystemExit as ended:
            return Said(int(ended.code or 0), *capsys.readouterr())
        pytest.fail("the command line ends with an exit code")

    return pushed


def _content(folder: Path) -> dict[str, bytes]:
    """A policy's own files, by their names in it."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_what_arrives_is_the_policy_with_its_card_and_nothing_else(run: Path, hub: Hub):
    command = [sys.executable, "-m", "grpo_kit.cli", "push", str(run), "somebody/policy", "--private", "--yes"]
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(run / "home")}
    environment = os.environ | own | {"HF_HUB_DISABLE_XET": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    said, uploaded = found.stdout.splitlines()
    content = _content(run / "best")
    size = f"{len(content)} files, {sum(map(len, content.values())) / 1e6:.1f} MB"
    assert said == f"{size}, to somebody/policy (private where it is new): {', '.join(sorted(content))}"
    assert uploaded == f"uploaded: {hub.address}/somebody/policy"
    (created,) = hub.created
    assert created["name"] == "policy" and (created.get("private") or created.get("visibility") == "private")
    assert hub.files == content and list(hub.stored.values()) == [content["model.safetensors"]]
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN.encode() not in b"".join(hub.files.values())


def test_a_checkpoints_policy_is_uploaded_without_its_optimizer(run: Path, hub: Hub, push: Callable[..., Said]):
    found = push(hub.address, "somebody/policy", "--checkpoint", "5", "--yes")
    assert found.returncode == 0, found.stderr
    assert hub.files == _content(run / "checkpoints" / "iter_000005" / "policy")


def test_nothing_is_uploaded_before_somebody_says_yes(hub: Hub, push: Callable[..., Said]):
    found = push(hub.address, "somebody/policy")
    assert found.returncode == 1 and "(public where it is new)" in found.stdout and "Upload?" in found.stdout
    assert not hub.created and not hub.files and not hub.tokens


@pytest.mark.parametrize(
    ("changes", "refusal", "said"),
    [
        ({"offline": True}, 0, "HF_HUB_OFFLINE is set"),
        ({"token": ""}, 0, "no token on this machine"),
        ({"address": "http://127.0.0.1:9"}, 0, "check the network, and that http://127.0.0.1:9 is the hub"),
        ({}, 403, "the hub answered 403 (No write access here); log in with a token that may write there"),
        ({}, 404, "the hub answered 404 (No write access here); check the owner's name"),
    ],
)
def test_each_failure_is_one_line(hub: Hub, push: Callable[..., Said], changes: dict, refusal: int, said: str):
    hub.refuse = refusal
    assert said in push(**{"address": hub.address} | changes).one_line
    assert not hub.files


def test_a_card_that_the_hub_refuses_is_one_line_that_says_why(
    run: Path, hub: Hub, push: Callable[..., Said], tmp_path: Path
):
    own = Path(shutil.copytree(run, tmp_path / "own"))
    card = own / "best" / "README.md"
    card.write_text(card.read_text().replace("library_name:", "base_model: data/shapeworld/policy\nlibrary_name:"))
    said = push(hub.address, folder=own).one_line
    assert (
        "the hub refuses the card" in said and '"base_model" with value "data/shapeworld/policy" is not valid' in said
    )
    assert not hub.files


@pytest.mark.parametrize("name", ["a/b/c", "white space", "", "../up", "-x/y"])
def test_a_name_that_is_no_repositorys_is_refused_before_anything_else(run: Path, name: str):
    with pytest.raises(Exception, match=r"repository '.*': allowed: owner/name") as error:
        plan_upload(run, name)
    assert "\n" not in str(error.value)


def test_a_policy_that_is_not_there_or_not_whole_is_one_line(run: Path, tmp_path: Path):
    with pytest.raises(Exception, match=r"iter_000007: no policy there; checkpoints: 5\. Name another --checkpoint"):
        plan_upload(run, "somebody/policy", checkpoint=7)
    with pytest.raises(Exception, match=r"best: no policy there; checkpoints: none"):
        plan_upload(tmp_path, "somebody/policy")
    own = Path(shutil.copytree(run, tmp_path / "own"))
    (own / "best" / "README.md").unlink()
    with pytest.raises(Exception, match=r"best: has no model card \(README\.md\)"):
        plan_upload(own, "somebody/policy")
    weights = own / "checkpoints" / "iter_000005" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(Exception, match=r"iter_000005: policy/model\.safetensors is damaged"):
        plan_upload(own, "somebody/policy", checkpoint=5)
