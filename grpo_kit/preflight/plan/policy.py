"""The policy's part: sampling, and the GRPO step itself, run on a policy without values."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoProcessor

from grpo_kit.config import Config
from grpo_kit.config.prompts import Prompt, load_prompts
from grpo_kit.models.loading import add_lora
from grpo_kit.models.policy import Policy
from grpo_kit.preflight.plan.architectures import PlanError, language_model, pipeline_shape
from grpo_kit.preflight.plan.parts import Part, Phase, Piece, linear_layers, tensors_of
from grpo_kit.preflight.plan.tracing import Cost, Trace, cost_of, cost_of_repetition, weightless
from grpo_kit.rollout import Rollout
from grpo_kit.training.step import grpo_step

_CHARACTERS_A_TOKEN = 4  # of English, with the vocabularies of today's models
_TEMPLATE_TOKENS = 16  # of a chat template around a system and a user turn
_TOKENS_RUN = 3  # of each completion; what the others cost follows from the second and the third


def plan_policy(config: Config, dtype: torch.dtype) -> Part:
    """The policy's part of a plan: every completion at its longest, the prompts the longest of the file.

    Raises:
        PlanError: the model's shape is not known here, or that of the pictures which it looks at.
    """
    policy, piece, source, notes = _build(config, dtype)
    settings, length = config.training_settings, config.generation_settings.max_new_tokens
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=settings.learning_rate, fused=True)
    rollout = longest_rollout(config)
    moments = _started(policy, optimizer, rollout)
    there = [*tensors_of(policy.model, policy.reference), *moments]
    held = {"optimizer": sum(moment.nbytes for moment in moments)}
    if policy.reference is not None:
        held["reference"] = Piece.of("reference", policy.reference).weights
    sampling, update = _sampling(policy, rollout, length, there), _update(policy, optimizer, rollout, config, there)
    phases = (
        Phase("sampling", sampling, "training_settings.group_size"),
        Phase("update", update, "training_settings.micro_batch_size"),
    )
    trained = sum(parameter.numel() for parameter in policy.trainable_parameters())
    notes = (*notes, f"{trained:,} of the policy's parameters are trained")
    return Part("policy", source, (piece,), phases, held, notes)


def longest_prompts(config: Config) -> list[Prompt]:
    """An iteration's prompts, the longest that there are."""
    settings = config.training_settings
    known = sorted(load_prompts(settings.train_prompts), key=lambda prompt: len(prompt.user_prompt))
    return known[-settings.prompts_per_iteration :]


def _build(config: Config, dtype: torch.dtype) -> tuple[Policy, Piece, str, tuple[str, ...]]:
    """The policy as `load_policy` makes it, without values: with its model, where the shape was read, and notes."""
    settings, generation = config.model_settings, config.generation_settings
    mode, reference = FakeTensorMode(), None
    model, source = language_model(settings.vlm_model, dtype)
    in_8_bits = linear_layers(model) if settings.base_8bit else []
    if settings.lora is None:
        reference = weightless(language_model(settings.vlm_model, dtype)[0].requires_grad_(False), mode).eval()
    else:
        model = add_lora(model, settings.lora, None, config.training_settings.seed)
    kind, notes = Policy, ()
    try:
        processor = AutoProcessor.from_pretrained(settings.vlm_model, local_files_only=True)
    except (OSError, ValueError) as error:
        if settings.use_image:
            raise PlanError(
                f"model_settings.use_image: found true, but no processor of {settings.vlm_model!r} is on this machine, "
                "which knows how many tokens a picture becomes; fetch it where there is network, a few kB: "
                f"hf download {settings.vlm_model} --include '*.json' '*.txt'"
            ) from error
        kind, processor = _PolicyWithoutTokenizer, _PlaceholderTokenizer()
        notes = (f"prompt lengths supposed: {_CHARACTERS_A_TOKEN} characters a token",)
    policy = kind(
        weightless(model, mode).eval(),
        processor,
        instruction=settings.instruction,
        system_prompt=settings.system_prompt,
        temperature=generation.temperature,
        max_new_tokens=max(generation.max_new_tokens, _TOKENS_RUN + 1),
        reference=reference,
        chat_template_kwargs=settings.chat_template_kwargs,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    return policy, Piece.of("policy", model, in_8_bits), source, notes


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


class _PlaceholderTokenizer:
    """In place of a tokenizer that is not on this machine."""

    pad_token_id = eos_token_id = 0


class _PolicyWithoutTokenizer(Policy):
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


def _sampling(policy: Policy, rollout: Rollout, length: int, there: list[torch.Tensor]) -> Cost:
    """G completions of each prompt: three tokens are sampled; the cost of those between is the mean of first and last.

    The first token comes from the prompts' own run; from one later token to the next all sizes grow by as much.
    """
    texts = [prompt.user_prompt for prompt in rollout.prompts]
    with Trace(there, answer=False) as trace, suppress(_EnoughSampled), _log_of_calls(policy.model, trace) as calls:
        policy.sample(texts, len(rollout.group_ids) // len(texts), seed=0, images=rollout.prompt_images)
    _, second, third, end = calls
    prompts_run = Cost(max(held for _, held in trace.log[:second]), Counter(one for one, _ in trace.log[:second]))
    if length == 1:
        return prompts_run
    steps = [cost_of_repetition(number, trace.log[second:third], trace.log[third:end]) for number in (1, length - 1)]
    return prompts_run.then(steps[0].then(steps[1]).times((length - 1) / 2))


class _EnoughSampled(Exception):
    """Ends the sampling under a trace."""


@contextmanager
def _log_of_calls(model: torch.nn.Module, trace: Trace) -> Iterator[list[int]]:
    """How many operations were logged when the model was called, call by call; ends before one token too many."""
    calls: list[int] = []

    def note(*_: object) -> None:
        calls.append(len(trace.log))
        if len(calls) > _TOKENS_RUN:
            raise _EnoughSampled

    hook = model.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


def _update(
    policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, config: Config, there: list[torch.Tensor]
) -> Cost:
    """The step on a rollout. Of many micro-batches two are run: each after the first needs and costs the same."""
    rows = len(rollout.rewards)
    size = min(config.training_settings.micro_batch_size or rows, rows)

    def step_on(count: int) -> Cost:
        part = _rows(rollout, count)
        return cost_of(lambda: grpo_step(policy, optimizer, part, config), there)

    cost = step_on(min(2 * size, rows))
    return cost if rows <= 2 * size else cost.then(cost.less(step_on(size)).times(rows / size - 2))


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
