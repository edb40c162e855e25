"""Generators of other media: tiny pipelines of each family's own classes, random weights, written in hub form."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PriorTransformer,
    ShapEPipeline,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.shap_e import ShapERenderer
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    UMT5Config,
    UMT5EncoderModel,
)

from support.generators import NOISE, SIZE, WIDTH, _clip, _clip_tokens, _t5, _t5_tokens
from tools.shapeworld.vocabulary import corpus


@dataclass(frozen=True)
class MediaFamily:
    """A generator of one architecture; `size` is what it is drawn with: settings of generation."""

    name: str
    write: Callable[[Path], None]
    medium: str
    size: dict[str, object]
    refused: dict[str, tuple[float, str]]  # setting → a value that does not fit, and what the line says of it
    guidance: float = 4.0
    negative: bool = True  # its call takes a negative prompt


def wan(folder: Path) -> None:
    """Wan 2.1's form: UMT5, a causal autoencoder that decodes frame by frame."""
    torch.manual_seed(0)
    size = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True], **scale
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    WanPipeline(
        tokenizer=_t5_tokens(),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(_t5_tokens()), **size)).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder)


def ltx(folder: Path) -> None:
    """LTX-Video's form: latents packed into a sequence, 8 frames a latent."""
    torch.manual_seed(0)
    blocks = {
        "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8), "latent_channels": 8,
        "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
    }  # fmt: skip
    vae = AutoencoderKLLTXVideo(**blocks, encoder_causal=True, decoder_causal=False)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    LTXPipeline(
        tokenizer=_t5_tokens(),
        text_encoder=_t5(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).save_pretrained(folder)


def cogvideox(folder: Path) -> None:
    """CogVideoX 2B's form: text and frames in one sequence."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, sample_height=SIZE, sample_width=SIZE,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=WIDTH, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=226,
    )  # fmt: skip
    CogVideoXPipeline(
        tokenizer=_t5_tokens(),
        text_encoder=_t5(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ).save_pretrained(folder)


RATE = 8000  # samples a second


def stable_audio(folder: Path) -> None:
    """Stable Audio Open's form: latents of a waveform, seconds among the inputs; a solver without torchsde."""
    torch.manual_seed(0)
    vae = AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[4, 8], channel_multiples=[1, 2], decoder_channels=8,
        decoder_input_channels=8, audio_channels=2, sampling_rate=RATE,
    )  # fmt: skip
    transformer = StableAudioDiTModel(
        sample_size=32, in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=2, cross_attention_dim=32, time_proj_dim=16, global_states_input_dim=64,
        cross_attention_input_dim=32,
    )  # fmt: skip
    StableAudioPipeline(
        vae=vae.eval(),
        text_encoder=_t5(),
        projection_model=StableAudioProjectionModel(WIDTH, 32, 0, 10).eval(),
        tokenizer=_t5_tokens(),
        transformer=transformer.eval(),
        scheduler=EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_schedule="exponential"),
    ).save_pretrained(folder)


@cache
def _roberta_tokens() -> RobertaTokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = RobertaTokenizer().train_new_from_iterator(corpus()[:500], 300, new_special_tokens=special)
    tokenizer.model_max_length = 77
    return tokenizer


