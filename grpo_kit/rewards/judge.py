"""A vision-language model as judge: how probable "yes" is, asked whether a picture shows the prompt (VQAScore)."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from grpo_kit.config import Count, Name
from grpo_kit.config.hub import load_whole, loading
from grpo_kit.config.prompts import without_control_tokens
from grpo_kit.rewards.http import Service, Url
from grpo_kit.rewards.protocol import Images, References, RewardContractError, RewardError, Texts

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_OPTIONS = "reward_settings.options.judge"
_MODEL = f"{_OPTIONS}.model"
Question = Annotated[str, Field(pattern=r"\{prompt\}", json_schema_extra={"allowed": "a text that contains {prompt}"})]


@dataclass(kw_only=True, eq=False)
class Judge(Service):
    """P(yes) / (P(yes) + P(no)) in a model's first token, in [0, 1]: VQAScore (arXiv 2404.01291) with two answers.

    A token counts for the answer that it begins, whatever its case and the space before it ("Yes", " yes", "y"). The
    model is one of transformers, or is served at an address that speaks OpenAI's protocol.

    Raises:
        KitError: the model cannot be loaded, or cannot be asked.
    """

    model: Name  # hub id or folder of a transformers vision-language model; with a url, the served model's name
    url: Url | None = None  # such as "http://localhost:8000/v1"
    question: Question = 'Does this figure show "{prompt}"? Please answer yes or no.'
    answers: tuple[Name, Name] = ("yes", "no")
    batch_size: Count = 8  # pictures that a model on this machine sees at once
    concurrency: Count = 8
    logprobs: bool = True  # false: the words of a served model's answer, as 1 or 0
    references: bool | None = None  # show the row's own pictures before the one that is judged; None refuses such rows
    request: dict[Name, Any] | None = None  # further fields of each request to a served model
    device: torch.device = _CPU

    def __post_init__(self) -> None:
        super().__post_init__()
        self.undecided, self.answers = 0, tuple(answer.casefold() for answer in self.answers)
        if self.url is None:
            self._load()

    def __call__(
        self, images: Images, prompts: Texts, enhanced_prompts: Texts, references: References | None = None
    ) -> torch.Tensor | list[float | None]:
        """(N,) shares of yes; NaN where a served model's likeliest tokens hold neither answer."""
        if any(references or ()) and self.references is None:
            raise RewardContractError(
                "references: found prompts with pictures of their own, and no word of whether the judge sees them. Set "
                f"{_OPTIONS}.references to true, with a question about several pictures, or to false"
            )
        before = references if self.references and references else [None] * len(images)
        shown = [[*(own or ()), image] for own, image in zip(before, images, strict=True)]
        questions = [self.question.replace("{prompt}", prompt) for prompt in prompts]
        if self.url is not None:
            return self._served(shown, questions)
        starts = range(0, len(shown), self.batch_size)
        parts = (slice(start, start + self.batch_size) for start in starts)
        return torch.cat([self._shares(shown[part], questions[part]) for part in parts])

    def _load(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = "auto" if self.device.type == "cuda" else torch.float32
        with loading(_MODEL, self.model):
            self.processor = AutoProcessor.from_pretrained(self.model)
        model = load_whole(AutoModelForImageTextToText, self.model, _MODEL, dtype=dtype)
        self.network = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = getattr(self.processor, "tokenizer", None)
        if self.tokenizer is None or not self.processor.chat_template:
            raise RewardError(f"model: {self.model!r} has no chat template; take an instruction-tuned one that sees")
        self.tokenizer.padding_side = "left"
        tokens = self.tokenizer.batch_decode([[place] for place in range(len(self.tokenizer))])
        self.sides = [[i for i, token in enumerate(tokens) if self._side(token) == side] for side in (0, 1)]
        if not all(self.sides):
            raise RewardError(f"answers: found {self.answers}, allowed: two that begin with different tokens")

    def _side(self, token: str) -> int | None:
        """Which answer a token begins, case and space aside; None for neither, or both."""
        word = token.strip().strip("Ġ▁").casefold()
        begun = [bool(word) and answer.startswith(word) for answer in self.answers]
        return begun.index(True) if sum(begun) == 1 else None

    @torch.no_grad()
    def _shares(self, shown: Sequence[Images], questions: Texts) -> torch.Tensor:
        thinking = {"enable_thinking": False} if "enable_thinking" in str(self.processor.chat_template) else {}
        texts = []
        for pictures, question in zip(shown, questions, strict=True):
            text = without_control_tokens(question, self.tokenizer)
            turn = {"role": "user", "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]}
            options = {"add_generation_prompt": True, "tokenize": False, **thinking}
            texts.append(self.processor.apply_chat_template([turn], **options))
        start = self.tokenizer.bos_token  # some templates write it, others leave it to the tokenizer
        inputs = self.processor(
            text=texts,
            images=[[image.convert("RGB") for image in pictures] for pictures in shown],
            padding=True,
            return_tensors="pt",
            add_special_tokens=start is None or not texts[0].startswith(start),
        )
        options = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "output_logits": True}
        inputs = inputs.to(self.device, dtype=self.network.dtype)
        # generate knows every family's positions and padding
        output = self.network.generate(**inputs, **options, return_dict_in_generate=True)
        yes, no = (output.logits[0][:, ids].double().logsumexp(dim=1) for ids in self.sides)
        return torch.sigmoid(yes - no).cpu()

    def _served(self, shown: Sequence[Images], questions: Sequence[str]) -> list[float | None]:
        sampling = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 20}  # 20: the most there are
        fields = {"model": self.model, **(sampling if self.logprobs else {"temperature": 0.0}), **(self.request or {})}

        def body(rows: range) -> dict[str, Any]:
            files = [f"data:image/{self.image_format};base64,{self.encoded(image)}" for image in shown[rows[0]]]
            pictures = [{"type": "image_url", "image_url": {"url": file}} for file in files]
            turn = {"role": "user", "content": [*pictures, {"type": "text", "text": questions[rows[0]]}]}
            return {key: value for key, value in fields.items() if value is not None} | {"messages": [turn]}

        url = f"{self.url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        return self.scores(url, [range(row, row + 1) for row in range(len(shown))], body, self._share)

    def _share(self, answer: Any, _count: int) -> list[float]:
        choice = answer["choices"][0]
        if self.logprobs:
            tokens = (choice.get("logprobs") or {}).get("content")
            if not tokens:
                raise RewardError("logprobs; where a server has none, logprobs: false takes its words as 1 or 0")
            found = [(one["token"], math.exp(one["logprob"])) for one in tokens[0]["top_logprobs"]]
        else:
            words = re.findall(r"\w+", choice["message"]["content"])
            found = [(word, 1.0) for word in words if word.casefold() in self.answers][:1]
        yes, no = (sum(p for token, p in found if self._side(token) == side) for side in (0, 1))
        self.undecided += not yes + no
        if self.undecided == 1 and not yes + no:
            logger.warning("judge: neither of %s is in the answer: %s; further ones are counted", self.answers, found)
        return [yes / (yes + no) if yes + no else math.nan]
