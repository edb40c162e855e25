"""The policy's part: sampling, and the GRPO step itself, run on a policy without values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoProcessor

from grpo_kit.config import Config
from grpo_kit.config.prompts import Prompt, load_prompts
from grpo_kit.grpo.logprobs import token_logprobs
from grpo_kit.models.decoding import choose_tokens
from grpo_kit.models.loading import add_lora
from grpo_kit.models.policy import Policy
from grpo_kit.models.rows import continued_rows
from grpo_kit.models.shared_prefix import Prefix, run_prompts
from grpo_kit.preflight.plan.architectures import PlanError, language_model, pipeline_shape
from grpo_kit.preflight.plan.parts import Part, Phase, Piece, linear_layers, tensors_of, total_bytes
from grpo_kit.preflight.plan.tracing import Cost, Trace, weightless
from grpo_kit.rollout import Rollout
from grpo_kit.training.step import grpo_step

_CHARACTERS_A_TOKEN = 4  # of English, with the vocabularies of today's models
_TEMPLATE_TOKENS = 16  # of a chat template around a system and a user turn


@dataclass(frozen=True)
class _Built:
    policy: Policy
    source: str
    notes: tuple[str, ...]
    in_8_bits: list[torch.nn.Linear]


def plan_policy(config: Config, dtype: torch.dtype) -> Part:
    """The policy's part of a plan: every completion at its longest, the prompts the longest of the file.

    Raises:
        PlanError: the model's shape is not known here, or that of the pictures which it looks at.
    """
    built = _build(config, dtype)
    policy, settings = built.policy, config.training_settings
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=settings.learning_rate, fused=True)
    rollout = longest_rollout(config)
    moments = _started(policy, optimizer, rollout)
    there = [*tensors_of(policy.model, policy.reference), *moments]
    trained = sum(parameter.numel() for parameter in policy.trainable_parameters())
    held = {"optimizer": total_bytes(moments)}
    if policy.reference is not None:
        held["reference"] = Piece.of("reference", policy.reference).weights
    phases = (
        Phase("sampling", _sampling(policy, rollout, settings.group_size, there), "training_settings.group_size"),
        Phase("update", _update(policy, optimizer, rollout, config, there), "training_settings.micro_batch_size"),
    )
    notes = (*built.notes, f"{trained:,} of the policy's parameters are trained")
    return Part("policy", built.source, (Piece.of("policy", policy.model, built.in_8_bits),), phases, held, notes)


def longest_prompts(config: Config) -> list[Prompt]:
    """An iteration's prompts, the longest that there are."""
    settings = config.training_settings
    known = sorted(load_prompts(settings.train_prompts), key=lambda prompt: len(prompt.user_prompt))
    return known[-settings.prompts_per_iteration :]


