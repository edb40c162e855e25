"""R14: numbers that are not finite, made for real in every part of a step, and what a run does with them.

A hook on a genuine module, an optimizer or a reward spoils chosen iterations: one alone, which must be skipped and
leave no trace, and later several in a row, which must end the run with a diagnosis.
"""

import copy
import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from grpo_kit.config import load_config
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.models.policy import load_policy
from grpo_kit.training.loop import make_optimizer, train
from grpo_kit.training.nonfinite import PATIENCE, NonFiniteError
from tests.chaos import Outcome, fault

QUICK = {
    "model_settings.device": "cpu",
    "generation_settings.num_inference_steps": 1,
    "generation_settings.max_new_tokens": 12,
    "evaluation_settings.validation_prompts": 2,
    "evaluation_settings.paraphrases": False,
    "training_settings.num_iterations": 6,
    "training_settings.prompts_per_iteration": 1,
    "training_settings.group_size": 4,
    "training_settings.learning_rate": 1e-3,
    "training_settings.validate_every": 6,
    "training_settings.save_every": 1,
    "training_settings.keep_checkpoints": 9,
}
ALONE, LASTING = 2, range(4, 7)  # the spoilt iterations
SPOILT = {ALONE, *LASTING}
STOPS = LASTING[0] + PATIENCE - 1


class Clock:
    """Which iteration a run is in, told by its own callback."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    @property
    def spoils(self) -> bool:
        """Whether this iteration is to be spoilt."""
        return self.iteration in SPOILT


Spoiler = Callable[[Experiment, Clock], object]  # installs itself; what it returns has .remove()


def _on_logits(change: Callable[[torch.Tensor], torch.Tensor], *, graded: bool, reference: bool = False) -> Spoiler:
    """Spoil what the language head gives: while sampling (no gradient) or while scoring."""

    def install(kit: Experiment, clock: Clock) -> object:
        model = kit.policy.reference if reference else kit.policy.model

        def hook(_: object, __: object, logits: torch.Tensor) -> torch.Tensor | None:
            return change(logits.clone()) if clock.spoils and torch.is_grad_enabled() == graded else None

        return model.get_output_embeddings().register_forward_hook(hook)

    return install


def _one_nan(logits: torch.Tensor) -> torch.Tensor:
    """One number of one token's logits."""
    logits[0, -1, 5] = torch.nan
    return logits


def _one_infinite(logits: torch.Tensor) -> torch.Tensor:
    logits[0, -1, 5] = torch.inf
    return logits


def _impossible(logits: torch.Tensor) -> torch.Tensor:
    """All tokens but the first have probability 0, also those that were sampled: infinite, but never NaN."""
    logits[..., 1:] = -torch.inf
    return logits


def _on_gradient(name_has: str, factor: float) -> Spoiler:
    """Spoil the gradient of the first weight with this in its name; of the first one where there is none."""

    def install(kit: Experiment, clock: Clock) -> object:
        trained = {name: p for name, p in kit.policy.model.named_parameters() if p.requires_grad}
        parameter = next((p for name, p in trained.items() if name_has in name), next(iter(trained.values())))
        return parameter.register_hook(lambda gradient: gradient * factor if clock.spoils else None)

    return install


def _on_latents(kit: Experiment, clock: Clock) -> object:
    """What the generator's transformer predicts."""

    def hook(_: object, __: object, output: object) -> object:
        latents = output[0] * torch.nan if clock.spoils else output[0]
        return (latents, *output[1:])

    return kit.generator.pipeline.transformer.register_forward_hook(hook)


def _on_decoder(kit: Experiment, clock: Clock) -> object:
    """What the autoencoder makes of the latents, as float16 overflows there."""
    decoder = kit.generator.pipeline.vae.decoder
    return decoder.register_forward_hook(lambda _, __, pixels: pixels * torch.inf if clock.spoils else None)


