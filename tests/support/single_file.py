"""A Stable Diffusion 1.5 pipeline as one checkpoint, with the names that its authors gave the weights."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

RESNET = {  # of the U-Net
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # of the autoencoder


def original_weights(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """name → weights of the pipeline, under the names of the LDM code; layers_per_block must be 1."""
    unet, vae, text = (part.state_dict() for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    blocks = len(pipeline.vae.config.block_out_channels)
    names = {f"model.diffusion_model.{_unet(key)}": value for key, value in unet.items()}
    names |= {f"first_stage_model.{_vae(key, blocks)}": _vae_value(key, value) for key, value in vae.items()}
    clip = "cond_stage_model.transformer.text_model."
    return names | {f"{clip}{key.removeprefix('text_model.')}": value for key, value in text.items()}


def write_single_file(source: Path, file: Path) -> Path:
    """One file with a pipeline's weights; `.ckpt` as torch saves it, with the step that it was trained to."""
    from safetensors.torch import save_file

    weights = {key: value.contiguous() for key, value in original_weights(_pipeline(source)).items()}
    if file.suffix == ".ckpt":
        torch.save({"state_dict": weights, "global_step": 7}, file)
    else:
        save_file(weights, file)
    return file


def _pipeline(source: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(source)


def _unet(key: str) -> str:
    for ours, theirs in ENDS.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_resnet(match[3]) if match[1] == 'resnets' else match[3]}"
    side, block, kind, place, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key).groups()
    number = int(block) * 2 + int(place)  # a block has a resnet and a downsampler, or two resnets
    if kind == "downsamplers":
        return f"input_blocks.{int(block) * 2 + 2}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{int(block) * 2 + 1}.2.{rest}"
    inner = f"0.{_resnet(rest)}" if kind == "resnets" else f"1.{rest}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{number + (side == 'down')}.{inner}"


def _resnet(rest: str) -> str:
    name, _, end = rest.rpartition(".")
    return f"{RESNET[name]}.{end}"


def _vae(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        head, _, rest = key.partition("mid_block.attentions.0.")
        name, _, end = rest.rpartition(".")
        return f"{head}mid.attn_1.{ATTENTION[name]}.{end}"
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda match: f"up.{blocks - 1 - int(match[1])}.block", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)


def _vae_value(key: str, value: torch.Tensor) -> torch.Tensor:
    """Their attention is a convolution of one pixel."""
    return value[:, :, None, None] if "attentions" in key and value.dim() == 2 else value
