"""Pipelines of other media than pictures: what their calls take, what they refuse, and what they give.

Every sample has a seed of its own, as pictures have. Values that show nothing (not finite, none, all the same) are a
failed sample, None.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import DeprecatedPipelineMixin
from PIL import Image

from grpo_kit.config import ConfigError
from grpo_kit.config.media import Kind, Medium, Sound, Video, Views, shows_something

VIEWS = 19  # sides that Shap-E shows; its camera's twentieth is the first again
_COARSE, _FINE = 64, 128  # points of a ray, as Shap-E's renderer has them


@dataclass(frozen=True)
class Form:
    """What a class of pipelines gives."""

    medium: Kind
    rate: float = 0.0  # frames a second that it was trained with
    frames: str = ""  # the attribute that says how many frames a latent stands for
    multiple: int = 1  # that its call asks height and width to be of


FORMS = {
    "WanPipeline": Form("video", 16, "vae_scale_factor_temporal", 16),
    "LTXPipeline": Form("video", 25, "vae_temporal_compression_ratio", 32),
    "CogVideoXPipeline": Form("video", 8, "vae_scale_factor_temporal"),
    "StableAudioPipeline": Form("sound"),
    "AudioLDM2Pipeline": Form("sound"),
    "ShapEPipeline": Form("views"),
}
_PICTURES = Form("image")
_OTHERS = {"num_frames", "video_length", "audio_length_in_s", "audio_end_in_s", "frame_size"}  # no picture's call
_NAMES = {"image": "pictures", "video": "videos", "sound": "sounds", "views": "views of an object"}
_FLAT = {"image", "video", "views"}  # what has pixels
_BELONGS = {"frames": _FLAT - {"image"}, "frame_rate": {"video"}, "seconds": {"sound"}, "height": _FLAT, "width": _FLAT}


def form_of(pipeline: DiffusionPipeline) -> Form:
    """What a pipeline gives; one of a class that is not known here gives pictures.

    Raises:
        ConfigError: it gives another medium, in a way that the kit does not know, or it is deprecated.
    """
    kind = type(pipeline)
    form = FORMS.get(kind.__name__, _PICTURES)
    if form is _PICTURES and _OTHERS & _call(pipeline).keys():
        is_old = issubclass(kind, DeprecatedPipelineMixin)
        reason = "which diffusers no longer maintains" if is_old else "not known here"
        raise ConfigError(
            f"model_settings.sd_model: found a {kind.__name__}, {reason}; allowed: pipelines of pictures, and "
            f"{', '.join(FORMS)}"
        )
    return form


def drawn_alone(pipeline: DiffusionPipeline) -> bool:
    """Whether a sample depends on those beside it in a call, so that it has one of its own.

    AudioLDM 2 counts the padding behind a text as positions; Shap-E's renderer makes rounding visible, since it draws
    points along a ray by how dense they are.
    """
    return type(pipeline).__name__ in ("AudioLDM2Pipeline", "ShapEPipeline")


def check_size(pipeline: DiffusionPipeline, form: Form, given: dict[str, float | None]) -> None:
    """Refuse frames, a rate, seconds or pixels that a pipeline cannot draw with, or has no use for.

    Args:
        given: frames, frame_rate, seconds, height and width; None is the pipeline's own.

    Raises:
        ConfigError: the setting, what was found, what is allowed.
    """
    name, frames = type(pipeline).__name__, given["frames"]

    def refuse(setting: str, allowed: str) -> None:
        raise ConfigError(f"generation_settings.{setting}: found {given[setting]:g}, {allowed}")

    for setting, media in _BELONGS.items():
        if given[setting] is not None and form.medium not in media:
            refuse(setting, f"but {name} gives {_NAMES[form.medium]}; set null")
    if form.medium == "views":
        if frames is not None and frames > VIEWS:
            refuse("frames", f"allowed for {name}: 1 to {VIEWS}, or null for all of them")
        if given["width"] not in (None, given["height"]):
            refuse("width", f"allowed for {name}: that of height ({given['height']}), since its views are squares")
    elif form.medium == "video" and frames is not None:
        step = getattr(pipeline, form.frames)
        if frames % step != 1 % step:
            near = step * max(round((frames - 1) / step), 0) + 1
            refuse("frames", f"allowed for {name}: {step} times a number, and one more, such as {near}")
    elif form.medium == "sound" and given["seconds"] is not None:
        shortest, longest = _seconds(pipeline)
        if not shortest <= given["seconds"] <= longest:
            bounds = f"{shortest:.3g} to {longest:g}" if np.isfinite(longest) else f"at least {shortest:.3g}"
            refuse("seconds", f"allowed for {name}: {bounds}")


def options(form: Form, given: dict[str, float | None]) -> dict[str, object]:
    """Arguments of a call in any class, of which it takes some; one sample a text, never the best of several."""
    names = {
        "frames": ("num_frames",), "frame_rate": ("frame_rate",), "height": ("frame_size",),
        "seconds": ("audio_end_in_s", "audio_length_in_s"),
    }  # fmt: skip
    found = {argument: given[name] for name, both in names.items() for argument in both if given[name] is not None}
    return {} if form is _PICTURES else found | {"num_waveforms_per_prompt": 1, "num_videos_per_prompt": 1}


def raw_media(
    pipeline: DiffusionPipeline, output: object, seeds: Sequence[int], given: dict[str, float | None]
) -> list[np.ndarray]:
    """The values of each sample of a call.

    A video's are (frames, height, width, 3) and an object's (views, height, width, 3), in [0, 1]; a sound's
    (channels, samples), not bounded.
    """
    medium = form_of(pipeline).medium
    if medium == "views":
        count, side = given["frames"] or VIEWS, given["height"] or _call(pipeline)["frame_size"].default
        renderer, objects = pipeline.shap_e_renderer, zip(output.images, seeds, strict=True)
        return [_rendered(renderer, latent, seed, count, side) for latent, seed in objects]
    if medium == "video":
        return list(output.frames)
    return [np.atleast_2d(samples) for samples in output.audios]


def medium_of(pipeline: DiffusionPipeline, values: np.ndarray, given: dict[str, float | None]) -> Medium | None:
    """A sample's values as what a user sees or hears, or None where there is nothing; a sound is clipped to [-1, 1]."""
    form = form_of(pipeline)
    if not shows_something(values):
        return None
    if form.medium == "sound":
        return Sound(values.clip(-1, 1).astype(np.float32), sound_rate(pipeline))
    pixels = (values * 255).round().clip(0, 255).astype(np.uint8)
    if form.medium == "views":
        return Views(tuple(map(Image.fromarray, pixels)))
    return Video(pixels, float(given["frame_rate"] or form.rate))


