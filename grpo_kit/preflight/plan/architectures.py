"""Where a model's shape is read: its own configuration on this machine, else a small table of public ones.

Nothing is fetched, and no shape is guessed: a model that is in neither place is an error that says what to fetch.
"""

import functools
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from grpo_kit.config import KitError, one_line
from grpo_kit.rewards.clip import TransformersClip, is_transformers_clip
from grpo_kit.rewards.sound import Clap

OWN = "its own configuration"  # the source of a shape that was read on this machine


class PlanError(KitError):
    """Something that cannot be planned; the message says what to do."""


@dataclass(frozen=True)
class PipelineShape:
    """A diffusers pipeline: its class, and each component's library, class and configuration."""

    kind: str
    components: dict[str, tuple[str, str, dict[str, Any]]]
    options: dict[str, object]  # of the pipeline itself
    source: str

    @property
    def side(self) -> int:
        """Pixels of a picture's side where the settings name none; a `PlanError` where that is not known."""
        denoiser = self.components.get("transformer") or self.components.get("unet")
        latent = denoiser and denoiser[2].get("sample_size")
        halvings = len(self.components["vae"][2].get("block_out_channels", ())) - 1
        if latent is None or halvings < 0:
            found = f"found a {self.kind}, whose pictures' size is not known here"
            raise PlanError(f"model_settings.sd_model: {found}; set generation_settings.height and width")
        return latent * 2**halvings


def language_model(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, str]:
    """A policy's model on the meta device, and where its shape was read; a `PlanError` where it is not known here."""
    config, source = _transformers_config(name, "policies", "model_settings.vlm_model")
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with init_empty_weights():
        model = kind.from_config(config, dtype=dtype)
    model.tie_weights()  # building it without values made the weights separate that it shares
    return model, source


def pipeline_shape(name: str) -> PipelineShape:
    """The components of a generator; a `PlanError` where they are in neither place."""
    try:
        index = DiffusionPipeline.load_config(name, local_files_only=True)
        _class("diffusers", index["_class_name"])
        named = {key: value for key, value in index.items() if isinstance(value, list | tuple) and value[1]}
        parts = {key: (*value, _component_config(name, key, *value)) for key, value in named.items()}
        options = {key: value for key, value in index.items() if not isinstance(value, list | tuple)}
        return PipelineShape(index["_class_name"], parts, options, OWN)
    except (AttributeError, ImportError) as error:  # of a class that is not there, or needs something that is not
        raise PlanError(f"model_settings.sd_model: {one_line(error)}") from error
    except OSError:
        entry, source = _from_table("generators", name, "model_settings.sd_model")
        return PipelineShape(entry["pipeline"], entry["components"], {}, source)


def component(library: str, kind: str, config: dict[str, Any], dtype: torch.dtype) -> object:
    """One model of a pipeline on the meta device; a tokenizer without words, which still fills up; a scheduler."""
    made = _class(library, kind)
    with init_empty_weights():
        if hasattr(made, "from_config"):
            model = made.from_config(config)
        else:
            model = made(made.config_class.from_dict(config)) if hasattr(made, "config_class") else made(**config)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.to(dtype).eval() if isinstance(model, torch.nn.Module) else model


def reward_model(name: str, setting: str = "model_settings.clip_model") -> tuple[torch.nn.Module, str]:
    """The model of rewards that a setting names, on the meta device in float32, as rewards load it, and its source.

    It is X-CLIP, or has the methods of open_clip's models. A `PlanError` where its shape is not known here.
    """
    with init_empty_weights():
        if setting == "model_settings.clip_model" and not is_transformers_clip(name):
            settings, source = _open_clip_settings(name)
            return open_clip.CLIP(**settings).eval(), source
        config, source = _transformers_config(name, "rewards", setting)
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
    form = {"clip": TransformersClip, "clap": Clap}.get(config.model_type)
    return form(model) if form else model, source


@functools.cache
def published_models() -> dict[str, dict[str, Any]]:
    """The table: "policies", "generators" and "rewards" → name → configuration, number of parameters, source."""
    return json.loads(Path(__file__).with_name("architectures.json").read_text(encoding="utf-8"))


def _transformers_config(name: str, kind: str, setting: str) -> tuple[PretrainedConfig, str]:
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True), OWN
    except (OSError, ValueError):
        entry, source = _from_table(kind, name, setting)
        return AutoConfig.for_model(**entry["config"]), source


def _open_clip_settings(name: str) -> tuple[dict[str, Any], str]:
    """The arguments of open_clip's class, of a folder, a hub id that was fetched, or a name that open_clip knows."""
    if not Path(name).is_dir() and not name.startswith("hf-hub:"):
        if settings := open_clip.get_model_config(name):
            return settings, "open_clip's own table"
        raise PlanError(f"model_settings.clip_model: found {name!r}, allowed: a folder, a hub id or an open_clip name")
    hub, file = name.removeprefix("hf-hub:"), "open_clip_config.json"
    try:
        path = Path(name) / file if Path(name).is_dir() else hf_hub_download(hub, file, local_files_only=True)
        return json.loads(Path(path).read_text(encoding="utf-8"))["model_cfg"], OWN
    except (OSError, KeyError, ValueError) as error:
        raise _unknown("model_settings.clip_model", hub) from error


def _class(library: str, kind: str) -> type:
    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    return getattr(home or importlib.import_module(f"diffusers.pipelines.{library}"), kind)


def _component_config(name: str, key: str, library: str, kind: str) -> dict[str, Any]:
    """A component's configuration; of a tokenizer, how many tokens it fills up to."""
    place = {"subfolder": key, "local_files_only": True}
    if "tokenizer" in key:
        return {"model_max_length": get_tokenizer_config(name, **place).get("model_max_length")}
    if "feature_extractor" in key:
        return {}
    load = getattr(_class(library, kind), "load_config", None)
    return dict(load(name, **place)) if load else AutoConfig.from_pretrained(name, **place).to_dict()


def _from_table(kind: str, name: str, setting: str) -> tuple[dict[str, Any], str]:
    entry = published_models()[kind].get(name)
    if entry is None or Path(name).exists():
        raise _unknown(setting, name)
    return entry, f"table, after {entry['source']}"


def _unknown(setting: str, name: str) -> PlanError:
    if Path(name).exists():
        return PlanError(f"{setting}: {name!r} holds no configuration that the planner can read")
    return PlanError(
        f"{setting}: the configuration of {name!r} is not on this machine, and the planner's table has "
        f"none; fetch it where there is network, a few kB without the weights: hf download {name} --include '*.json'"
    )
