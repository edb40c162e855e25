"""The settings of a run, section by section: what each is, its type, its bounds and its default; see `Config`."""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from grpo_kit.config.display import line, table
from grpo_kit.config.errors import nearest, shown
from grpo_kit.config.paths import PROJECT_ROOT, change_paths, inside_project, resolve_paths

PROFILE_FOLDER = Path(__file__).resolve().parent / "profiles"
PROFILES = tuple(sorted(path.stem for path in PROFILE_FOLDER.glob("*.json")))


def profile_settings(name: str) -> dict[str, Any]:
    """A profile's settings, with those of the profile that it builds on."""
    data = json.loads((PROFILE_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    resolve_paths(data, [PROJECT_ROOT])
    below = profile_settings(data["profile"]) if "profile" in data else {}
    return merged(below, data) | {"profile": name}


def merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; a value inside a section, a dict too, replaces the one below it."""
    result = dict(base)
    for key, value in changes.items():
        below = base.get(key)
        result[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, Mapping) else value
    return result


def _not_a_bool(value: object) -> object:
    if isinstance(value, bool):
        raise AssertionError("a boolean is no number")  # not a ValueError, whose text would be what is allowed
    return value


_NUMERIC = BeforeValidator(_not_a_bool)  # stands last, so that the bounds before it stay visible in the JSON schema
Whole = Annotated[int, _NUMERIC]
Count = Annotated[int, Field(ge=1), _NUMERIC]
Pixels = Annotated[int, Field(ge=8), _NUMERIC]
Number = Annotated[float, _NUMERIC]
Positive = Annotated[float, Field(gt=0), _NUMERIC]
Name = Annotated[str, Field(min_length=1)]
_DEVICES = {"allowed": "auto, cpu, mps, cuda or cuda:N"}
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", json_schema_extra=_DEVICES)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
Combination = Literal["sum_then_normalize", "normalize_then_sum"]
PROMPT_PARTS = ("whole", "after_thinking", "quoted")
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values never change, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def __repr__(self) -> str:
        return line(type(self).__name__, dict(self))

    __str__ = __repr__

    def _repr_html_(self) -> str:
        fields = type(self).model_fields
        return table(type(self).__name__, ((name, value, fields[name].description or "") for name, value in self))


class LoraSettings(Section):
    """A low-rank adapter on the policy (peft's `LoraConfig`)."""

    r: Count = Field(16, description="rank of the adapter")
    alpha: Count = Field(32, description="scale of the adapter; its weight is alpha / r")
    dropout: Number = Field(0.0, ge=0, lt=1)
    target_modules: list[Name] | None = Field(None, description="null: all linear layers of the language model")


class GeneratorLora(Section):
    """A LoRA that changes the generator (diffusers' `load_lora_weights`)."""

    path: Name = Field(description="file, folder or hub id")
    weight: Number = Field(1.0, description="strength; 0 leaves the generator as it is")
    weight_name: Name | None = Field(None, description="the file, where the folder or hub id has several")


def _as_loras(value: object) -> object:
    """One LoRA, or a path alone, as the list that it stands for."""
    values = value if isinstance(value, list) else [value]
    return value if value is None else [{"path": one} if isinstance(one, str) else one for one in values]


GeneratorLoras = Annotated[list[GeneratorLora], Field(min_length=1), BeforeValidator(_as_loras)]


class ModelSettings(Section):
    """Which models, where they run and what the policy is told."""

    vlm_model: Name = Field(description="the policy: hub id or folder of a transformers model or a LoRA adapter")
    policy_adapter: Name | None = Field(None, description="LoRA on vlm_model to go on from: hub id or peft folder")
    sd_model: Name = Field(description="the generator: hub id or folder of a diffusers pipeline, or one file")
    generator_config: Name | None = Field(None, description="pipeline whose configs an sd_model of one file has")
    generator_lora: GeneratorLoras | None = Field(None, description="LoRAs on the generator, which stay as they are")
    clip_model: Name = Field(description="the reward model: hub id, folder or open_clip name")
    clip_pretrained: Name | None = Field(None, description="open_clip's tag of the weights, where clip_model is a name")
    device: Device = Field("auto", description="auto is the best one here")
    generator_device: Device | None = Field(None, description="where pictures are drawn; null: device")
    reward_device: Device | None = Field(None, description="where reward models compute; null: device")
    dtype: Dtype = "auto"
    lora: LoraSettings | None = Field(None, description="null trains all weights")
    base_8bit: bool = Field(False, description="weights below the adapter in 8 bits; needs lora and the extra `int8`")
    drop_t5: bool = Field(True, description="leave out SD3's third text encoder")
    t5_8bit: bool = Field(False, description="the generator's T5 keeps its weights in 8 bits; needs the extra `int8`")
    generator_dtype: Dtype | None = Field(None, description="the generator's; null: dtype")
    text_encoders_on_cpu: bool = Field(False, description="the generator's text encoders compute on the CPU")
    offload_generator: bool = Field(False, description="only the generator's part that computes is on the accelerator")
    vae_slicing: bool = Field(False, description="decode the images of a batch one after the other")
    vae_tiling: bool = Field(False, description="decode a large image tile by tile")
    attention_slicing: bool = Field(False, description="a U-Net's attention in parts; for where sdpa is not at hand")
    safety_checker: bool = Field(True, description="keep the checker that some generators bring; false draws without")
    system_prompt: str = ""
    instruction: str = Field("Improve: {prompt}", description="what the policy is asked; {prompt} is the user's prompt")
    look_instruction: str = Field(
        "Here is what it drew. Improve your prompt for: {prompt}. If the picture shows it, answer: keep it",
        description="what the policy is asked beside the picture of an earlier turn",
    )
    look_at: Literal["own", "other", "grey", "words", "nothing"] = Field(
        "own", description="what the policy sees; all but own are controls: another prompt's pictures, grey ones, …"
    )
    min_pixels: Count | None = Field(None, description="of a picture that the policy reads; null: as it is")
    max_pixels: Count | None = Field(None, description="of a picture that the policy reads; null: as it is")
    painters: list[dict[Name, Name]] | None = Field(
        None, description="who draws: each swaps these words; the latent decides which one. null: nobody swaps any"
    )
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        {"enable_thinking": False}, description="variables for the policy's chat template"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for more time: layers are computed twice")
    use_image: bool = Field(False, description="the policy sees the picture that the user's own prompt gives")
    trust_remote_code: bool = Field(False, description="run Python code that comes with a hub model")

    @field_validator("painters")
    @classmethod
    def _swap_in_pairs(cls, value: list[dict[str, str]] | None) -> list[dict[str, str]] | None:
        if value is not None and (not value or any(swaps.get(b) != a for swaps in value for a, b in swaps.items())):
            raise ValueError('a list of at least one object that swaps words in pairs: {"red": "blue", "blue": "red"}')
        return value

    @field_validator("instruction", "look_instruction")
    @classmethod
    def _names_the_prompt(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("a text that contains {prompt} once")
        return value


class GenerationSettings(Section):
    """How the policy samples text and the generator draws."""

    max_new_tokens: Count = Field(description="the longest rewrite, in tokens")
    temperature: Number = Field(1.0, gt=0, description="of sampling during training")
    decoding: Literal["plain", "static", "compiled"] = Field("plain", description="cache: growing, fixed, compiled")
    sampling_batch_size: Count | None = Field(None, description="completions in one call, in whole groups; null: all")
    prompt_part: Name = Field("whole", description="what is drawn and scored of a completion; all where none matches")
    num_inference_steps: Count
    rollout_steps: Count | None = Field(None, description="denoising steps in training, if fewer than all")
    guidance_scale: Number = Field(ge=0)
    negative_prompt: str | None = Field(None, description="what pictures should not show; needs guidance_scale above 1")
    height: Pixels | None = Field(None, description="pixels; null: the generator's own size")
    width: Pixels | None = Field(None, description="pixels; null: the generator's own size")
    frames: Count | None = Field(None, description="of a video, or views of an object; null: the generator's own")
    frame_rate: Positive | None = Field(None, description="frames a second of a video; null: the generator's own")
    seconds: Positive | None = Field(None, description="of a sound; null: as long as the generator makes it")
    images_per_prompt: Count = 1
    share_seeds: bool = Field(True, description="the rewrites of one prompt are drawn from the same latents")
    max_sequence_length: Annotated[int, Field(ge=0), _NUMERIC] | None = Field(None, description="of T5; null: default")
    image_batch_size: Count | Literal["auto"] = Field(16, description="images in one call; auto: as many as fit")
    image_memory_gb: Positive | None = Field(None, description="memory for image_batch_size auto; null: what is free")
    turns: Count = Field(1, description="how often the policy writes; from the second on it sees what it caused")
    credit: Literal["final", "difference", "peak"] = Field("final", description="how a reward is shared among turns")
    branches: bool = Field(False, description="a group's later rewrites go on from one of its pictures, not from each")
    scheduler: Name | None = Field(None, description='such as "EulerDiscreteScheduler"; null: the pipeline\'s own')

    @field_validator("prompt_part")
    @classmethod
    def _has_one_group(cls, value: str) -> str:
        with contextlib.suppress(re.error, RecursionError, OverflowError):
            if value in PROMPT_PARTS or re.compile(value).groups == 1:
                return value
        raise ValueError(f"{', '.join(PROMPT_PARTS)}, or a regular expression with one group")


class ShapingSettings(Section):
    """How one reward is changed before it is weighted: clipped, then scaled, then normalised."""

    normalize: Literal["none", "running", "group"] = Field("none", description="by the deviation of run or group")
    clip: tuple[Number, Number] | None = Field(
        None, description="bounds", json_schema_extra={"allowed": "[low, high] with low < high, or null"}
    )
    scale: Number = Field(1.0, description="factor; without effect where the reward is normalised")

    @field_validator("clip")
    @classmethod
    def _low_below_high(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError("low is not below high")
        return value


class RewardSettings(Section):
    """What is rewarded, and what is only watched."""

    weights: dict[Name, Number] = Field(min_length=1, description="in the total; of one's own: file.py:function")
    monitors: list[Name] = Field([], description="scored and logged, never rewarded")
    options: dict[Name, dict[Name, Any]] = Field({}, description='such as {"safety": {"avoid": ["blood"]}}')
    shaping: dict[Name, ShapingSettings] = Field({}, description="how a reward is changed before it is weighted")
    combine: Combination = Field("sum_then_normalize", description="or every reward within its group first (GDPO)")
    threads: dict[Name, Count] = Field({}, description="threads that share a batch of a reward that is thread-safe")
    timeout: dict[Name, Positive] = Field({}, description="seconds that a call may take; then on_bad_reward decides")
    overlap: bool | None = Field(None, description="score while the next are drawn; null: where devices differ")

    @field_validator("monitors")
    @classmethod
    def _only_watched(cls, value: list[str], info: Any) -> list[str]:
        rewarded = sorted(set(value) & set(info.data.get("weights", {})))
        if rewarded:
            raise ValueError(f"names that are not among the weights ({', '.join(rewarded)} is rewarded)")
        return value

    @field_validator("options")
    @classmethod
    def _can_be_written(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        try:  # config.json has to give the same run again
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError):
            raise ValueError("what JSON can hold: finite numbers, whole characters, lists, objects") from None
        return value

    @field_validator("shaping")
    @classmethod
    def _only_rewarded(cls, value: dict[str, ShapingSettings], info: Any) -> dict[str, ShapingSettings]:
        rewarded = info.data.get("weights")
        unknown = sorted(set(value) - set(rewarded or value))
        if unknown:
            hint = nearest(unknown[0], list(rewarded))
            raise ValueError(f"names among the weights ({', '.join(rewarded)}), not {shown(unknown[0])}{hint}")
        return value


class TrainingSettings(Section):
    """The GRPO loop, in TRL's vocabulary."""

    train_prompts: Name = Field(description="prompts to train on: JSONL, JSON, CSV, parquet, a `datasets` folder")
    learning_rate: Number = Field(ge=0, le=1)
    lr_scheduler_type: Schedule = Field("constant", description="of transformers' get_scheduler, over all updates")
    lr_scheduler_kwargs: dict[Name, bool | int | float | str] = Field({}, description='such as {"num_cycles": 2}')
    warmup_steps: Whole = Field(0, ge=0, description="updates in which the learning rate rises from 0")
    warmup_ratio: Number = Field(0.0, ge=0, lt=1, description="of all updates, where warmup_steps is 0")
    group_size: Whole = Field(ge=2, description="rewrites per prompt, which are compared with each other")
    num_iterations: Count = Field(description="iterations of rollout and update")
    prompts_per_iteration: Count
    updates_per_rollout: Count = Field(1, description="optimizer steps on one rollout")
    beta: Number = Field(0.0, ge=0, description="weight of the KL term; 0 needs no reference")
    epsilon: Number = Field(0.2, gt=0, lt=1)
    epsilon_high: Positive | None = Field(None, description="null: epsilon")
    delta: Annotated[float, Field(gt=1), _NUMERIC] | None = Field(None, description="ratio's bound for advantages < 0")
    loss_type: LossType = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    use_bias_correction_kl: bool = Field(False, description="KL times the ratio: unbiased after the first inner update")
    scale_rewards: Literal["group", "batch", "none"] = "group"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    advantage_eps: Number = Field(1e-4, gt=0)
    reward_noise_floor: Number = Field(0.0, ge=0, description="a group whose rewards differ by no more is left out")
    on_bad_reward: Literal["raise", "drop_sample", "drop_group"] = Field("drop_sample", description="for NaN, an error")
    max_resampling: Whole = Field(0, ge=0, description="times that groups without spread are drawn again (DAPO)")
    mask_truncated_completions: bool = Field(False, description="what the length limit ended carries no loss")
    truncation_penalty: Number = Field(0.0, ge=0, description="taken from the reward of what the length limit ended")
    redraw_cost: Number = Field(0.0, ge=0, description="taken from the reward for each later turn that keeps nothing")
    max_grad_norm: Number = Field(1.0, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    micro_batch_size: Count | None = Field(None, description="samples in one backward pass; null: all")
    seed: Whole = Field(0, ge=0, lt=2**63)
    validate_every: Count = Field(20, description="iterations between validations")
    save_every: Count = Field(20, description="iterations between checkpoints")
    save_minutes: Positive | None = Field(5.0, description="or minutes, what comes first; null: by iterations alone")
    keep_checkpoints: Whole = Field(2, ge=2, description="checkpoints kept; the older one serves when one is damaged")
    stop_on_divergence: bool = Field(False, description="end a run whose reward rises while the held-out score falls")


class EvaluationSettings(Section):
    """The paired comparison on held-out prompts."""

    val_prompts: Name = Field(description="held-out prompts, in a file of the same forms")
    num_prompts: Annotated[int, Field(ge=2), _NUMERIC] | None = Field(None, description="how many of them; null: all")
    seeds_per_prompt: Count = Field(4, description="latents per prompt, the same for every variant")
    confidence: Number = Field(0.95, gt=0, lt=1)
    n_resamples: Whole = Field(2000, ge=100, description="bootstrap resamples")
    validation_prompts: Count = Field(32, description="prompts of the periodic validation")
    gold: Literal["shapeworld"] | None = Field(None, description="the check by a program, where the world has one")
    paraphrases: bool = Field(True, description="ask the held-out prompts in other words too, where they have any")
    held_out: Name | None = Field(None, description="monitor for best/ and divergence; null: gold where it is scored")


class TrackingSettings(Section):
    """Where a run is reported besides its folder."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    tensorboard: bool = False  # needs the optional extra `tensorboard`
    project: Name = "grpo_kit"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class Config(Section):
    """All settings of a run. Paths are absolute, hub ids are left as they are."""

    profile: Literal[PROFILES] = Field(description="the profile that it builds on")
    model_settings: ModelSettings
    generation_settings: GenerationSettings
    reward_settings: RewardSettings
    training_settings: TrainingSettings
    evaluation_settings: EvaluationSettings
    tracking_settings: TrackingSettings

    @model_validator(mode="after")
    def _bounds_agree(self) -> "Config":
        model, generation, training = self.model_settings, self.generation_settings, self.training_settings
        if training.loss_type == "cispo" and (training.epsilon_high or 0.0) < 1:
            found = f"training_settings.epsilon_high: found {training.epsilon_high}"
            raise ValueError(f"{found}, allowed for loss_type 'cispo': number >= 1. Set 5.0, as its authors do")
        if training.lr_scheduler_type == "constant" and (training.warmup_steps or training.warmup_ratio):
            found = "training_settings.lr_scheduler_type: found 'constant' with a warm-up, which it has not"
            raise ValueError(f"{found}; allowed: constant_with_warmup, another one, or no warm-up. Set one of them")
        upper = 1 + (training.epsilon if training.epsilon_high is None else training.epsilon_high)
        if training.delta is not None and training.delta <= upper:
            found = f"training_settings.delta: found {training.delta}"
            raise ValueError(f"{found}, allowed: number > {upper} (1 + epsilon_high). Raise it, or set null")
        if model.base_8bit and model.lora is None:
            found = "model_settings.base_8bit: found true, allowed with lora: weights in 8 bits cannot be trained"
            raise ValueError(f'{found}. Set lora, such as {{"r": 16, "alpha": 32}}, or base_8bit: false')
        if generation.negative_prompt is not None and generation.guidance_scale <= 1:
            found = "generation_settings.negative_prompt: found one, allowed with guidance_scale above 1, since at"
            raise ValueError(f"{found} {generation.guidance_scale:g} nothing is guided. Raise it, or set null")
        if generation.turns > 1 and training.max_resampling:
            found = f"training_settings.max_resampling: found {training.max_resampling}, allowed with several turns: 0"
            raise ValueError(f"{found}. A group is one turn of an episode: it cannot be drawn again alone. Set 0")
        if model.offload_generator and model.text_encoders_on_cpu:
            found = "model_settings.text_encoders_on_cpu: found true, allowed with offload_generator: false"
            raise ValueError(f"{found}. Offloading moves the text encoders, too; set one of the two")
        return self

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from the profile's: dotted key → (here, in the profile)."""
        base = Config.model_validate(profile_settings(self.profile))
        pairs = [(name, key) for name, section in self if name != "profile" for key, _ in section]
        found = {f"{n}.{key}": tuple(getattr(getattr(one, n), key) for one in (self, base)) for n, key in pairs}
        return {key: both for key, both in found.items() if both[0] != both[1]}

    def __repr__(self) -> str:
        changed = {key.split(".", 1)[-1]: own for key, (own, _) in self.changes().items()}
        return line("Config", {"profile": self.profile, **changed})

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = [(key, *values) for key, values in self.changes().items()]
        note = "" if rows else f"as the profile {self.profile}"
        header = ("setting", "here", f"in {self.profile}") if rows else ()
        whole = "".join(section._repr_html_() for name, section in self if name != "profile")
        changed = table(f"Config: {self.profile}", rows, header, note)
        return f"{changed}<details><summary>all settings</summary>{whole}</details>"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, with paths inside the project relative to it, so that they can move."""
        data = self.model_dump(mode="json")
        change_paths(data, inside_project)
        return data
