"""The hub's cache folder, filled with tiny models of the classic config's architectures under their real ids."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from support.families import dialogpt
from tools.shapeworld.vocabulary import clip_tokenizer

POLICY, GENERATOR = "microsoft/DialoGPT-medium", "runwayml/stable-diffusion-v1-5"
CLIP = "openai/clip-vit-base-patch32"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def fill(home: Path) -> None:
    """The three models in the cache of this `HF_HOME`."""
    for name, write in ((POLICY, _dialogpt), (GENERATOR, _stable_diffusion), (CLIP, clip)):
        _keep(home, name, write)


def _keep(home: Path, name: str, write: Callable[[Path], None]) -> None:
    """As the hub's client leaves a download: blobs by content, links to them by revision, and where `main` is."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    revision = hashlib.sha1(name.encode()).hexdigest()
    written = repository / "written"
    write(written)
    (repository / "blobs").mkdir()
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = repository / "snapshots" / revision / file.relative_to(written)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.replace(blob)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


def _dialogpt(folder: Path) -> None:
    """As the hub has it: weights in torch's own format, vocabulary and merges in two files."""
    dialogpt(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(pieces["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pieces["merges"]))
    (folder / "tokenizer.json").unlink()


def _tokenizer() -> CLIPTokenizer:
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def _text_config(tokenizer: CLIPTokenizer) -> dict[str, int]:
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return SMALL | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "projection_dim": 16}


def clip(folder: Path) -> None:
    """A `CLIPModel` with its processor."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    vision = SMALL | {"image_size": 32, "patch_size": 8, "projection_dim": 16}
    config = CLIPConfig(text_config=_text_config(tokenizer), vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)


def _stable_diffusion(folder: Path) -> None:
    """Stable Diffusion 1.5: a U-Net, CLIP's text encoder, PNDM, and the safety checker that comes with it."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=32, attention_head_dim=4, **blocks,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=32, **blocks,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vision = SMALL | {"image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(CLIPTextConfig(**_text_config(tokenizer))),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ).save_pretrained(folder)
