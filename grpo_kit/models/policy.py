"""The policy: a text-only or vision-language transformers model that rewrites prompts.

A group's completions share one prompt. The prompt is run once, its cache is handed to every completion, and only the
completions are run on it: in sampling, and again, with gradients, in scoring.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from grpo_kit.config import Config
from grpo_kit.config.display import Shown
from grpo_kit.config.hardware import choose_device, choose_dtype
from grpo_kit.config.hub import ModelError
from grpo_kit.config.quiet import quiet_libraries
from grpo_kit.config.threads import fitting_threads
from grpo_kit.grpo.logprobs import completion_mask, is_truncated, logprobs_and_entropy
from grpo_kit.models.adapters import base_and_adapter, frozen_copy, load_adapter, merged
from grpo_kit.models.conversation import Conversation
from grpo_kit.models.decoding import decode, even_batches, row_seeds, row_uniforms, stacked
from grpo_kit.models.loading import add_lora, has_weights_of, load_language_model, load_weights, save_weights
from grpo_kit.models.prompt_format import EncodedPrompts, PromptFormat
from grpo_kit.models.prompt_part import part_patterns, prompt_part
from grpo_kit.models.rows import continued_rows, evaluating, recomputable_layers, recomputing, row_logits
from grpo_kit.models.shared_prefix import (
    Decoding,
    Packing,
    continued_groups,
    learned_positions,
    reason_not_to_share,
    require_decoding,
    run_prompts,
)

logger = logging.getLogger(__name__)
Asked = Sequence[str | Conversation] | EncodedPrompts


class EnhancedPrompt(str):
    """A rewrite of a user's prompt."""

    fell_back: bool = False  # the policy gave nothing usable, and this is the user's own prompt
    matched: bool = True  # `prompt_part` found a prompt in what the policy wrote


@dataclass(frozen=True, repr=False)
class Completions(Shown):
    """What G samples for each of P prompts came out as, N = P·G rows, group-major."""

    ids: torch.Tensor  # (N, T) int64
    mask: torch.Tensor  # (N, T) bool, True through the first end-of-sequence token
    logprobs: torch.Tensor  # (N, T) of the sampled ids
    texts: list[str]  # N prompts: of each completion the part that `prompt_part` says
    truncated: torch.Tensor  # (N,) bool: ended by the length limit
    unmatched: torch.Tensor | None = None  # (N,) bool: no prompt was found in it; None where all of it is the prompt


class _Answers(NamedTuple):
    """Completions that are to be scored, and what they answer."""

    encoded: EncodedPrompts  # P
    group_ids: torch.Tensor  # (N,) which of these each row answers
    ids: torch.Tensor  # (N, T)
    mask: torch.Tensor  # (N, T)

    def some(self, rows: torch.Tensor) -> "_Answers":
        """Some rows, with the contexts that these need."""
        places, local = self.group_ids[rows].unique(return_inverse=True)
        return _Answers(self.encoded.take(places.tolist()), local, self.ids[rows], self.mask[rows])


