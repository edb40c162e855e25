"""Models that do not load: one error line that says which model, why, and what to do."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from grpo_kit.config.errors import KitError, one_line
from grpo_kit.config.paths import PROJECT_ROOT

_MIRRORS = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
_OPEN = {  # models of the same kind that ask for no licence
    "model_settings.sd_model": "stabilityai/stable-diffusion-xl-base-1.0, stable-diffusion-v1-5/stable-diffusion-v1-5",
    "model_settings.vlm_model": "Qwen/Qwen2.5-VL-3B-Instruct, HuggingFaceTB/SmolVLM-500M-Instruct",
}
_GATED = ("stabilityai/stable-diffusion-3", "black-forest-labs/FLUX.1-dev", "meta-llama/", "google/gemma-")


class ModelError(KitError):
    """A model that cannot be loaded or used; the message says what to do."""


def require_weights(missing: Collection[str], setting: str, name: str, part: str = "model") -> None:
    """A `ModelError` where weights of a model, `missing`, are in no file: libraries only warn, and make them random."""
    if missing:
        found = f"{setting}: found {name!r} without {len(missing)} weights of its {part} ({min(missing)} …)"
        advice = "fetch it again, or take a folder that save_pretrained wrote"
        raise ModelError(f"{found}, which would be random; a file there is damaged or of another model: {advice}")


def load_failure(setting: str, name: str, error: Exception, repository: str | None = None) -> ModelError:
    """The error for a model that did not load: which, why, and what to do; of a file, `repository` is where it is."""
    advice = _advice(setting, repository or name, error)
    return ModelError(f"{setting}: could not load {name!r} ({type(error).__name__}: {one_line(error, 300)}); {advice}")


@contextmanager
def loading(setting: str, name: str, repository: str | None = None) -> Iterator[None]:
    """Whatever a library raises meanwhile becomes the one line of `load_failure`; the kit's own errors stay."""
    try:
        yield
    except KitError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds
        raise load_failure(setting, name, error, repository) from error


def load_whole(kind: Any, name: str, setting: str, part: str = "model", **options: object) -> Any:
    """A model by `kind.from_pretrained` of transformers, all of whose weights are in its files.

    Raises:
        ModelError: it cannot be loaded, or lacks weights.
    """
    with loading(setting, name):
        model, found = kind.from_pretrained(name, output_loading_info=True, **options)
    require_weights(found["missing_keys"], setting, name, part)
    return model


def how_to_restore(folder: str | Path) -> str:
    """What to do about a damaged folder: the repository's own come back by git, others from where they came from."""
    if any(Path(folder).is_relative_to(PROJECT_ROOT / "data" / own) for own in ("shapeworld", "demo_run")):
        is_checkout = (PROJECT_ROOT / "Makefile").is_file()
        return "restore it (git checkout), or train it again: make models" if is_checkout else "install the kit again"
    return "fetch or copy it again, or take a folder that save_pretrained wrote"


def _advice(setting: str, name: str, error: Exception) -> str:
    """What to do, by the kind of name and by what the hub answered."""
    repository = "/".join(name.removeprefix("hf-hub:").split("/")[:2])  # the rest is a file in the repository
    page = f"https://huggingface.co/{repository}"
    if Path(name).exists():
        return f"a file there is missing or damaged: {how_to_restore(name)}"
    if Path(name).is_absolute():
        return "there is no such folder on this machine: check the path, or give a hub id"
    if mirror := _MIRRORS.get(name):
        return f"its owner removed it from the hub, where the same weights are {mirror!r}: `hf download` and set that"
    if _was_caused_by(error, GatedRepoError):
        others = f", or take one that asks for no licence: {_OPEN[setting]}" if setting in _OPEN else ""
        return f"accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN{others}"
    if _was_caused_by(error, RepositoryNotFoundError):
        return f"check the name: the hub shows no {page}; if it is private, log in with `hf auth login` or set HF_TOKEN"
    gated = f" (it asks for a licence first, at {page}, and for HF_TOKEN)" if name.startswith(_GATED) else ""
    fetch = f"fetch a model once where there is network (`hf download {repository}`){gated}, or copy HF_HOME from there"
    return f"check the name, or the folder; {fetch}; without network use profile tiny"


def _was_caused_by(error: BaseException | None, kind: type[Exception]) -> bool:
    """Whether an error, or one that led to it, is of a kind."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None