def _on_optimizer(what: str) -> Spoiler:
    """Weights, or momentum, that the optimizer's step leaves behind."""

    def install(_: Experiment, clock: Clock) -> object:
        def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
            if clock.spoils:
                parameter = optimizer.param_groups[0]["params"][-1]
                values = parameter.data if what == "weights" else optimizer.state[parameter]["exp_avg_sq"]
                values.view(-1)[0] = torch.inf

        return register_optimizer_step_post_hook(hook)

    return install


class _Removed:
    def remove(self) -> None:
        pass


def _on_reward(value: float) -> Spoiler:
    """What the reward says: of two samples in a group the one, of the others the other extreme."""

    def install(kit: Experiment, clock: Clock) -> object:
        name, reward = next(iter(kit.rewards.parts.items()))

        def spoilt(images: list, prompts: list, rewrites: list) -> object:
            signs = [value * (-1) ** number for number in range(len(images))]
            return signs if clock.spoils else reward(images, prompts, rewrites)

        kit.rewards.parts[name] = spoilt
        return _Removed()

    return install


@dataclass(frozen=True)
class Spoilt:
    """A spoiler, the part that a diagnosis has to name (or one of several), and the settings under which it bites."""

    spoil: Spoiler
    parts: str
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)


OVERFLOWING = {"training_settings.scale_rewards": "none", "training_settings.loss_type": "luspo"}
PARTS = {
    "sampling-nan": Spoilt(_on_logits(_one_nan, graded=False), "sampling"),
    "sampling-inf": Spoilt(_on_logits(_one_infinite, graded=False), "sampling"),
    "sampling-nan-flat": Spoilt(
        _on_logits(lambda logits: logits * torch.nan, graded=False), "sampling", {"training_settings.beta": 0.0}
    ),
    "scoring-nan": Spoilt(_on_logits(_one_nan, graded=True), "scoring"),
    "scoring-impossible": Spoilt(_on_logits(_impossible, graded=True), "scoring", {"training_settings.beta": 0.0}),
    "reference-nan": Spoilt(_on_logits(_one_nan, graded=False, reference=True), "reference"),
    "loss-overflow": Spoilt(_on_reward(3e38), "loss gradient", OVERFLOWING),
    "gradient-nan": Spoilt(_on_gradient("layers.1.", torch.nan), "gradient"),
    "gradient-inf": Spoilt(_on_gradient("embed_tokens", torch.inf), "gradient"),
    "gradient-overflow": Spoilt(_on_gradient("layers.0.", 1e30), "gradient"),
    "latents-nan": Spoilt(_on_latents, "pictures"),
    "pixels-inf": Spoilt(_on_decoder, "pictures"),
    "reward-nan": Spoilt(_on_reward(torch.nan), "rewards", {"training_settings.on_bad_reward": "drop_sample"}),
    "optimizer-weights": Spoilt(_on_optimizer("weights"), "optimizer"),
    "optimizer-momentum": Spoilt(_on_optimizer("momentum"), "optimizer"),
}
LORA = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
FORMS = {  # other settings under which the same faults must be met
    "plain": {},
    "validated": {"training_settings.validate_every": 4},
    "one update": {"training_settings.updates_per_rollout": 1},
    "micro-batches": {"training_settings.micro_batch_size": 2},
    "adapter": {"model_settings.lora": LORA},
}


@dataclass(frozen=True)
class Seen:
    """What a spoilt run left: a digest of weights and momentum after each iteration, and its error."""

    folder: Path
    states: dict[int, str]
    rows: list[dict]
    error: str | None