@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """Log-probabilities (N, T) of given ids, with gradient where it is enabled, and the entropy (N, T) beside them."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


class Policy(Shown, PromptFormat, torch.nn.Module):
    """A model with its processor, its instruction and its reference; as a module its forward pass is `score`.

    `not_shared` says why completions do not share their prompt's cache; None where they do.
    """

    def __init__(
        self,
        model: torch.nn.Module,  # a transformers model with a language head
        processor: object,  # this, `instruction` and what belongs to them: see `PromptFormat`
        *,
        instruction: str,
        system_prompt: str = "",
        temperature: float = 1.0,  # for sampling and for scoring what was sampled
        max_new_tokens: int = 64,  # of the longest completion
        reference: torch.nn.Module | None = None,  # frozen, to compare with; None: the policy with its LoRA adapter off
        chat_template_kwargs: Mapping[str, object] | None = None,
        look_instruction: str = "{prompt}",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        gradient_checkpointing: bool = False,  # scoring computes layers again instead of keeping their activations
        decoding: Decoding = "plain",  # how completions are sampled; see `models.shared_prefix`
        sampling_batch_size: int | None = None,  # most completions in one call, by whole groups; None: all
        prompt_part: str = "whole",  # which part of a completion is the prompt; see `models.prompt_part`
    ) -> None:
        torch.nn.Module.__init__(self)
        asked = {"instruction": instruction, "system_prompt": system_prompt, "look_instruction": look_instruction}
        asked |= {"chat_template_kwargs": chat_template_kwargs, "min_pixels": min_pixels, "max_pixels": max_pixels}
        PromptFormat.__init__(self, processor, **asked)
        self.model = model
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.reference = reference
        self.gradient_checkpointing = gradient_checkpointing
        self.not_shared = reason_not_to_share(model)
        require_decoding(decoding, self.not_shared)
        self.decoding = decoding
        self.sampling_batch_size = sampling_batch_size
        self._longest = learned_positions(model)
        if gradient_checkpointing:
            recomputable_layers(model)  # refuses a model that has none
        self.eos_token_ids = _end_tokens(model, self.tokenizer)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = self.eos_token_ids[0]
        opens_thinking = prompt_part != "whole" and self.format_prompt("a").rstrip().endswith("<think>")
        self.part_patterns = part_patterns(prompt_part, opens_thinking)

    def _shown(self) -> dict[str, object]:
        base = getattr(self.model, "get_base_model", lambda: self.model)()  # below an adapter
        sizes = [sum(map(torch.numel, some)) / 1e6 for some in (self.model.parameters(), self.trainable_parameters())]
        told = {name: getattr(self, name) for name in ("device", "temperature", "max_new_tokens", "instruction")}
        return {"model": type(base).__name__, "parameters": "{:,.1f} M, {:,.1f} M trained".format(*sizes), **told}

    # --- sampling -----------------------------------------------------------------------------------------------------

    @quiet_libraries()
    @torch.no_grad()
    def sample(
        self,
        prompts: Asked,
        num_generations: int,
        *,
        seed: int,
        images: Sequence[Image.Image] | None = None,
        greedy: bool = False,
        reference: bool = False,
        first_prompt: int = 0,
    ) -> Completions:
        """G completions of each prompt (with its picture), or of what `encode` made of them, greedy or by seed.

        Args:
            seed: fixes every row's draw by (seed, prompt's place, sample's place).
            reference: the frozen reference answers instead.
            first_prompt: the first one's place in the batch that these prompts are a share of.
        """
        encoded, G = self._encoded(prompts, images), num_generations
        seeds = row_seeds(seed, len(encoded), G, first_prompt)
        uniforms = None if greedy else row_uniforms(seeds, self.max_new_tokens).to(self.device)
        most = len(encoded) if self.sampling_batch_size is None else max(self.sampling_batch_size // G, 1)
        calls = []
        with self._answering(reference) as model, evaluating(model):
            for places in even_batches(range(len(encoded)), most):
                rows = None if uniforms is None else uniforms[places[0] * G : (places[-1] + 1) * G]
                calls.append(self._decoded(model, encoded.take(places), G, rows))
        ids, logprobs = zip(*calls, strict=True)
        ids, logprobs = stacked(ids, self.tokenizer.pad_token_id), stacked(logprobs, 0.0)
        mask = completion_mask(ids, self.eos_token_ids)
        truncated = is_truncated(ids, mask, self.eos_token_ids)
        texts, unmatched = self.prompt_parts(ids, mask)
        return Completions(ids, mask, logprobs.where(mask, 0.0), texts, truncated, unmatched)

    def _encoded(self, prompts: Asked, images: Sequence[Image.Image] | None) -> EncodedPrompts:
        return prompts if isinstance(prompts, EncodedPrompts) else self.encode(prompts, images)

    def _decoded(
        self, model: torch.nn.Module, encoded: EncodedPrompts, G: int, uniforms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and log-probabilities (N, T) of one call of the decoder."""
        inputs = encoded.on(self.device)
        length = inputs["input_ids"].shape[1]
        if self._longest is not None and length + self.max_new_tokens > self._longest:
            raise ModelError(
                f"user_prompt: found {length} tokens with its instruction, allowed: {self._longest} positions of this "
                f"model less {self.max_new_tokens} of generation_settings.max_new_tokens; shorten one of them"
            )
        prefix = run_prompts(model, inputs)
        if self.not_shared:
            next_logits = continued_rows(model, prefix, G)
        else:
            next_logits = continued_groups(model, prefix, G, self.max_new_tokens, self.decoding)
        return decode(
            prefix.last_logits.repeat_interleave(G, dim=0),
            next_logits,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            uniforms=uniforms,
        )

    # --- scoring ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        prompts: Asked,
        group_ids: torch.Tensor,
        completion_ids: torch.Tensor,
        mask: torch.Tensor,
        *,
        images: Sequence[Image.Image] | None = None,
        reference: bool = False,
    ) -> Scores:
        """Log-probabilities (N, T) of exactly these ids under the policy (or its reference), at its temperature.

        They are 0 outside the mask; gradients flow where torch has them enabled. Dropout is off.

        Args:
            prompts: P users' prompts (with their `images`), conversations, or what `encode` made of them.
            group_ids: (N,) which prompt each row answers.
            completion_ids, mask: (N, T).
        """
        encoded = self._encoded(prompts, images)
        group_ids, completion_ids, mask = (tensor.to(self.device) for tensor in (group_ids, completion_ids, mask))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        with self._answering(reference) as model, evaluating(model):
            if self.not_shared or recompute:  # each completion behind its own copy of the prompt
                inputs = encoded.take(group_ids.tolist()).on(self.device)
                with recomputing(model) if recompute else nullcontext():
                    logits = row_logits(model, inputs, completion_ids, mask)
                columns = logprobs_and_entropy(logits, completion_ids, self.temperature)
            else:
                columns = self._scored_by_turn(model, _Answers(encoded, group_ids, completion_ids, mask))
        return Scores(*(torch.where(mask, column, 0.0) for column in columns))

    score = forward  # as a plain method; DDP and FSDP need the module called

    def _scored_by_turn(self, model: torch.nn.Module, answers: _Answers) -> list[torch.Tensor]:
        """Log-probabilities and entropy, a pass a turn: later prompts are longer, their groups smaller."""
        turns = torch.tensor([len(one.turns) for one in answers.encoded.conversations], device=answers.mask.device)
        if (turns == turns[0]).all():
            return self._scored_behind_prompts(model, answers)
        order = [(turns[answers.group_ids] == turn).nonzero().flatten() for turn in turns.unique()]
        found = [self._scored_behind_prompts(model, answers.some(rows)) for rows in order]
        back = torch.cat(order).argsort()
        return [torch.cat(columns)[back] for columns in zip(*found, strict=True)]

    def _scored_behind_prompts(self, model: torch.nn.Module, answers: _Answers) -> list[torch.Tensor]:
        """Log-probabilities and entropy with each prompt run once."""
        encoded, group_ids, ids, mask = answers
        prefix = run_prompts(model, encoded.on(self.device))
        lanes = _lanes(mask, len(encoded), prefix.mask.shape[1])
        packing = Packing.of(mask, group_ids, len(encoded), lanes)
        here, following = (ids[packing.rows, packing.steps + ahead] for ahead in (0, 1))
        steps, sees = packing.lay_out(packing.steps), packing.sees()
        logits = prefix.in_lanes(lanes).extend(model, packing.lay_out(here), steps, sees)
        first = logprobs_and_entropy(prefix.last_logits[group_ids], ids[:, 0], self.temperature)
        later = logprobs_and_entropy(logits, packing.lay_out(following), self.temperature)
        return [torch.cat([a[:, None], packing.take_out(b, mask)], dim=1) for a, b in zip(first, later, strict=True)]

    # --- text ---------------------------------------------------------------------------------------------------------

    def decode(self, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """The completions as text: without special tokens, without surrounding space."""
        rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def prompt_parts(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[str], torch.Tensor | None]:
        """The prompts in completions, and (N,) bool in which none was found; None where all of each is the prompt."""
        parts = [prompt_part(text, self.part_patterns) for text in self.decode(ids, mask)]
        unmatched = torch.tensor([not found for _, found in parts]) if self.part_patterns else None
        return [text for text, _ in parts], unmatched

    def token_texts(self, ids: torch.Tensor, mask: torch.Tensor) -> list[list[str]]:
        """Each row's tokens as text, one by one, those that end it included."""
        rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        return [[self.tokenizer.decode([token]) for token in row] for row in rows]

    # --- plain use ----------------------------------------------------------------------------------------------------

    def enhance_prompt(self, prompt: str, image: Image.Image | None = None) -> EnhancedPrompt:
        """The policy's likeliest rewrite of a prompt; the prompt itself (`.fell_back`) where it writes nothing."""
        return self.enhance_prompts([prompt], None if image is None else [image])[0]

    def enhance_prompts(
        self,
        prompts: Sequence[str | Conversation],
        images: Sequence[Image.Image] | None = None,
        *,
        reference: bool = False,
    ) -> list[EnhancedPrompt]:
        """`enhance_prompt` for many prompts at once; with `reference`, by the policy as it was before training."""
        written = self.sample(prompts, 1, seed=0, images=images, greedy=True, reference=reference)
        unmatched = [False] * len(prompts) if written.unmatched is None else written.unmatched.tolist()
        found = []
        for prompt, text, is_unmatched in zip(prompts, written.texts, unmatched, strict=True):
            rewrite = EnhancedPrompt(text.strip() or (prompt.prompt if isinstance(prompt, Conversation) else prompt))
            rewrite.fell_back, rewrite.matched = not text.strip(), not is_unmatched
            found.append(rewrite)
        return found

    # --- parameters ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer changes."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name: all of them, or a LoRA adapter's."""
        wanted = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: value for name, value in self.model.state_dict().items() if name in wanted}

    def load_trainable_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `trainable_state` gave."""
        expected = self.trainable_state().keys()
        if missing := expected ^ state.keys():
            raise ModelError(
                f"checkpoint: found other tensors than the policy has, e.g. {min(missing)!r}; use the run's own config"
            )
        self.model.load_state_dict(state, strict=False)

    @quiet_libraries()
    def save_pretrained(self, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write model (or adapter) and processor as transformers (or peft) loads them; see `save_weights`."""
        save_weights(self.model, folder, state)
        self.processor.save_pretrained(folder)

    def load_pretrained(self, folder: Path) -> None:
        """Put in the weights that `save_pretrained` wrote, bit for bit; the reference stays as it is."""
        load_weights(self.model, folder)

    def is_saved_in(self, folder: Path) -> bool:
        """Whether `load_pretrained` of a folder would change nothing."""
        return has_weights_of(self.model, folder)

    def recover(self) -> None:
        """Put right what an interrupt can leave behind: gradients, and a LoRA adapter that is off in some layers."""
        if hasattr(self.model, "disable_adapter"):
            self.model.enable_adapter_layers()
        self.model.zero_grad(set_to_none=True)

    @contextmanager
    def _answering(self, reference: bool) -> Iterator[torch.nn.Module]:
        """The model that answers: the policy, or its reference, which may be the policy with its adapter off."""
        adapter_off = reference and self.reference is None and hasattr(self.model, "disable_adapter")
        with (
            quiet_libraries(),
            fitting_threads(self.model),
            self.model.disable_adapter() if adapter_off else nullcontext(),
        ):
            yield self.reference if reference and self.reference is not None else self.model


