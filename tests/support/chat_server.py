"""A small server of OpenAI's chat completions around a transformers vision-language model."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def chat_completions(folder: Path, logprobs: bool = True) -> Callable[[Any], object]:
    """What `support.json_server.serving` answers: the likeliest first tokens, as vLLM and OpenAI write them."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def answer(asked: dict[str, Any]) -> object:
        content = [
            {"type": "image"} if part["type"] == "image_url" else part for part in asked["messages"][0]["content"]
        ]
        addresses = [part["image_url"]["url"] for part in asked["messages"][0]["content"] if "image_url" in part]
        files = [base64.b64decode(address.partition("base64,")[2]) for address in addresses]
        pictures = [Image.open(io.BytesIO(file)) for file in files]
        turn = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[pictures], return_tensors="pt")
        likeliest = model(**inputs).logits[0, -1].log_softmax(dim=-1).topk(asked.get("top_logprobs", 1))
        tokens = [
            {"token": processor.tokenizer.decode([token]), "logprob": value, "bytes": None}
            for token, value in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        ]
        first = {**tokens[0], "top_logprobs": tokens}
        message = {"role": "assistant", "content": first["token"]}
        kept = {"content": [first]} if logprobs and asked.get("logprobs") else None
        choice = {"index": 0, "message": message, "logprobs": kept, "finish_reason": "length"}
        return {"id": "1", "object": "chat.completion", "model": asked["model"], "choices": [choice]}

    return answer