def audioldm2(folder: Path) -> None:
    """AudioLDM 2's form: CLAP and T5, a GPT-2 that writes what the U-Net reads, a vocoder."""
    torch.manual_seed(0)
    text = {"vocab_size": len(_roberta_tokens()), "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 90}
    audio = {"hidden_size": 64, "patch_embeds_hidden_size": 8, "num_hidden_layers": 2, "projection_dim": 16}
    audio |= {"depths": [1, 1], "num_attention_heads": [1, 1], "spec_size": 64, "num_mel_bins": 16, "window_size": 4}
    audio |= {"patch_size": 2, "patch_stride": (2, 2)}
    clap = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16)).eval()
    language = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=200)).eval()
    language.config.max_new_tokens = 8
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=[[None, 16, WIDTH]] * 2,
        attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, layers_per_block=1, block_out_channels=(8, 8, 8),
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=16, sampling_rate=RATE, upsample_initial_channel=16, upsample_rates=[4, 4],
            upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
            normalize_before=False,
        )
    )  # fmt: skip
    vocoder.conv_post.weight.data *= 1e5  # else what it gives can hardly be heard
    AudioLDM2Pipeline(
        vae=vae.eval(),
        text_encoder=clap,
        text_encoder_2=_t5(),
        projection_model=AudioLDM2ProjectionModel(16, WIDTH, 16).eval(),
        language_model=language,
        tokenizer=_roberta_tokens(),
        tokenizer_2=_t5_tokens(),
        feature_extractor=ClapFeatureExtractor(feature_size=16, sampling_rate=RATE),
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **NOISE),
        vocoder=vocoder.eval(),
    ).save_pretrained(folder)


def shap_e(folder: Path) -> None:
    """Shap-E's form: a prior that writes the weights of a field, which is rendered."""
    torch.manual_seed(0)
    hidden, depth = 8, 4
    names = tuple(f"nerstf.mlp.{layer}.weight" for layer in range(depth))
    shapes = ((hidden, 93), *[(hidden, hidden)] * (depth - 1))
    renderer = ShapERenderer(
        param_names=names, param_shapes=shapes, d_latent=16, d_hidden=hidden, n_hidden_layers=depth + 1,
        insert_direction_at=depth, background=(255.0, 255.0, 255.0),
    )  # fmt: skip
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=16, num_embeddings=hidden * depth,
        additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer", embedding_proj_norm_type=None,
        encoder_hid_proj_type=None, added_emb_type=None, time_embed_dim=32, embedding_proj_dim=WIDTH, clip_embed_dim=32,
    )  # fmt: skip
    ShapEPipeline(
        prior=prior.eval(),
        text_encoder=_clip(CLIPTextModelWithProjection),
        tokenizer=_clip_tokens(),
        scheduler=HeunDiscreteScheduler(
            beta_schedule="exp", prediction_type="sample", clip_sample=True, use_karras_sigmas=True
        ),
        shap_e_renderer=renderer.eval(),
    ).save_pretrained(folder)


_SQUARE = {"height": SIZE, "width": SIZE}
MEDIA_FAMILIES = [
    MediaFamily(
        "Wan", wan, "video", _SQUARE | {"frames": 9},
        {"frames": (10, "4 times a number, and one more, such as 9"), "height": (40, "multiples of 16, such as 32")},
    ),
    MediaFamily(
        "LTX", ltx, "video", _SQUARE | {"frames": 9, "frame_rate": 8.0},
        {"frames": (16, "8 times a number, and one more, such as 17"), "height": (48, "multiples of 32, such as 32")},
    ),
    MediaFamily(
        "CogVideoX", cogvideox, "video", _SQUARE | {"frames": 9},
        {"frames": (48, "4 times a number, and one more, such as 49"), "height": (40, "multiples of 16, such as 32")},
    ),
    MediaFamily(
        "Stable Audio", stable_audio, "sound", {"seconds": 0.1},
        {"seconds": (1.0, "0.000125 to 0.128"), "height": (32, "gives sounds; set null")},
    ),
    MediaFamily(
        "AudioLDM 2", audioldm2, "sound", {"seconds": 0.1},
        {"seconds": (0.001, "at least 0.008"), "frames": (9, "gives sounds; set null")},
    ),
    MediaFamily(
        "Shap-E", shap_e, "views", {"height": 8, "frames": 4},
        {"frames": (20, "1 to 19"), "width": (24, "that of height"),
         "seconds": (1.0, "gives views of an object; set null")},
        negative=False,
    ),
]  # fmt: skip
