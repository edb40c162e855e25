"""Models of the hub that do not load: one line that says which, why, and what to do about it."""

from collections.abc import Collection, Iterator
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from grpo_kit.config.errors import KitError, one_line

_MIRRORS = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
_OPEN = {  # of the same kind as those that people meet a licence at; none of them asks for one
    "sd_model": "stabilityai/stable-diffusion-xl-base-1.0, stable-diffusion-v1-5/stable-diffusion-v1-5",
    "vlm_model": "Qwen/Qwen2.5-VL-3B-Instruct, HuggingFaceTB/SmolVLM-500M-Instruct",
}
_GATED = ("stabilityai/stable-diffusion-3", "black-forest-labs/FLUX.1-dev", "meta-llama/", "google/gemma-")


class ModelError(KitError):
    """A model that cannot be loaded or used; the message says what to do."""


def require_weights(missing: Collection[str], setting: str, name: str, part: str = "model") -> None:
    """Raise where weights of a model came from no file: the libraries warn, and draw them at random.

    Raises:
        ModelError: `missing`, the names of such weights, is not empty; the line names the `setting`.
    """
    if missing:
        raise ModelError(
            f"{setting}: found {name!r} without {len(missing)} weights of its {part} ({min(missing)} …), which would "
            "be random; a file there is damaged or of another model: fetch it again, or take a folder that "
            "save_pretrained wrote"
        )


def load_failure(setting: str, name: str, error: Exception, repository: str | None = None) -> str:
    """One line for a model that did not load: which, why, and what to do about it.

    Args:
        setting: the key of `model_settings` that named it, or another dotted place.
        repository: where the hub has it, if its name does not say so.
    """
    place = setting if "." in setting else f"model_settings.{setting}"
    advice = _advice(setting, repository or name, error)
    return f"{place}: could not load {name!r} ({type(error).__name__}: {one_line(error, 300)}); {advice}"


def _advice(setting: str, name: str, error: Exception) -> str:
    """What to do about a model that did not load, by what the hub answered, deep down in the error."""
    kinds = {type(cause) for cause in _causes(error)}
    repository = "/".join(name.removeprefix("hf-hub:").split("/")[:2])  # what comes behind is a file in it
    page = f"https://huggingface.co/{repository}"
    if Path(name).is_dir():
        return "a file there is missing or damaged: restore it (git checkout), or train it again (make models)"
    if Path(name).is_absolute():
        return "there is no such folder on this machine: check the path, or give a hub id"
    if name in _MIRRORS:
        return (
            f"its owner took it off the hub, where the same weights are {(mirror := _MIRRORS[name])!r}: set that, and "
            f"fetch it once where there is network (`hf download {mirror}`)"
        )
    if GatedRepoError in kinds:
        others = f", or take one that asks for no licence: {_OPEN[setting]}" if setting in _OPEN else ""
        return f"accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN{others}"
    if RepositoryNotFoundError in kinds:
        return (
            f"check the name: the hub shows no {page}; where it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    gated = f" (it asks for a licence first, at {page}, and for HF_TOKEN)" if name.startswith(_GATED) else ""
    return (
        f"check the name, or the folder; fetch a model once where there is network (`hf download {repository}`)"
        f"{gated}, or take HF_HOME along from there; without network use profile tiny"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
