"""The same parts of an iteration by the libraries' own calls, as one would write them without the kit."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from benchmarks.size.architectures import Size
from grpo_kit.rewards.clip import ClipSimilarity


@torch.no_grad()
def sample(model: torch.nn.Module, inputs: dict[str, torch.Tensor], group: int, tokens: int) -> torch.Tensor:
    """transformers' `generate`: (P·G, L + tokens) ids."""
    return model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        num_return_sequences=group,
        max_new_tokens=tokens,
        pad_token_id=0,
    )


def draw(pipeline: StableDiffusion3Pipeline, texts: Sequence[str], size: Size) -> list[Image.Image]:
    """diffusers' pipeline, call by call."""
    found = []
    for start in range(0, len(texts), size.images_a_call):
        some = list(texts[start : start + size.images_a_call])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(some))]
        output = pipeline(
            prompt=some,
            num_inference_steps=size.steps,
            guidance_scale=size.guidance,
            height=size.pixels,
            width=size.pixels,
            generator=generators,
        )
        found += output.images
    return found


@torch.no_grad()
def similarity(clip: ClipSimilarity, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
    """open_clip's model on a batch: (N,) cosines."""
    pixels = torch.stack([clip.preprocess(image) for image in images]).to(clip.device)
    of_images = clip.model.encode_image(pixels, normalize=True)
    of_texts = clip.model.encode_text(clip.tokenizer(list(texts)).to(clip.device), normalize=True)
    return (of_images * of_texts).sum(dim=-1)


def logprobs(model: torch.nn.Module, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """A forward pass over whole rows (N, L + tokens): (N, tokens) log-probabilities of their last tokens."""
    logits = model(input_ids=rows, use_cache=False, logits_to_keep=tokens + 1).logits[:, :-1]
    return logits.float().log_softmax(dim=-1).gather(2, rows[:, -tokens:, None]).squeeze(2)
