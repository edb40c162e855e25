"""Putting a trained policy onto the Hugging Face hub, which happens only where somebody asks for it."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from grpo_kit.config import KitError
from grpo_kit.runs.card import CARD
from grpo_kit.runs.checkpoint import load_checkpoint
from grpo_kit.runs.folder import RunFolder


class PushError(KitError):
    """A policy that cannot be uploaded; the message says what to do."""


@dataclass(frozen=True)
class Upload:
    """What would be uploaded, and where to."""

    folder: Path
    repo_id: str
    files: tuple[Path, ...]

    @property
    def megabytes(self) -> float:
        """Their size together."""
        return sum(file.stat().st_size for file in self.files) / 1e6

    def __str__(self) -> str:
        names = ", ".join(file.relative_to(self.folder).as_posix() for file in self.files)
        return f"{len(self.files)} files, {self.megabytes:.1f} MB, to {self.repo_id}: {names}"


def plan_upload(run: Path, repo_id: str, checkpoint: int | None = None) -> Upload:
    """Check what can be checked without a network: the policy is there and whole, the name can be a repository's.

    Args:
        run: its folder.
        repo_id: "name" or "owner/name".
        checkpoint: an iteration whose checkpoint is meant; `best/` where None.

    Raises:
        KitError: no such policy, or no name for a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise PushError(
            f"repository {repo_id!r:.100}: allowed: owner/name, of letters, digits, '-', '_', '.'"
        ) from None
    folder = RunFolder(run)
    place = folder.best if checkpoint is None else folder.checkpoints / f"iter_{checkpoint:06d}"
    if not place.is_dir():
        there = ", ".join(sorted(found.name for found in folder.checkpoints.glob("iter_*"))) or "none"
        raise PushError(f"{place}: no policy there; checkpoints: {there}. Train one, or name another --checkpoint")
    policy = place if checkpoint is None else load_checkpoint(place).policy
    if not (policy / CARD).is_file():
        raise PushError(f"{policy}: has no model card ({CARD}). Evaluate or train the run with this version of the kit")
    return Upload(policy, repo_id, tuple(sorted(file for file in policy.rglob("*") if file.is_file())))


def push_policy(upload: Upload, private: bool = False) -> str:
    """Create the repository if need be and upload; returns its address.

    Raises:
        PushError: offline, not logged in, not allowed, or the hub cannot be reached.
    """
    if constants.HF_HUB_OFFLINE:
        raise PushError("push: HF_HUB_OFFLINE is set, so nothing is uploaded. Unset it to go on")
    if get_token() is None:
        raise PushError("push: no token on this machine. Log in with `hf auth login`, or set HF_TOKEN")
    hub = HfApi()
    try:
        address = hub.create_repo(upload.repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id, folder_path=upload.folder, commit_message="Policy trained with grpo_kit"
        )
    except HfHubHTTPError as error:
        code = error.response.status_code
        advice = "log in again with a token that may write" if code in (401, 403) else "try again later"
        raise PushError(f"push: the hub answered {code} for {upload.repo_id}; {advice}") from error
    except Exception as error:  # a network's failures, of the kinds of the library that the hub's client is built on
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise PushError(f"push: {constants.ENDPOINT} cannot be reached ({reason}); check the network") from error
    return str(address)
