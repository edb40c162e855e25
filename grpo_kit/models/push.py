"""Putting a trained policy onto the Hugging Face hub, which happens only where somebody asks for it."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from grpo_kit.config import KitError
from grpo_kit.models.card import CARD
from grpo_kit.runs.iterations import checkpoints_of, iteration_name


class PushError(KitError):
    """A policy that cannot be uploaded; the message says what to do."""


@dataclass(frozen=True)
class Upload:
    """What would be uploaded, and where to."""

    folder: Path
    repo_id: str
    files: tuple[Path, ...]
    private: bool = False

    @property
    def names(self) -> list[str]:
        """The files as the repository will call them."""
        return [file.relative_to(self.folder).as_posix() for file in self.files]

    @property
    def megabytes(self) -> float:
        """Their size together."""
        return sum(file.stat().st_size for file in self.files) / 1e6

    def __str__(self) -> str:
        place = f"{self.repo_id} ({'private' if self.private else 'public'} where it is new)"
        return f"{len(self.files)} files, {self.megabytes:.1f} MB, to {place}: {', '.join(self.names)}"


def plan_upload(run: Path, repo_id: str, checkpoint: int | None = None, *, private: bool = False) -> Upload:
    """Check what can be checked without a network: the policy is there and whole, the name can be a repository's.

    Args:
        run: its folder.
        repo_id: "name" or "owner/name".
        checkpoint: an iteration whose checkpoint is meant; `best/` where None.
        private: create the repository as a private one; one that is there stays as it is.

    Raises:
        KitError: no such policy, or no name for a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise PushError(
            f"repository {repo_id!r:.100}: allowed: owner/name, of letters, digits, '-', '_', '.'"
        ) from None
    policy = run / "best" if checkpoint is None else _checkpoint(run, checkpoint)
    if not policy.is_dir():
        raise PushError(f"{policy}: no policy there; {_there(run)}. Train one, or name a --checkpoint")
    if not (policy / CARD).is_file():
        raise PushError(
            f"{policy}: has no model card ({CARD}), as an earlier version of the kit left it. Write one, or train anew"
        )
    files = sorted(file for file in policy.rglob("*") if file.is_file() and not _hidden(file, policy))
    return Upload(policy, repo_id, tuple(files), private)


def _checkpoint(run: Path, iteration: int) -> Path:
    """The policy of a checkpoint that verifies."""
    from grpo_kit.runs.checkpoint import load_checkpoint  # here, since it loads torch

    place = run / "checkpoints" / iteration_name(iteration)
    if not place.is_dir():
        raise PushError(f"{place}: no policy there; {_there(run)}. Name another --checkpoint")
    return load_checkpoint(place).policy


def _there(run: Path) -> str:
    return f"checkpoints: {', '.join(map(str, checkpoints_of(run / 'checkpoints'))) or 'none'}"


def _hidden(file: Path, folder: Path) -> bool:
    """Whether a file is none of the policy's: an editor's, a desktop's."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def push_policy(upload: Upload) -> str:
    """Create the repository if need be and upload; returns its address.

    Raises:
        PushError: offline, not logged in, not allowed, or the hub cannot be reached or refuses what it gets.
    """
    if constants.HF_HUB_OFFLINE:
        raise PushError("push: HF_HUB_OFFLINE is set, so nothing is uploaded. Unset it to go on")
    if get_token() is None:
        raise PushError("push: no token on this machine. Log in with `hf auth login`, or set HF_TOKEN")
    hub = HfApi()
    try:
        address = hub.create_repo(upload.repo_id, private=upload.private, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=upload.folder,
            allow_patterns=upload.names,
            commit_message="Policy trained with grpo_kit",
        )
    except (
        Exception
    ) as error:  # the library that the hub's client is built on has its own kinds for a network's failures
        raise PushError(f"push: not uploaded to {upload.repo_id}: {_failure(error)}") from error
    return str(address)


def _failure(error: Exception) -> str:
    """What went wrong, and what to do about it."""
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        reason = _one_line(error.server_message or "")
        return f"the hub answered {code}{f' ({reason})' if reason else ''}; {_advice(code)}"
    if isinstance(error, ValueError) and CARD in str(error):
        return f"the hub refuses the card ({_one_line(error)}); mend the lines at the head of {CARD}"
    return f"{type(error).__name__}: {_one_line(error)}; check the network, and that {constants.ENDPOINT} is the hub"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]


def _advice(code: int) -> str:
    if code in (401, 403):
        return "log in with a token that may write there (`hf auth login`)"
    if code == 404:
        return "check the owner's name, and that the token may write there"
    return "try again later" if code >= 500 or code == 429 else "mend that and try again"