def _build(config: Config, dtype: torch.dtype) -> _Built:
    """The policy as `load_policy` makes it, without values."""
    settings, generation = config.model_settings, config.generation_settings
    mode = FakeTensorMode()
    model, source = language_model(settings.vlm_model, dtype)
    reference, in_8_bits = None, linear_layers(model) if settings.base_8bit else []
    if settings.lora is None:
        reference = weightless(language_model(settings.vlm_model, dtype)[0].requires_grad_(False), mode).eval()
    else:
        model = add_lora(model, settings.lora, None, config.training_settings.seed)
    options = {
        "instruction": settings.instruction,
        "system_prompt": settings.system_prompt,
        "temperature": generation.temperature,
        "max_new_tokens": generation.max_new_tokens,
        "reference": reference,
        "chat_template_kwargs": settings.chat_template_kwargs,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    model = weightless(model, mode).eval()
    try:
        processor = AutoProcessor.from_pretrained(settings.vlm_model, local_files_only=True)
    except (OSError, ValueError) as error:
        if settings.use_image:
            raise PlanError(
                f"model_settings.use_image: found true, but no processor of {settings.vlm_model!r} is on this machine, "
                "which knows how many tokens a picture becomes; fetch it where there is network, a few kB: "
                f"hf download {settings.vlm_model} --include '*.json' '*.txt'"
            ) from error
        policy = _PolicyWithoutWords(model, _NoWords(), **options)
        return _Built(
            policy, source, (f"prompt lengths supposed: {_CHARACTERS_A_TOKEN} characters a token",), in_8_bits
        )
    return _Built(Policy(model, processor, **options), source, (), in_8_bits)


def _seen(config: Config, count: int) -> list[Image.Image] | None:
    """The pictures that the policy looks at, one a prompt, in the size in which the generator draws them."""
    if not config.model_settings.use_image:
        return None
    settings = config.generation_settings
    size = (settings.width, settings.height)
    if None in size:
        side = pipeline_shape(config.model_settings.sd_model).side
        size = (settings.width or side, settings.height or side)
    return [Image.new("RGB", size)] * count


class _NoWords:
    """In place of a tokenizer that is not on this machine."""

    pad_token_id = eos_token_id = 0


class _PolicyWithoutWords(Policy):
    """A policy whose prompts are as long as text of their kind is."""

    def encode(self, prompts: Sequence[str], images: object = None) -> dict[str, torch.Tensor]:
        """Ids and mask (P, length) of no meaning, as long as the longest prompt is supposed to be."""
        texts = [f"{self.system_prompt}{self.instruction.replace('{prompt}', prompt)}" for prompt in prompts]
        length = max(map(len, texts)) // _CHARACTERS_A_TOKEN + _TEMPLATE_TOKENS
        ids = torch.ones(len(prompts), length, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _started(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout) -> list[torch.Tensor]:
    """Let the optimizer make its moments, as in the first step, of what gradients reach; returns them."""
    with Trace():
        rollout.score(policy, torch.zeros(1, dtype=torch.long)).logprobs.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [moment for moments in optimizer.state.values() for moment in moments.values()]


@torch.no_grad()
def _sampling(policy: Policy, rollout: Rollout, group_size: int, there: list[torch.Tensor]) -> Cost:
    """G completions of each prompt: the first step and the last are run, those between cost their mean."""
    count, model, trace = policy.max_new_tokens - 1, policy.model, Trace(there)
    with trace:
        texts = [prompt.user_prompt for prompt in rollout.prompts]
        prefix = run_prompts(model, policy.encode(texts, rollout.prompt_images))
        continuing = _InRows if policy.not_shared else _BehindPrompts
        completions = continuing(model, prefix, group_size, policy.max_new_tokens)
        _choose(prefix.last_logits.repeat_interleave(group_size, dim=0), policy.temperature)
    prompts_run = trace.cost
    if count > 0:
        with trace:
            _choose(completions.step(0), policy.temperature)
    if count > 1:
        with Trace(there):  # what lies between only fills the cache
            completions.pass_over(count - 2)
        with trace:
            _choose(completions.step(count - 1), policy.temperature)
    steps = trace.cost.less(prompts_run)
    return prompts_run.then(steps.times(count / 2) if count > 1 else steps)


def _choose(logits: torch.Tensor, temperature: float) -> None:
    """Choose the next tokens as `decode` does."""
    token_logprobs(logits, choose_tokens(logits, torch.zeros(len(logits)), temperature), temperature)


class _BehindPrompts:
    """Completions laid behind their prompt, as `Policy` continues them."""

    def __init__(self, model: torch.nn.Module, prefix: Prefix, group_size: int, length: int) -> None:
        self.model, self.prefix, self.group_size = model, prefix, group_size
        self.cache = prefix.room_for(group_size * length)

    def step(self, place: int) -> torch.Tensor:
        """Logits (N, V) of one more token of each completion."""
        P, G = len(self.prefix.mask), self.group_size
        sees = torch.eye(G, dtype=torch.bool).repeat(1, place + 1).expand(P, -1, -1)
        steps = torch.full((P, G), place)
        return self.prefix.extend(self.model, torch.ones_like(steps), steps, sees, self.cache).flatten(0, 1)

    def pass_over(self, steps: int) -> None:
        """Fill the cache as so many steps do."""
        shape = list(self.prefix.cache.layers[0].keys.shape)
        shape[2] = self.group_size * steps
        for layer in self.cache.layers:
            layer.update(layer.keys.new_zeros(shape), layer.values.new_zeros(shape))


class _InRows:
    """Completions in rows of their own."""

    def __init__(self, model: torch.nn.Module, prefix: Prefix, group_size: int, length: int) -> None:
        self.rows, self.prefix = len(prefix.mask) * group_size, prefix
        self.next_logits = continued_rows(model, prefix, group_size)
        self.passed = 0

    def step(self, place: int) -> torch.Tensor:
        """Logits (N, V) of one more token of each completion."""
        return self.next_logits(torch.ones(self.rows, dtype=torch.long), place)

    def pass_over(self, steps: int) -> None:
        """Fill the cache as so many steps do."""
        for layer in self.prefix.cache.layers:
            shape = list(layer.keys.shape)
            shape[2] = steps
            layer.update(layer.keys.new_zeros(shape), layer.values.new_zeros(shape))


def _update(
    policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, config: Config, there: list[torch.Tensor]
) -> Cost:
    """The step on a rollout. Of many micro-batches two are run: each after the first needs and costs the same."""
    rows = len(rollout.rewards)
    size = min(config.training_settings.micro_batch_size or rows, rows)
    cost = _step_on(policy, optimizer, _rows(rollout, min(2 * size, rows)), config, there)
    if rows <= 2 * size:
        return cost
    one = _step_on(policy, optimizer, _rows(rollout, size), config, there)
    return cost.then(cost.less(one).times(rows / size - 2))


def _step_on(
    policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, config: Config, there: list[torch.Tensor]
) -> Cost:
    with Trace(there) as trace:
        grpo_step(policy, optimizer, rollout, config)
    return trace.cost


def longest_rollout(config: Config) -> Rollout:
    """A rollout of the longest prompts, with completions that are all at their longest, and rewards that differ."""
    prompts, length = longest_prompts(config), config.generation_settings.max_new_tokens
    P, G = len(prompts), config.training_settings.group_size
    N = P * G
    return Rollout(
        prompts=prompts,
        group_ids=torch.arange(P).repeat_interleave(G),
        completion_ids=torch.ones(N, length, dtype=torch.long),
        completion_mask=torch.ones(N, length, dtype=torch.bool),
        enhanced_prompts=[""] * N,
        images=[[None]] * N,
        image_seeds=torch.zeros(N, 1, dtype=torch.long),
        reward_parts={},
        rewards=torch.linspace(0, 1, N),
        old_logprobs=torch.zeros(N, length),
        truncated=torch.zeros(N, dtype=torch.bool),
        prompt_images=_seen(config, P),
    )


def _rows(rollout: Rollout, count: int) -> Rollout:
    """Its first rows."""
    groups = rollout.group_ids[:count]
    columns = {name: value[:count] for name, value in vars(rollout).items() if torch.is_tensor(value)}
    lists = {"enhanced_prompts": rollout.enhanced_prompts[:count], "images": rollout.images[:count]}
    prompts = int(groups.max()) + 1
    seen = None if rollout.prompt_images is None else rollout.prompt_images[:prompts]
    return replace(rollout, prompts=rollout.prompts[:prompts], prompt_images=seen, **columns, **lists)
