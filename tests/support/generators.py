"""Generators as users have them: tiny pipelines of each family's own classes, random weights, written in hub form."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tools.shapeworld.vocabulary import clip_tokenizer, t5_tokenizer

WIDTH = 32  # of every text encoder
SIZE = 32  # pixels
SMALL = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Family:
    """A generator of one architecture: `write` puts it into a folder, as `save_pretrained` does."""

    name: str
    write: Callable[[Path], None]
    pipeline: type
    guidance: float = 4.0  # one that computes a negative branch, where the family has one
    negative: bool = True  # classifier-free guidance, which a scale of 1 turns off
    multiple: int = 16  # its pictures' height and width are multiples of it
    reads: int = 77  # tokens of a text; what stands behind them is cut


# --- text encoders ----------------------------------------------------------------------------------------------------


@cache
def _clip_tokens() -> CLIPTokenizer:
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def _clip(kind: type = CLIPTextModel) -> torch.nn.Module:
    tokenizer = _clip_tokens()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "projection_dim": WIDTH}
    return kind(CLIPTextConfig(**SMALL, **ends, **size)).eval()


@cache
def _t5_tokens() -> T5Tokenizer:
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 512
    return tokenizer


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_tokens()), d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )
    ).eval()  # fmt: skip


def _gemma() -> tuple[GemmaTokenizer, Gemma2Model]:
    told = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer = GemmaTokenizer().train_new_from_iterator(told, vocab_size=500)  # pieces, as the instruction is long
    config = Gemma2Config(
        vocab_size=len(tokenizer), head_dim=16, num_key_value_heads=1, max_position_embeddings=4096, **SMALL
    )
    return tokenizer, Gemma2Model(config).eval()


# --- autoencoders and denoisers ---------------------------------------------------------------------------------------


def _vae(channels: int, **options: object) -> AutoencoderKL:
    """Eight pixels a latent, as in full size."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, sample_size=SIZE, layers_per_block=1,
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, **options,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


def _unet(**options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    ).eval()  # fmt: skip


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def stable_diffusion(folder: Path, checker: torch.nn.Module | None = None, eyes: object = None) -> None:
    """Stable Diffusion 1.5; with the safety checker that comes with it, where one is given."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_clip(),
        tokenizer=_clip_tokens(),
        unet=_unet(cross_attention_dim=WIDTH, attention_head_dim=4),
        scheduler=PNDMScheduler(skip_prk_steps=True, **NOISE),
        safety_checker=checker,
        feature_extractor=eyes,
        requires_safety_checker=checker is not None,
    ).save_pretrained(folder)


def stable_diffusion_xl(folder: Path) -> None:
    """SDXL: two CLIP encoders, the picture's size among its inputs, and no text at all as the negative branch."""
    torch.manual_seed(0)
    size = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + WIDTH}
    unet = _unet(
        cross_attention_dim=2 * WIDTH, attention_head_dim=(2, 4), use_linear_projection=True,
        addition_embed_type="text_time", transformer_layers_per_block=(1, 2), **size,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=_vae(4, force_upcast=True),
        text_encoder=_clip(),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer=_clip_tokens(),
        tokenizer_2=_clip_tokens(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **NOISE),
    ).save_pretrained(folder)


def _stable_diffusion_3(folder: Path, **options: object) -> None:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16, **options,
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_tokens()), d_model=2 * WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIPTextModelWithProjection),
        tokenizer=_clip_tokens(),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer_2=_clip_tokens(),
        text_encoder_3=t5.eval(),
        tokenizer_3=_t5_tokens(),
    ).save_pretrained(folder)


def stable_diffusion_3(folder: Path) -> None:
    """SD3 medium's form."""
    _stable_diffusion_3(folder)


def stable_diffusion_3_5(folder: Path) -> None:
    """SD3.5 medium's form: normalised queries and keys, and attention of its own in the first layers."""
    _stable_diffusion_3(folder, qk_norm="rms_norm", dual_attention_layers=(0,))


def _flux(folder: Path, guidance_embeds: bool) -> None:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
        vae=_vae(4, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(),
        tokenizer=_clip_tokens(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokens(),
    ).save_pretrained(folder)


def flux_dev(folder: Path) -> None:
    """FLUX.1-dev: guidance is an input, there is no negative branch."""
    _flux(folder, True)


def flux_schnell(folder: Path) -> None:
    """FLUX.1-schnell: few steps, and no guidance at all."""
    _flux(folder, False)


def pixart_sigma(folder: Path) -> None:
    """PixArt-Sigma: T5 alone, read through a mask, and SDXL's autoencoder."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=SIZE // 8, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    PixArtSigmaPipeline(
        tokenizer=_t5_tokens(),
        text_encoder=_t5(),
        vae=_vae(4),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    ).save_pretrained(folder)


def sana(folder: Path) -> None:
    """Sana: Gemma 2 reads an instruction and the text, linear attention draws, an autoencoder of its own decodes."""
    torch.manual_seed(0)
    tokenizer, encoder = _gemma()
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), upsample_block_type="interpolate",
        downsample_block_type="conv", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
        sample_size=SIZE // 2,
    )  # fmt: skip
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
        ),
    ).save_pretrained(folder)


FAMILIES = [
    Family("SD 1.5", stable_diffusion, StableDiffusionPipeline, multiple=8),
    Family("SDXL", stable_diffusion_xl, StableDiffusionXLPipeline, multiple=8),
    Family("SD3", stable_diffusion_3, StableDiffusion3Pipeline),
    Family("SD3.5", stable_diffusion_3_5, StableDiffusion3Pipeline),
    Family("FLUX.1-dev", flux_dev, FluxPipeline, negative=False),
    Family("FLUX.1-schnell", flux_schnell, FluxPipeline, negative=False, guidance=1.0),
    Family("PixArt-Sigma", pixart_sigma, PixArtSigmaPipeline, reads=300),
    Family("Sana", sana, SanaPipeline, multiple=32, reads=300),
]
