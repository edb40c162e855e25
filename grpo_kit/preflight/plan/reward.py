"""The reward's part: the CLIP that rewards share, and preference models beside it, on all pictures at once."""

import torch

from grpo_kit.config import Config
from grpo_kit.preflight.plan.architectures import reward_model
from grpo_kit.preflight.plan.parts import Part, Phase, Piece, tensors_of
from grpo_kit.preflight.plan.tracing import Cost, cost_of, weightless

_OF_CLIP = {"clip_similarity", "image_quality", "consistency", "meaning_kept", "safety", "style", "diversity"}
_OF_CLIP |= {"aesthetic", "edit_direction", "gain", "image_similarity", "clip_frames", "clip_views"}
_READ_REWRITES = {"consistency", "meaning_kept"}  # these encode what the policy wrote, too
_PREFERENCE = {"pickscore": "ViT-H-14", "hps": "ViT-H-14"}  # the architecture of both, by open_clip's name


def plan_reward(config: Config) -> Part:
    """The reward's part of a plan. Programs, such as `sharpness`, take no weights and are not counted.

    A `PlanError` where the shape of a model is not known here.
    """
    settings, training = config.reward_settings, config.training_settings
    named = {*settings.weights, *settings.monitors}
    models = {"clip": config.model_settings.clip_model} if named & _OF_CLIP else {}
    models |= {name: _PREFERENCE[name] for name in sorted(named & _PREFERENCE.keys())}
    rows = training.prompts_per_iteration * training.group_size
    images = rows * config.generation_settings.images_per_prompt
    texts = training.prompts_per_iteration + (rows if named & _READ_REWRITES else 0)
    pieces, phases, sources = [], [], []
    for name, architecture in models.items():
        model, source = reward_model(architecture)
        pieces.append(Piece.of(name, model))
        sources.append(source)
        phases.append(Phase(name, _scoring(model, images, texts), "training_settings.group_size"))
    loaded = {"dino_similarity", "judge", "xclip_similarity", "clap_similarity"}  # each with a model of its own
    programs = sorted(named - _OF_CLIP - _PREFERENCE.keys() - loaded)
    notes = (f"not counted, since they are programs: {', '.join(programs)}",) if programs else ()
    notes += tuple(f"not counted: the model of {one}, which is read as it is loaded" for one in sorted(named & loaded))
    return Part("reward", ", ".join(dict.fromkeys(sources)) or "no model", tuple(pieces), tuple(phases), {}, notes)


@torch.no_grad()
def _scoring(model: torch.nn.Module, images: int, texts: int) -> Cost:
    """All pictures in one batch, the texts one by one."""
    if hasattr(model, "visual"):  # open_clip's
        side, length = model.visual.image_size, model.context_length
        side = side[0] if isinstance(side, tuple | list) else side
    else:
        sizes = model.model.config
        side, length = sizes.vision_config.image_size, sizes.text_config.max_position_embeddings
    there = tensors_of(weightless(model).requires_grad_(False))
    seeing = cost_of(lambda: model.encode_image(torch.empty(images, 3, side, side), normalize=True), there)
    reading = cost_of(lambda: model.encode_text(torch.zeros(1, length, dtype=torch.long), normalize=True), there)
    return seeing.then(reading.times(texts))
