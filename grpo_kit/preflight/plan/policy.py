"""The policy's part: sampling, and the GRPO step itself, run on a policy without values."""

import itertools
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace

import torch
from PIL import Image
from transformers import AutoProcessor

from grpo_kit.config import Config
from grpo_kit.config.prompts import load_prompts
from grpo_kit.models.adapters import base_and_adapter
from grpo_kit.models.conversation import Conversation, conversations
from grpo_kit.models.loading import add_lora
from grpo_kit.models.policy import Policy
from grpo_kit.models.prompt_format import EncodedPrompts
from grpo_kit.preflight.plan.architectures import PlanError, language_model, pipeline_shape
from grpo_kit.preflight.plan.parts import Part, Phase, Piece, linear_layers, tensors_of
from grpo_kit.preflight.plan.tracing import Cost, Trace, cost_of, cost_of_repetition, weightless
from grpo_kit.rollout import Rollout
from grpo_kit.training.step import grpo_step

_CHARACTERS_A_TOKEN = 4  # of English, with the vocabularies of today's models
_TEMPLATE_TOKENS = 16  # of a chat template around a system and a user turn
_TOKENS_RUN = 4  # of each completion; what the others cost follows from the third and the fourth


def plan_policy(config: Config, dtype: torch.dtype) -> Part:
    """The policy's part of a plan: every completion at its longest, the prompts the longest of the file.

    A `PlanError` where its shape, or that of the pictures which it looks at, is not known here.
    """
    policy, piece, source, notes = _build(config, dtype)
    settings, length = config.training_settings, config.generation_settings.max_new_tokens
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=settings.learning_rate, fused=True)
    with Trace():  # the first step, in which the optimizer makes its moments
        grpo_step(policy, optimizer, longest_rollout(config, 2), config)
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    there = [*tensors_of(policy.model, policy.reference), *moments]
    held = {"optimizer": sum(moment.nbytes for moment in moments)}
    if policy.reference is not None:
        held["reference"] = Piece.of("reference", policy.reference).weights
    rollout = longest_rollout(config)
    update = _update(policy, optimizer, config, len(rollout.rewards), there)
    phases = (
        Phase("sampling", _sampling(policy, rollout, length, there), "training_settings.group_size"),
        Phase("update", update, "training_settings.micro_batch_size"),
    )
    trained = sum(parameter.numel() for parameter in policy.trainable_parameters())
    notes += (f"{trained:,} of the policy's parameters are trained",)
    return Part("policy", source, (piece,), phases, held, notes)


