"""A trained policy for others: uploaded to the Hugging Face hub when the user asks for it, or as whole weights."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from grpo_kit.config import KitError, load_config, one_line
from grpo_kit.models.adapters import merged
from grpo_kit.models.card import CARD, load_card, save_with_card
from grpo_kit.runs.checkpoint import load_checkpoint
from grpo_kit.runs.durable import flush_tree, remove, replace
from grpo_kit.runs.iterations import checkpoints_of, iteration_name
from grpo_kit.runs.own_rewards import recorded_rewards


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

    def __str__(self) -> str:
        place = f"{self.repo_id} ({'private' if self.private else 'public'} where it is new)"
        megabytes = sum(file.stat().st_size for file in self.files) / 1e6
        return f"{len(self.files)} files, {megabytes:.1f} MB, to {place}: {', '.join(self.names)}"


def plan_upload(run: Path, repo_id: str, checkpoint: int | None = None, *, private: bool = False) -> Upload:
    """Find the files to upload, and check without a network that they are complete and the repository's name is valid.

    Args:
        repo_id: "name" or "owner/name"; one that exists stays as private as it is.
        checkpoint: the iteration of a checkpoint; None means the policy in `best/`.

    Raises:
        KitError: no such policy, a damaged file, or an invalid name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise KitError(f"repository {repo_id!r:.100}: allowed: owner/name, of letters, digits, '-', '_', '.'") from None
    policy = run / "best" if checkpoint is None else run / "checkpoints" / iteration_name(checkpoint)
    if not policy.is_dir():
        others = ", ".join(map(str, checkpoints_of(run / "checkpoints"))) or "none"
        raise KitError(f"{policy}: no policy there; checkpoints: {others}. Name another --checkpoint, or train one")
    if checkpoint is not None:
        policy = load_checkpoint(policy).policy
    if not (policy / CARD).is_file():
        raise KitError(f"{policy}: has no model card ({CARD}). Write one, or train anew")
    files = {file: file.relative_to(policy).parts for file in sorted(policy.rglob("*")) if file.is_file()}
    shown = (file for file, parts in files.items() if not any(part.startswith(".") for part in parts))
    return Upload(policy, repo_id, tuple(shown), private)


def push_policy(upload: Upload) -> str:
    """Create the repository if need be and upload; returns its address.

    Raises:
        KitError: offline, not logged in, not allowed, or the hub cannot be reached or refuses the files.
    """
    if constants.HF_HUB_OFFLINE:
        raise KitError("push: HF_HUB_OFFLINE is set, so nothing is uploaded. Unset it to go on")
    if get_token() is None:
        raise KitError("push: no token on this machine. Log in with `hf auth login`, or set HF_TOKEN")
    hub = HfApi()
    try:
        address = hub.create_repo(upload.repo_id, private=upload.private, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=upload.folder,
            allow_patterns=upload.names,
            commit_message="Policy trained with grpo_kit",
        )
    except Exception as error:  # the client's own, and those of the HTTP library below it
        raise KitError(f"push: not uploaded to {upload.repo_id}: {_failure(error)}") from error
    return str(address)


def _failure(error: Exception) -> str:
    """What went wrong, and what to do about it."""
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        reason = f" ({one_line(error.server_message)})" if error.server_message else ""
        log_in = "log in with a token that may write there (`hf auth login`)"
        known = {401: log_in, 403: log_in, 404: "check the owner's name, and that the token may write there"}
        other = "try again later" if code >= 500 or code == 429 else "correct that and try again"
        return f"the hub answered {code}{reason}; {known.get(code, other)}"
    if isinstance(error, ValueError) and CARD in str(error):
        return f"the hub refuses the card ({one_line(error)}); correct the lines at the head of {CARD}"
    return f"{type(error).__name__}: {one_line(error)}; check the network, and that {constants.ENDPOINT} is the hub"


def merge_run(run: Path, out: Path | None = None) -> Path:
    """Write the policy of a run's `best/` whole, for servers that take no adapter, with its card; returns where.

    Args:
        out: a new folder; None means `merged/` in the run.

    Raises:
        KitError: there is no adapter, the folder is there already, or the adapter cannot be merged.
    """
    from grpo_kit.models.policy import load_policy  # here, since it loads transformers' models

    best, place = run / "best", run / "merged" if out is None else out.expanduser().resolve()
    if not (best / "adapter_config.json").is_file():
        found = "holds whole weights: use it as it is" if (best / "config.json").is_file() else "no policy there"
        raise KitError(f"{best}: {found}. Allowed: a run that trained with model_settings.lora")
    if place.exists():
        raise KitError(f"--out {place}: is there already. Remove it, or name a new folder")
    iteration = load_card(best).data.to_dict().get("iteration", 0) if (best / CARD).is_file() else 0
    config = load_config(run, {"model_settings.base_8bit": False})
    policy = load_policy(config, best)
    policy.model = merged(policy.model)
    aside = place.with_name(f".writing-{place.name}")
    remove(aside)
    whole = load_config(config, {"model_settings.lora": None})
    save_with_card(policy, whole, aside, iteration, rewards=recorded_rewards(run))
    flush_tree(aside)
    replace(aside, place)
    return place
