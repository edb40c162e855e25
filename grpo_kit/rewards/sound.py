"""Rewards of sounds: CLAP, and how loud they are."""

from collections.abc import Sequence
from math import gcd

import numpy as np
import torch
from scipy.signal import resample_poly
from transformers import ClapModel, ClapProcessor

from grpo_kit.config import Name
from grpo_kit.config.hub import load_whole, loading
from grpo_kit.config.media import Sound
from grpo_kit.rewards.clip import ClipSimilarity, TransformersClip
from grpo_kit.rewards.media import MediumError
from grpo_kit.rewards.protocol import Texts

_CPU = torch.device("cpu")
_SILENCE = 1e-6  # root mean square; softer is silent


def loudness(images: Sequence[Sound], prompts: Texts, enhanced_prompts: Texts) -> list[float]:
    """Root mean square over all channels, in dB of full scale: 0 at most, -3 for a full sine, -120 for silence.

    As a reward it is gamed at once, by whatever is loud. Watch it beside another.
    """
    means = [float(np.square(sound.samples, dtype=np.float64).mean()) ** 0.5 for sound in images]
    return [20 * float(np.log10(max(mean, _SILENCE))) for mean in means]


loudness.media = ("sound",)


class ClapSimilarity(ClipSimilarity):
    """Cosine between a sound and the *user's* prompt, in [-1, 1], by CLAP (arXiv 2211.06687).

    The channels' mean is heard. Of a sound longer than the model hears, the beginning; a shorter one is
    filled up as its extractor is set to.
    """

    name = "clap_similarity"
    media = ("sound",)


class Clap(TransformersClip):
    """A `ClapModel` with the methods of open_clip's models; its features are unit vectors."""

    def encode_image(self, pixels: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """(N, D) of (N, channels, time, mel). No sound is a long one: the extractor would call one so by chance."""
        is_longer = torch.zeros(len(pixels), 1, dtype=torch.bool, device=pixels.device)
        return self.model.get_audio_features(input_features=pixels, is_longer=is_longer).pooler_output

    def encode_text(self, ids: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """(1, D) of (1, tokens)."""
        return super().encode_text(ids)


def load_clap_similarity(model: Name, resample: bool = False, device: torch.device = _CPU) -> ClapSimilarity:
    """A CLAP and its processor, as `save_pretrained` of transformers' `ClapModel` leaves them.

    Args:
        model: a folder or hub id, such as "laion/clap-htsat-unfused".
        resample: bring sounds of another rate to the model's; else they are an error.

    Raises:
        ModelError: it cannot be loaded, or lacks weights.
    """
    setting = "reward_settings.options.clap_similarity"
    network = load_whole(ClapModel, model, f"{setting}.model", dtype=torch.float32)
    with loading(f"{setting}.model", model):
        tools = ClapProcessor.from_pretrained(model)
    words, extractor = network.config.text_config, tools.feature_extractor
    positions, rate = words.max_position_embeddings - words.pad_token_id - 1, extractor.sampling_rate
    context = min(positions, tools.tokenizer.model_max_length)

    def preprocess(sound: Sound) -> torch.Tensor:
        samples = sound.mono
        if sound.rate != rate and not resample:
            found = f"a sound of {sound.rate:,} Hz, allowed: the model's {rate:,}"
            raise MediumError(f"found {found}. Set {setting}.resample to true, or take a generator of that rate")
        if sound.rate != rate:
            common = gcd(rate, sound.rate)
            samples = resample_poly(samples, rate // common, sound.rate // common)
        samples = samples[: int(extractor.nb_max_samples)]  # else the extractor cuts it anywhere
        before = np.random.get_state()  # it draws numbers even so
        found = extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"][0]
        np.random.set_state(before)
        return found

    def tokenize(texts: Sequence[str], context_length: int = context) -> torch.Tensor:
        options = {"truncation": True, "max_length": context_length}
        return tools.tokenizer(list(texts), return_tensors="pt", **options)["input_ids"]

    return ClapSimilarity(Clap(network), preprocess, tokenize, device)