def sound_rate(pipeline: DiffusionPipeline) -> int:
    """Samples a second of a pipeline of sounds."""
    vocoder = getattr(pipeline, "vocoder", None)
    return int((pipeline.vae if vocoder is None else vocoder).config.sampling_rate)


def _call(pipeline: DiffusionPipeline) -> dict:
    return dict(inspect.signature(pipeline.__call__).parameters)


def _seconds(pipeline: DiffusionPipeline) -> tuple[float, float]:
    """The shortest and the longest sound."""
    rate = sound_rate(pipeline)
    if vocoder := getattr(pipeline, "vocoder", None):  # a latent is so many columns of the spectrogram
        return float(pipeline.vae_scale_factor * np.prod(vocoder.config.upsample_rates) / rate), np.inf
    longest = pipeline.transformer.config.sample_size * pipeline.vae.hop_length / rate
    bounds = pipeline.projection_model.config
    return max(bounds.min_value, 1 / rate), min(bounds.max_value, longest)


@torch.no_grad()
def _rendered(renderer: torch.nn.Module, latent: torch.Tensor, seed: int, count: int, side: int) -> np.ndarray:
    """An object of Shap-E from evenly spaced sides, (count, side, side, 3), as `decode_to_image` renders all of them.

    A view is a batch of rays: that method drops rays beyond a multiple of its batch. Points are drawn along a ray by
    torch's own generator, which is as it was afterwards.
    """
    from diffusers.pipelines.shap_e.camera import create_pan_cameras
    from diffusers.pipelines.shap_e.renderer import StratifiedRaySampler

    for name, weights in renderer.params_proj(latent[None]).items():
        renderer.mlp.get_parameter(name.removeprefix("nerstf.")).copy_(weights[0])
    rays = create_pan_cameras(side).camera_rays.to(latent.device).unflatten(1, (VIEWS + 1, side**2))
    views = []
    with torch.random.fork_rng([latent.device] if latent.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for place in range(count):
            view = rays[:, place * VIEWS // count]
            _, sampler, coarse = renderer.render_rays(view, StratifiedRaySampler(), _COARSE)
            colours, _, _ = renderer.render_rays(view, sampler, _FINE, prev_model_out=coarse)
            views.append(colours.reshape(side, side, 3).float().cpu().numpy())
    return np.stack(views)