def _build(config: Config, dtype: torch.dtype) -> tuple[Policy, Piece, str, tuple[str, ...]]:
    """The policy as `load_policy` makes it, without values: with its model, where the shape was read, and notes."""
    settings, generation = config.model_settings, config.generation_settings
    reference = None
    name, _ = base_and_adapter(settings, fetch=False)
    model, source = language_model(name, dtype)
    in_8_bits = linear_layers(model) if settings.base_8bit else []
    if settings.lora is None:
        reference = weightless(language_model(name, dtype)[0].requires_grad_(False)).eval()
    else:
        model = add_lora(model, settings.lora, config.training_settings.seed)
    kind, notes = Policy, ()
    try:
        processor = AutoProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        if settings.use_image:
            found = f"found true, but no processor of {name!r} is on this machine, which knows a picture's tokens"
            mend = f"fetch it where there is network, a few kB: hf download {name} --include '*.json' '*.txt'"
            raise PlanError(f"model_settings.use_image: {found}; {mend}") from error
        kind, processor = _PolicyWithoutTokenizer, SimpleNamespace(pad_token_id=0, eos_token_id=0)
        notes = (f"prompt lengths supposed: {_CHARACTERS_A_TOKEN} characters a token",)
    policy = kind(
        weightless(model).eval(),
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


class _PolicyWithoutTokenizer(Policy):
    """A policy whose prompts are as long as text of their kind is."""

    def encode(self, prompts: Sequence[str | Conversation], images: object = None) -> EncodedPrompts:
        """Ids and mask (P, length) of no meaning, as long as the longest prompt is supposed to be."""
        asked = conversations(prompts)
        texts = [f"{self.system_prompt}{self.instruction.replace('{prompt}', one.prompt)}" for one in asked]
        length = max(map(len, texts)) // _CHARACTERS_A_TOKEN + _TEMPLATE_TOKENS
        ids = torch.ones(len(prompts), length, dtype=torch.long)
        return EncodedPrompts(asked, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {})


def _sampling(policy: Policy, rollout: Rollout, length: int, there: list[torch.Tensor]) -> Cost:
    """G completions of each prompt, of which four tokens are sampled: sizes grow evenly, so all others follow."""
    calls = []

    def note_call(*_: object) -> None:
        calls.append(len(trace.log))
        if len(calls) > _TOKENS_RUN:
            raise _EnoughSampled

    hook = policy.model.register_forward_pre_hook(note_call)
    with Trace(there, answer=False) as trace, suppress(_EnoughSampled):  # the answer: no completion has ended
        policy.sample(rollout.asked(), len(rollout.group_ids) // len(rollout.prompts), seed=0)
    hook.remove()
    prompts_run, _, third, fourth = (trace.log[start:end] for start, end in itertools.pairwise([0, *calls[1:]]))
    cost = Cost.of(prompts_run)
    if length == 1:
        return cost
    # the first token comes from the prompts' own run; the mean of all others is that of the second and the last
    second, last = (cost_of_repetition(number, third, fourth) for number in (0, length - 2))
    return cost.then(second.then(last).times((length - 1) / 2))


class _EnoughSampled(Exception):
    """Ends the sampling."""


def _update(policy: Policy, optimizer: torch.optim.Optimizer, config: Config, rows: int, there: list) -> Cost:
    """The step on a rollout. Of many micro-batches two or three are run: each later one needs and costs the same."""
    size = min(config.training_settings.micro_batch_size or rows, rows)
    run = min(max(2 * size, 3), rows)  # a row alone has no advantage, and nothing would be updated

    def step_on(count: int) -> Cost:
        rollout = longest_rollout(config, count)
        return cost_of(lambda: grpo_step(policy, optimizer, rollout, config), there)

    cost = step_on(run)
    if run < rows:
        last = cost.then(step_on(run - size).times(-1))
        cost = cost.then(last.times((rows - run) / size))
    return cost


def longest_rollout(config: Config, rows: int | None = None) -> Rollout:
    """A rollout of the longest prompts, with completions that are all at their longest, and rewards that differ.

    Args:
        rows: how many, from the first; None is an iteration's.
    """
    settings, length = config.training_settings, config.generation_settings.max_new_tokens
    P, G = settings.prompts_per_iteration, settings.group_size
    groups = torch.arange(P).repeat_interleave(G)[:rows]
    N = len(groups)
    known = sorted(load_prompts(settings.train_prompts), key=lambda prompt: len(prompt.user_prompt))
    prompts = known[-P:][: int(groups.max()) + 1]
    pictures, models = None, config.model_settings
    if models.use_image:
        width, height = config.generation_settings.width, config.generation_settings.height
        side = width if width and height else pipeline_shape(models.generator_config or models.sd_model).side
        pictures = [Image.new("RGB", (width or side, height or side))] * len(prompts)
    return Rollout(
        prompts=prompts,
        group_ids=groups,
        completion_ids=torch.ones(N, length, dtype=torch.long),
        completion_mask=torch.ones(N, length, dtype=torch.bool),
        enhanced_prompts=[""] * N,
        images=[[None]] * N,
        image_seeds=torch.zeros(N, 1, dtype=torch.long),
        reward_parts={},
        rewards=torch.linspace(0, 1, N),
        old_logprobs=torch.zeros(N, length),
        truncated=torch.zeros(N, dtype=torch.bool),
        contexts=pictures and conversations([prompt.user_prompt for prompt in prompts], pictures),
    )
