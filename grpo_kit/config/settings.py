"""What a run is made of: one frozen `Config`, read from a profile, a JSON file or a dict, and checked key by key.

A file may leave out what it takes over: it builds on the profile that its key "profile" names. A file without that key
builds on `classic` when it names a policy or generator of its own (the flat form of VLM-GRPO), else on `tiny`.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from grpo_kit.config.errors import ConfigError, nearest, printable, shown

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PROFILE_FOLDER = Path(__file__).resolve().parent / "profiles"
RECORDS = ("versions", "machine")  # what a run's config.json says of its making; no settings
PROFILES = ("tiny", "workshop", "full", "classic", "gpu_16gb", "gpu_24gb", "gpu_80gb", "apple")
# Settings that hold a path. A model may also be a hub id, so it is a path only where something lies there.
MODEL_PATHS = tuple(("model_settings", name) for name in ("vlm_model", "sd_model", "clip_model", "clip_pretrained"))
PROMPT_PATHS = (("training_settings", "train_prompts"), ("evaluation_settings", "val_prompts"))
REWARD_PATHS = tuple(
    ("reward_settings", "options", reward, option)
    for reward, option in (
        ("style", "reference"),
        ("aesthetic", "weights"),
        ("pickscore", "model"),
        ("pickscore", "processor"),
        ("hps", "model"),
        ("hps", "weights"),
    )
)


def _not_a_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a boolean is no number")
    return value


_NUMERIC = BeforeValidator(_not_a_bool)  # stands last, so that the bounds before it stay visible in the JSON schema
Whole = Annotated[int, _NUMERIC]
Count = Annotated[int, Field(ge=1), _NUMERIC]
Pixels = Annotated[int, Field(ge=8), _NUMERIC]
Number = Annotated[float, _NUMERIC]
Name = Annotated[str, Field(min_length=1)]


def _one_reason(value: object, check: Callable[[object], object]) -> object:
    try:  # pydantic gives a reason for each side of an "or"
        return check(value)
    except ValidationError:
        raise ValueError("integer >= 1 or auto") from None


CountOrAuto = Annotated[Count | Literal["auto"], WrapValidator(_one_reason)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values never change, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class LoraSettings(Section):
    """A low-rank adapter on the policy (peft's `LoraConfig`)."""

    r: Count = Field(16, description="rank of the adapter")
    alpha: Count = Field(32, description="scale of the adapter; its weight is alpha / r")
    dropout: Number = Field(0.0, ge=0, lt=1)
    target_modules: list[Name] | None = Field(
        None, description="layers that get an adapter; null is all linear layers of the language model"
    )


class ModelSettings(Section):
    """Which models, where they run and what the policy is told."""

    vlm_model: Name = Field(description="the policy: hub id or folder of a transformers model")
    sd_model: Name = Field(description="the generator: hub id or folder of a diffusers pipeline")
    clip_model: Name = Field(description="the reward model: hub id, folder or open_clip name")
    clip_pretrained: Name | None = Field(None, description="open_clip's tag of the weights, where clip_model is a name")
    device: Device = Field("auto", description="auto is the best one here")
    generator_device: Device | None = Field(None, description="where pictures are drawn; null is device")
    reward_device: Device | None = Field(None, description="where reward models compute; null is device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lora: LoraSettings | None = Field(None, description="null trains all weights")
    base_8bit: bool = Field(
        False, description="the weights below the adapter in 8 bits; needs lora, and the extra `int8`"
    )
    drop_t5: bool = Field(True, description="leave out SD3's third text encoder")
    t5_8bit: bool = Field(False, description="the generator's T5 keeps its weights in 8 bits; needs the extra `int8`")
    generator_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        None, description="the generator's; null is dtype"
    )
    text_encoders_on_cpu: bool = Field(False, description="the generator's text encoders compute on the CPU")
    offload_generator: bool = Field(
        False, description="of the generator's models only the one that computes is on the accelerator"
    )
    vae_slicing: bool = Field(False, description="decode the images of a batch one after the other")
    vae_tiling: bool = Field(False, description="decode a large image tile by tile")
    attention_slicing: bool = Field(False, description="a U-Net's attention in parts; for where sdpa is not at hand")
    safety_checker: bool = Field(True, description="keep the checker that some generators bring; false draws without")
    system_prompt: str = ""
    instruction: str = Field("Improve: {prompt}", description="what the policy is asked; {prompt} is the user's prompt")
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        default_factory=lambda: {"enable_thinking": False}, description="variables for the policy's chat template"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for more time: layers are computed twice")
    use_image: bool = Field(False, description="the policy sees the picture that the user's own prompt gives")
    trust_remote_code: bool = Field(False, description="run Python code that comes with a hub model")

    @field_validator("instruction")
    @classmethod
    def _names_the_prompt(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("a text that contains {prompt} once")
        return value


class GenerationSettings(Section):
    """How the policy samples text and the generator draws."""

    max_new_tokens: Count = Field(description="the longest rewrite, in tokens")
    temperature: Number = Field(1.0, gt=0, description="of sampling during training")
    decoding: Literal["plain", "static", "compiled"] = Field(
        "plain", description="how the policy samples: a cache that grows, one of fixed size, or that with torch.compile"
    )
    sampling_batch_size: Count | None = Field(
        None, description="completions sampled in one call, by whole groups; null is all"
    )
    num_inference_steps: Count
    guidance_scale: Number = Field(ge=0)
    height: Pixels | None = Field(None, description="pixels; null is the generator's own size")
    width: Pixels | None = Field(None, description="pixels; null is the generator's own size")
    images_per_prompt: Count = 1
    share_seeds: bool = Field(True, description="the rewrites of one prompt are drawn from the same latents")
    max_sequence_length: Annotated[int, Field(ge=0), _NUMERIC] | None = Field(
        None, description="T5 tokens; null is the pipeline's default"
    )
    image_batch_size: CountOrAuto = Field(
        16, description="images in one call of the pipeline; auto measures how many fit"
    )
    image_memory_gb: Annotated[float, Field(gt=0), _NUMERIC] | None = Field(
        None, description="memory that image_batch_size auto may use; null is what is free"
    )
    scheduler: Name | None = Field(
        None, description='another diffusers scheduler, such as "EulerDiscreteScheduler"; null is the generator\'s own'
    )


class ShapingSettings(Section):
    """How one reward is changed before it is weighted: clipped, then scaled, then normalised."""

    normalize: Literal["none", "running", "group"] = Field(
        "none", description="in units of its deviation, over all that was seen so far, or within each group"
    )
    clip: tuple[Number, Number] | None = Field(None, description="lowest and highest value; null is no bound")
    scale: Number = Field(1.0, description="factor; without effect where the reward is normalised")

    @field_validator("clip", mode="before")
    @classmethod
    def _is_a_pair(cls, value: object) -> object:
        if value is not None and not (isinstance(value, list | tuple) and len(value) == 2):
            raise ValueError("[low, high] with low < high, or null")
        return value

    @field_validator("clip")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError("[low, high] with low < high, or null")
        return value


class RewardSettings(Section):
    """What is rewarded, and what is only watched."""

    weights: dict[Name, Number] = Field(min_length=1, description="weight of each reward in the total")
    monitors: list[Name] = Field(default_factory=list, description="scored and logged, never rewarded")
    options: dict[Name, dict[Name, Any]] = Field(
        default_factory=dict, description='arguments of a reward: {"safety": {"avoid": ["blood"], "threshold": 0.25}}'
    )
    shaping: dict[Name, ShapingSettings] = Field(
        default_factory=dict, description="how a reward is changed before it is weighted; raw values are what is logged"
    )
    combine: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize", description="normalise the weighted sum, or every reward within its group first (GDPO)"
    )
    threads: dict[Name, Count] = Field(
        default_factory=dict, description="threads among which a slow reward's batch is split; it must be thread-safe"
    )
    timeout: dict[Name, Annotated[float, Field(gt=0), _NUMERIC]] = Field(
        default_factory=dict, description="seconds that a call of a reward may take; then on_bad_reward decides"
    )
    overlap: bool | None = Field(
        None,
        description="score pictures while the next are drawn; null: where generator and rewards have different devices",
    )

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
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
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

    train_prompts: Name = Field(description="JSONL file with the prompts to train on")
    learning_rate: Number = Field(ge=0, le=1)
    group_size: Whole = Field(ge=2, description="rewrites per prompt, which are compared with each other")
    num_iterations: Count = Field(description="iterations of rollout and update")
    prompts_per_iteration: Count
    updates_per_rollout: Count = Field(1, description="optimizer steps on one rollout")
    beta: Number = Field(0.0, ge=0, description="weight of the KL term; 0 needs no reference")
    epsilon: Number = Field(0.2, gt=0, lt=1)
    epsilon_high: Annotated[float, Field(gt=0), _NUMERIC] | None = Field(None, description="null is epsilon")
    delta: Annotated[float, Field(gt=1), _NUMERIC] | None = Field(
        None, description="upper bound of the ratio where the advantage is negative"
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    use_bias_correction_kl: bool = Field(
        False, description="weigh the KL estimate by the ratio; needed for an unbiased one after the first inner update"
    )
    scale_rewards: Literal["group", "batch", "none"] = "group"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    advantage_eps: Number = Field(1e-4, gt=0)
    reward_noise_floor: Number = Field(0.0, ge=0, description="a group whose rewards differ by no more teaches nothing")
    on_bad_reward: Literal["raise", "drop_sample", "drop_group"] = Field(
        "drop_sample", description="what a reward that fails, or is not finite, leads to"
    )
    max_grad_norm: Number = Field(1.0, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    micro_batch_size: Count | None = Field(None, description="samples in one backward pass; null is all")
    seed: Whole = Field(0, ge=0, lt=2**63)
    validate_every: Count = Field(20, description="iterations between validations")
    save_every: Count = Field(20, description="iterations between checkpoints")
    keep_checkpoints: Whole = Field(2, ge=2, description="checkpoints kept; the older one serves when one is damaged")
    stop_on_divergence: bool = Field(False, description="end a run whose reward rises while the held-out score falls")


class EvaluationSettings(Section):
    """The paired comparison on held-out prompts."""

    val_prompts: Name = Field(description="JSONL file with the held-out prompts")
    num_prompts: Annotated[int, Field(ge=2), _NUMERIC] | None = Field(None, description="how many of them; null is all")
    seeds_per_prompt: Count = Field(4, description="latents per prompt, the same for every variant")
    confidence: Number = Field(0.95, gt=0, lt=1)
    n_resamples: Whole = Field(2000, ge=100, description="bootstrap resamples")
    validation_prompts: Count = Field(32, description="prompts of the periodic validation")
    gold: Literal["shapeworld"] | None = Field(None, description="the check by a program, where the world has one")
    paraphrases: bool = Field(True, description="ask the held-out prompts in other words too, where they have any")
    held_out: Name | None = Field(
        None, description="the monitor that best/ is chosen and divergence judged by; null is gold where it is scored"
    )


class TrackingSettings(Section):
    """Where a run is reported besides its folder."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    tensorboard: bool = False  # needs the optional extra `tensorboard`
    project: Name = "grpo_kit"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class Config(Section):
    """All settings of a run. Paths are absolute, hub ids are left as they are."""

    profile: Literal["tiny", "workshop", "full", "classic", "gpu_16gb", "gpu_24gb", "gpu_80gb", "apple"] = Field(
        description="the profile that it builds on"
    )
    model_settings: ModelSettings
    generation_settings: GenerationSettings
    reward_settings: RewardSettings
    training_settings: TrainingSettings
    evaluation_settings: EvaluationSettings
    tracking_settings: TrackingSettings

    @model_validator(mode="after")
    def _bounds_agree(self) -> "Config":
        training = self.training_settings
        if training.loss_type == "cispo" and (training.epsilon_high or 0.0) < 1:
            raise ValueError(
                f"training_settings.epsilon_high: found {training.epsilon_high}, allowed for loss_type 'cispo': "
                "number >= 1 (it caps the ratio itself). Set 5.0, as its authors do"
            )
        upper = 1 + (training.epsilon if training.epsilon_high is None else training.epsilon_high)
        if training.delta is not None and training.delta <= upper:
            raise ValueError(
                f"training_settings.delta: found {training.delta}, allowed: number > {upper} (1 + epsilon_high). "
                "Raise it, or set null for no bound"
            )
        if self.model_settings.base_8bit and self.model_settings.lora is None:
            raise ValueError(
                "model_settings.base_8bit: found true, allowed with lora: weights in 8 bits cannot be trained. Set "
                'lora, such as {"r": 16, "alpha": 32}, or base_8bit: false'
            )
        if self.model_settings.offload_generator and self.model_settings.text_encoders_on_cpu:
            raise ValueError(
                "model_settings.text_encoders_on_cpu: found true, allowed with offload_generator: false. Offloading "
                "moves the text encoders in turn, too; set one of the two"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, with paths inside the project relative to it, so that they can move."""
        data = self.model_dump(mode="json")
        for keys in MODEL_PATHS + PROMPT_PATHS + REWARD_PATHS:
            _change_at(data, keys, _inside_project)
        return data

    def save(self, path: str | Path, **records: Mapping[str, str]) -> Path:
        """Write the settings as JSON that `load_config` reads.

        Args:
            records: `versions` of the libraries and the `machine` that computes, kept beside the settings.
        """
        data = self.to_dict() | {name: dict(record) for name, record in records.items()}
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path


def load_config(
    name_or_path: str | Path | Mapping[str, Any] | Config = "tiny", overrides: Mapping[str, object] | None = None
) -> Config:
    """Read a configuration and check every key.

    Args:
        name_or_path: a profile (`tiny`, `workshop`, `full`, `classic`, `gpu_16gb`, …), a JSON file, a run folder (its
            config.json), a dict of the same shape, or a `Config`.
        overrides: dotted keys, such as `{"training_settings.group_size": 8}`; values may be given as text ("1e-6").

    Relative paths count from the file's folder, then from the project's; in a profile, a dict or an override from the
    project's. Raises `ConfigError`, one line that names the key, the value found and what is allowed.
    """
    source = ""
    if isinstance(name_or_path, Config):
        data = name_or_path.model_dump()
    elif isinstance(name_or_path, Mapping):
        data = _complete(name_or_path, [PROJECT_ROOT])
    elif str(name_or_path) in PROFILES:
        data = _profile(str(name_or_path))
    else:
        path = _config_file(name_or_path)
        source = f" (in {path})"
        data = _complete(_read_json(path), [path.parent.resolve(), PROJECT_ROOT], source)
    for key, value in (overrides or {}).items():
        _override(data, key, value)
    _resolve_paths(data, [PROJECT_ROOT])
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_one_line(error, source)) from None


def _config_file(name_or_path: str | Path) -> Path:
    try:
        path = Path(name_or_path).expanduser()
        path = path / "config.json" if path.is_dir() else path
        found = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, no home folder
        found = False
    if not found:
        allowed = ", ".join(PROFILES)
        raise ConfigError(
            f"configuration {shown(str(name_or_path))}: neither a profile nor a file"
            f"{nearest(str(name_or_path), PROFILES)}; allowed: {allowed}, or the path of a JSON file or run folder"
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a configuration") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a key that stands twice, an integer of thousands of digits
        raise ConfigError(f"{path}: {printable(str(error))}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {_kind(data)}, allowed: a JSON object with the sections of a profile")
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"the key {shown(twice)} stands twice. Keep one of them")
    return dict(pairs)


@functools.cache
def _profile_text(name: str) -> str:
    return (PROFILE_FOLDER / f"{name}.json").read_text(encoding="utf-8")


def _profile(name: str) -> dict[str, Any]:
    data = json.loads(_profile_text(name))
    _resolve_paths(data, [PROJECT_ROOT])
    if "profile" in data:
        data = _merged(_profile(data["profile"]), data)
    return data | {"profile": name}


def _complete(data: Mapping[str, Any], bases: list[Path], source: str = "") -> dict[str, Any]:
    """Fill what a user's settings leave out from the profile that they build on; their paths count from `bases`."""
    data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    for record in RECORDS:
        data.pop(record, None)
    name = data.get("profile")
    if name is None:
        models = data.get("model_settings")
        names_models = isinstance(models, dict) and not {"vlm_model", "sd_model"}.isdisjoint(models)
        name = "classic" if names_models else "tiny"
    if name not in PROFILES:
        hint = nearest(str(name), PROFILES)
        raise ConfigError(f"profile: found {shown(name)}{hint}; allowed: {', '.join(PROFILES)}{source}")
    _resolve_paths(data, bases)
    return _merged(_profile(name), data) | {"profile": name}


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; a value inside a section, a dict too, replaces the one below it."""
    result = dict(base)
    for key, value in changes.items():
        below = base.get(key)
        result[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _resolve_paths(data: dict[str, Any], bases: list[Path]) -> None:
    for keys in MODEL_PATHS + PROMPT_PATHS + REWARD_PATHS:
        resolved = functools.partial(_resolved, key=".".join(keys), bases=bases, is_path=keys in PROMPT_PATHS)
        _change_at(data, keys, resolved)


def _change_at(data: dict[str, Any], keys: tuple[str, ...], change: Callable[[str], str]) -> None:
    """Change the text under the nested keys, if one is there; the dicts on the way are copied, not changed."""
    value = data.get(keys[0])
    if len(keys) == 1:
        if isinstance(value, str) and value:
            data[keys[0]] = change(value)
    elif isinstance(value, dict):
        data[keys[0]] = dict(value)
        _change_at(data[keys[0]], keys[1:], change)


def _inside_project(value: str) -> str:
    path = Path(value)
    return path.relative_to(PROJECT_ROOT).as_posix() if path.is_relative_to(PROJECT_ROOT) else value


def _resolved(value: str, key: str, bases: list[Path], is_path: bool) -> str:
    """The absolute path of `value` under the first base where it exists; else a hub id unless it looks like a path."""
    if "\0" in value:
        raise ConfigError(f"{key}: found {shown(value)}, allowed: text without NUL characters")
    try:
        path = Path(value).expanduser()
        candidates = [Path(os.path.normpath(base / path)) for base in bases]
        found = next((str(candidate) for candidate in candidates if candidate.exists()), None)
    except (OSError, RuntimeError):  # a name that is too long for the file system, no home folder
        return value
    if found is None and value.startswith("data/"):
        found = str(candidates[-1])  # the project's own folder
    if found is None and (is_path or path.is_absolute() or value.startswith((".", "~"))):
        found = str(candidates[0])
    return found or value


def _override(data: dict[str, Any], key: str, value: object) -> None:
    """Set one dotted key; the checks of `Config` say whether key and value are allowed."""
    parts = key.split(".")
    if len(parts) == 1 and key in TrainingSettings.model_fields:
        raise ConfigError(f"{key}: no section named. Write training_settings.{key}")
    section = data
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        if not isinstance(section[part], dict):
            raise ConfigError(f"{shown(key)}: {shown(part)} is a single value. Set it without a further dot")
        section[part] = dict(section[part])
        section = section[part]
    section[parts[-1]] = _value(key, value) if isinstance(value, str) else value


def _value(key: str, text: str) -> object:
    """Read an override given as text: JSON where the setting takes other things than text, else the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    kinds = {kind for kind in _schema_at(key).get("kinds", ())}
    if "string" in kinds and (value is not None or "null" not in kinds):
        return value if isinstance(value, list) and "array" in kinds else text
    return value


# -- errors in one line ------------------------------------------------------------------------------------------------


def _one_line(error: ValidationError, source: str) -> str:
    problems = error.errors(include_url=False, include_context=False)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return printable(_problem(problems[0])) + more + source


def validated(model: type[Section], values: Mapping[str, Any], place: str) -> Section:
    """Settings of a model of their own that stand at a dotted place, such as a reward's options, as that model.

    Raises `ConfigError`, one line that names the key, the value found and what is allowed.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        problem = min(problems, key=lambda one: one["type"] != "extra_forbidden")  # a misspelt key is missing, too
        raise ConfigError(printable(f"{place}.{_problem(problem, model.model_json_schema())}")) from None


def _problem(problem: Mapping[str, Any], root: dict[str, Any] | None = None) -> str:
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    key = ".".join(location)
    if not location and problem["type"] == "string_unicode":  # pydantic names no place where the key is what is wrong
        return f"key {shown(problem['input'])}: allowed: text of whole characters (no lone surrogates)"
    if not location:  # from _bounds_agree, which wrote the whole line
        return problem["msg"].removeprefix("Value error, ")
    schema = _schema_at(key, root)
    what = f" ({schema['description']})" if "description" in schema and "properties" not in schema else ""
    if problem["type"] == "extra_forbidden":
        known = sorted(_schema_at(".".join(location[:-1]), root).get("properties", {}))
        hint = nearest(location[-1], known)
        return f"{_shown_key(key) or repr(key)}: unknown key{hint}; allowed: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key}: missing, allowed: {schema.get('allowed', 'a value')}{what}"
    allowed = schema.get("allowed", "another value")
    if problem["type"] == "value_error" and "boolean" not in problem["msg"]:
        allowed = problem["msg"].removeprefix("Value error, ")
    return f"{_shown_key(key)}: found {shown(problem['input'])}, allowed: {allowed}{what}"


@functools.cache
def _json_schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _schema_at(key: str, root: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the settings under a dotted key may be: their JSON schema, with `kinds` and `allowed` in words added.

    `root` is the schema to look in; None is that of `Config`.
    """
    root = root or _json_schema()
    node = root
    for part in filter(None, key.split(".")):
        node = _followed(node, root)
        child = node.get("properties", {}).get(part, node.get("additionalProperties", node.get("items")))
        if not isinstance(child, dict):
            break
        node = child
    options = [_followed(option, root) for option in node.get("anyOf", [node])]
    inner = next((option for option in options if "properties" in option), options[0])
    kinds = [kind for option in options for kind in _kinds(option)]
    return {**inner, **node, "kinds": kinds, "allowed": " or ".join(_in_words(option) for option in options)}


def _followed(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    for option in node.get("anyOf", [node]):
        if "$ref" in option:
            return root["$defs"][option["$ref"].rsplit("/", 1)[-1]]
        if "items" in option:
            return option
    return node


def _kinds(option: dict[str, Any]) -> list[str]:
    if "enum" in option or isinstance(option.get("const"), str):
        return ["string"]
    return [option.get("type", "any")]


def _in_words(option: dict[str, Any]) -> str:
    if "enum" in option:
        return ", ".join(map(str, option["enum"]))
    if "const" in option:
        return str(option["const"])
    if "pattern" in option:
        return option["pattern"].strip("^()$").replace("|", ", ").replace(r"(:\d+)?", " or cuda:N")
    words = {"string": "text", "boolean": "true or false", "array": "a list", "object": "a JSON object"}
    kind = option.get("type", "a value")
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {option[name]:g}" for name, sign in bounds.items() if name in option]
    if option.get("minLength") or option.get("minProperties"):
        limits.append("not empty")
    return f"{words.get(kind, kind)} {' and '.join(limits)}".strip().replace("text not empty", "a text, not empty")


def _kind(value: object) -> str:
    names = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _shown_key(key: str) -> str:
    return printable(key if len(key) <= 100 else f"{key[:97]}...")
