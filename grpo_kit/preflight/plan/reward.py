"""The reward's part: the CLIP that rewards share, and the models that some have of their own."""

import functools
import inspect

import diffusers
import torch
from transformers import XCLIPModel

from grpo_kit.config import Config
from grpo_kit.models.media import VIEWS
from grpo_kit.preflight.plan.architectures import pipeline_shape, reward_model
from grpo_kit.preflight.plan.parts import Part, Phase, Piece, tensors_of
from grpo_kit.preflight.plan.tracing import Cost, cost_of, weightless
from grpo_kit.rewards.loading import check_reward_settings

_OF_PICTURES = {"clip_similarity", "image_quality", "consistency", "safety", "style", "diversity", "aesthetic"}
_OF_PICTURES |= {"edit_direction", "gain", "image_similarity"}  # by the shared CLIP, all at once
_OF_PARTS = {"clip_frames", "clip_views"}  # by the shared CLIP, one medium at a time
_READ_REWRITES = {"consistency", "meaning_kept"}  # these encode what the policy wrote, too
_OF_CLIP = _OF_PICTURES | _OF_PARTS | _READ_REWRITES
_PREFERENCE = {"pickscore": "ViT-H-14", "hps": "ViT-H-14"}  # the architecture of both, by open_clip's name
_OWN = {"xclip_similarity", "clap_similarity"}  # a model that their options name


def plan_reward(config: Config) -> Part:
    """The reward's part of a plan. Programs, such as `sharpness`, take no weights and are not counted.

    A `PlanError` where the shape of a model is not known here.
    """
    check_reward_settings(config)
    settings, training = config.reward_settings, config.training_settings
    named, P = {*settings.weights, *settings.monitors}, training.prompts_per_iteration
    rows = P * training.group_size
    media = rows * config.generation_settings.images_per_prompt
    models = {"clip": (config.model_settings.clip_model,)} if named & _OF_CLIP else {}
    models |= {name: (_PREFERENCE[name],) for name in sorted(named & _PREFERENCE.keys())}
    own = sorted(named & _OWN)
    models |= {name: (settings.options[name]["model"], f"reward_settings.options.{name}.model") for name in own}
    batches = {"clip": [(media, 1)] if named & _OF_PICTURES else [], "xclip_similarity": [(media // P, P)]}
    if named & _OF_PARTS:  # a video's frames, or an object's views
        call = getattr(diffusers, pipeline_shape(config.model_settings.sd_model).kind).__call__
        own_number = getattr(inspect.signature(call).parameters.get("num_frames"), "default", VIEWS)
        batches["clip"] += [(config.generation_settings.frames or own_number, media)]
    texts = {"clip": P + rows * bool(named & _READ_REWRITES), "xclip_similarity": 0}  # X-CLIP reads them as it looks
    pieces, phases, sources = [], [], []
    for name, architecture in models.items():
        model, source = reward_model(*architecture)
        pieces.append(Piece.of(name, model))
        sources.append(source)
        cost = _scoring(model, batches.get(name, [(media, 1)]), texts.get(name, P))
        phases.append(Phase(name, cost, "training_settings.group_size"))
    loaded = {"dino_similarity", "judge"}  # each with a model of its own
    programs = sorted(named - _OF_CLIP - _PREFERENCE.keys() - _OWN - loaded)
    notes = (f"not counted, since they are programs: {', '.join(programs)}",) if programs else ()
    notes += tuple(f"not counted: the model of {one}, which is read as it is loaded" for one in sorted(named & loaded))
    return Part("reward", ", ".join(dict.fromkeys(sources)) or "no model", tuple(pieces), tuple(phases), {}, notes)


@torch.no_grad()
def _scoring(model: torch.nn.Module, batches: list[tuple[int, int]], texts: int) -> Cost:
    """Batches of media, (how many in one, how many of them), and texts, one by one and as long as the model reads."""
    there = tensors_of(weightless(model).requires_grad_(False))
    if hasattr(model, "visual"):  # open_clip's
        side, length = model.visual.image_size, model.context_length
        shape = (3, *side) if isinstance(side, tuple | list) else (3, side, side)
    else:
        config = getattr(model, "model", model).config
        words, seen = config.text_config, getattr(config, "vision_config", None)
        length = words.max_position_embeddings
        if seen is None:  # CLAP's: it brings any time to this one; RoBERTa's first positions are not used
            heard, length = config.audio_config, length - words.pad_token_id - 1
            shape = (1, heard.spec_size**2 // heard.num_mel_bins, heard.num_mel_bins)
        else:
            frames = [seen.num_frames] if isinstance(model, XCLIPModel) else []
            shape = (*frames, 3, seen.image_size, seen.image_size)
    ids = torch.zeros(1, length, dtype=torch.long)

    def see(media: torch.Tensor) -> object:
        return model(ids, media) if isinstance(model, XCLIPModel) else model.encode_image(media, normalize=True)

    costs = [cost_of(lambda size=size: see(torch.empty(size, *shape)), there).times(n) for size, n in batches]
    costs += [cost_of(lambda: model.encode_text(ids, normalize=True), there).times(texts)] if texts else []
    return functools.reduce(Cost.then, costs)