def load_policy(config: Config, trained: Path | None = None) -> Policy:
    """The policy of a config, its reference beside it; with `trained`, the weights of a run's `best/` or checkpoint.

    An adapter that the settings name is merged where all weights are trained. Else training goes on from it, and the
    reference is a copy of it.
    """
    settings, generation = config.model_settings, config.generation_settings
    device, _ = choose_device(settings.device)
    dtype, _ = choose_dtype(device, settings.dtype)
    base, adapter = base_and_adapter(settings)
    model, processor = load_language_model(base, dtype, settings.trust_remote_code, settings.base_8bit, adapter)
    reference = None
    if settings.lora is None:
        model = model if adapter is None else merged(load_adapter(model, adapter))
        reference = copy.deepcopy(model).requires_grad_(False)
    elif adapter is not None:
        model = load_adapter(model.to(device), adapter)
        reference = frozen_copy(model)
    elif trained is None:
        model = add_lora(model, settings.lora, config.training_settings.seed)
    else:
        model = load_adapter(model, str(trained))
    if trained is not None and reference is not None:
        load_weights(model, trained)
    reference = None if reference is None else reference.to(device).eval()
    asked = {"instruction", "look_instruction", "system_prompt", "chat_template_kwargs", "min_pixels", "max_pixels"}
    asked |= {"gradient_checkpointing"}
    sampled = {"temperature", "max_new_tokens", "decoding", "sampling_batch_size", "prompt_part"}
    options = settings.model_dump(include=asked) | generation.model_dump(include=sampled)
    policy = Policy(model.to(device), processor, reference=reference, **options)
    if policy.not_shared:
        logger.warning("policy: prompts are run once for each completion, not once for a group: %s", policy.not_shared)
    return policy


def _lanes(mask: torch.Tensor, num_prompts: int, prompt_length: int) -> int:
    """Rows for a prompt's completions, so that about as many tokens stand behind a prompt as in it."""
    return max(1, min(len(mask) // num_prompts, round(int(mask.sum()) / num_prompts / prompt_length)))


def _end_tokens(model: torch.nn.Module, tokenizer: object) -> list[int]:
    """All ids that end a completion: the generation config's and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    ends = [i for i in dict.fromkeys([*ids, tokenizer.eos_token_id]) if i is not None]
    if not ends:
        raise ModelError("vlm_model: found no end-of-sequence token; set eos_token in its tokenizer")
    return ends