def spoilt_run(
    kit: Experiment, spoilt: Spoilt, folder: Path, settings: Mapping[str, object] | None = None, starts: int = 1
) -> Seen:
    """Train a fresh copy of the kit's policy while one part spoils some iterations; `starts` is the first of it."""
    config = load_config(kit.config, QUICK | dict(spoilt.settings) | dict(settings or {}))
    policy = load_policy(config) if config.model_settings.lora else copy.deepcopy(kit.policy)
    rewards = dataclasses.replace(kit.rewards, parts=dict(kit.rewards.parts))
    own = dataclasses.replace(kit, config=config, policy=policy).with_rewards(rewards)
    clock, states, optimizers, error = Clock(starts), {}, [], None

    def remember(*arguments: object) -> torch.optim.Optimizer:
        optimizers.append(make_optimizer(*arguments))
        return optimizers[-1]

    def told(metrics: dict[str, float]) -> None:
        states[int(metrics["iteration"])] = _digest(policy.trainable_parameters(), optimizers[-1])
        clock.iteration = int(metrics["iteration"]) + 1

    with _installed(spoilt.spoil, own, clock), patch.dict(train.__globals__, make_optimizer=remember):
        try:
            train(own, folder, progress=False, on_iteration=told)
        except NonFiniteError as stopped:
            error = str(stopped)
    rows = [{name: value for name, value in row.items() if "time" not in name} for row in _rows(folder)]
    return Seen(folder, states, rows, error)


@contextmanager
def _installed(spoil: Spoiler, kit: Experiment, clock: Clock) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(spoil(kit, clock).remove)
        yield


def _rows(folder: Path) -> list[dict]:
    from grpo_kit.runs.folder import RunFolder

    return RunFolder(folder).metrics()


def _digest(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> str:
    moments = [value for values in optimizer.state.values() for value in values.values()]
    content = b"".join(tensor.detach().float().numpy().tobytes() for tensor in (*parameters, *moments))
    return hashlib.sha256(content).hexdigest()


def problems(seen: Seen, parts: str, updates: int) -> list[str]:
    """What a spoilt run did otherwise than it should; empty where all is well."""
    found = []
    skipped = {row["iteration"]: sum(row.get(f"skipped_updates/{p}", 0) for p in parts.split()) for row in seen.rows}
    expected = {i: updates if i in SPOILT else 0 for i in range(1, STOPS + 1)}
    if skipped != expected:
        found.append(f"skipped because of {parts}: {skipped}, expected {expected}")
    states = seen.states
    if not (states.get(1) == states.get(2) != states.get(3) == states.get(4) == states.get(5)):
        found.append("weights or momentum moved in a skipped step, or did not in another")
    said = f"since iteration {LASTING[0]}; not finite: "
    if seen.error is None or said not in seen.error or "\n" in seen.error:
        found.append(f"diagnosis: {seen.error}")
    elif f"iteration {STOPS - 1} is committed" not in seen.error or "Try" not in seen.error:
        found.append(f"diagnosis without commit or advice: {seen.error}")
    return found + [f"saved with a number that is not finite: {name}" for name in not_finite_files(seen.folder)]


def not_finite_files(folder: Path) -> list[str]:
    """Saved tensors, of policies and optimizers, that are not finite."""
    files = sorted(folder.rglob("*.safetensors"))
    return [
        f"{file.relative_to(folder)}: {name}"
        for file in files
        for name, tensor in load_file(file).items()
        if not tensor.isfinite().all()
    ] or ([] if files else ["nothing was saved"])


SHORT = ("sampling-nan-flat", "gradient-nan", "latents-nan")


@fault("R14", "NaN and infinity in sampling, pictures, rewards, scoring, loss, gradient, optimizer")
def non_finite(short: bool) -> Outcome:
    """Spoil every part of a step, under every form of the settings; lost is whatever `problems` finds."""
    kit = load_experiment(load_config("tiny", QUICK))
    outcome = Outcome(0)
    for form in list(FORMS)[: 1 if short else None]:
        for name in SHORT if short else PARTS:
            if name == "reference-nan" and form == "adapter":
                continue  # the reference is the same model there
            with tempfile.TemporaryDirectory() as place:
                seen = spoilt_run(kit, PARTS[name], Path(place) / "run", FORMS[form])
                found = problems(seen, PARTS[name].parts, 1 if form == "one update" else 2)
            remarks = tuple(f"{name}, {form}: {problem}" for problem in found)
            outcome += Outcome(1, lost=int(bool(found)), remarks=remarks)
    return outcome
