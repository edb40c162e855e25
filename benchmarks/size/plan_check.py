"""`python -m benchmarks.size.plan_check`: the planner's figures beside measured ones: six configurations, CPU.

Each configuration has a policy, a generator and a CLIP of the forms that the kit trains, with random weights and sizes
at which memory can be measured. It is planned in one fresh process, and two iterations are run in another, by each of
three heaps: the C library's own, tcmalloc and jemalloc, which lose less memory between blocks. Memory is what the
process grew by above its libraries; seconds are processor seconds of the second iteration, with one thread.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

import torch
import typer
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPTextConfig, CLIPTextModel

from benchmarks.speed.measure import in_fresh_process, peak_growth_mb
from grpo_kit.config import PROJECT_ROOT, load_config

WORLD = PROJECT_ROOT / "data" / "shapeworld"
HEAPS = {"own heap": None, "tcmalloc": "tcmalloc_minimal", "jemalloc": "jemalloc"}  # what has to be preloaded
ITERATIONS = 2  # the optimizer's moments are there from the second on


@dataclass(frozen=True)
class Case:
    """Sizes of the models, and settings."""

    policy: Mapping[str, int]
    generator: str
    settings: Mapping[str, Any] = field(default_factory=dict)


SMALL = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 2048, "vocab_size": 16384}
LARGE = {"hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 2560, "vocab_size": 32768}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
COMMON = {
    "model_settings.device": "cpu",
    "model_settings.dtype": "float32",
    "reward_settings.weights": {"clip_similarity": 1.0},
    "reward_settings.monitors": [],
    "generation_settings.max_new_tokens": 48,
    "generation_settings.num_inference_steps": 2,
    "generation_settings.share_seeds": False,  # rewrites without words would else be drawn once for all
    "training_settings.prompts_per_iteration": 2,
    "training_settings.updates_per_rollout": 1,
}
CASES = {
    "all weights, group of 4": Case(SMALL, "sd3", {"training_settings.group_size": 4}),
    "LoRA, group of 16": Case(
        LARGE, "sd3", {"training_settings.group_size": 16, "model_settings.lora": {"r": 16, "alpha": 32}}
    ),
    "LoRA, micro-batches, checkpointing": Case(
        LARGE,
        "sd3",
        {
            "training_settings.group_size": 8,
            "training_settings.micro_batch_size": 4,
            "model_settings.lora": {"r": 16, "alpha": 32},
            "model_settings.gradient_checkpointing": True,
        },
    ),
    "all weights, two updates, micro-batches": Case(
        LARGE,
        "sd3",
        {
            "training_settings.group_size": 4,
            "training_settings.micro_batch_size": 4,
            "training_settings.updates_per_rollout": 2,
        },
    ),
    "pictures of 256, guided": Case(
        SMALL,
        "sd3",
        {
            "training_settings.group_size": 4,
            "generation_settings.height": 256,
            "generation_settings.width": 256,
            "generation_settings.guidance_scale": 5.0,
            "generation_settings.num_inference_steps": 4,
        },
    ),
    "Stable Diffusion 1's form, 192": Case(
        SMALL,
        "sd1",
        {
            "training_settings.group_size": 4,
            "generation_settings.height": 192,
            "generation_settings.width": 192,
            "generation_settings.guidance_scale": 5.0,
            "generation_settings.image_batch_size": 4,
            "model_settings.lora": {"r": 8, "alpha": 16},
        },
    ),
}


# --- the models -------------------------------------------------------------------------------------------------------


def build_policy(folder: Path, sizes: Mapping[str, int]) -> None:
    """A policy of the shipped one's form, larger, with random weights and the same processor."""
    config = AutoConfig.from_pretrained(WORLD / "policy")
    for name, value in {**sizes, **_HEADS}.items():
        setattr(config.text_config, name, value)
    text = config.text_config
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.vision_config.out_hidden_size = text.hidden_size
    share = text.hidden_size // text.num_attention_heads // 2
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [share - 2 * (share // 3), share // 3, share // 3]}
    shutil.copytree(WORLD / "policy", folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)


def _vae(latent: int) -> AutoencoderKL:
    """A decoder that makes 8 pixels of each latent one, as Stable Diffusion's do."""
    return AutoencoderKL(
        block_out_channels=(64, 128, 256, 256),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent,
        sample_size=128,
        shift_factor=0.05,
    )


def build_sd3(folder: Path) -> None:
    """The shipped pipeline with a larger transformer and decoder; pictures of 128 pixels."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(WORLD / "generator")
    old = pipeline.transformer.config
    pipeline.register_modules(
        vae=_vae(16),
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=16,
            out_channels=16,
            num_layers=12,
            attention_head_dim=64,
            num_attention_heads=8,
            caption_projection_dim=512,
            joint_attention_dim=old.joint_attention_dim,
            pooled_projection_dim=old.pooled_projection_dim,
            pos_embed_max_size=32,
        ),
    )
    pipeline.save_pretrained(folder)


def build_sd1(folder: Path) -> None:
    """Stable Diffusion 1's form: a UNet that looks at one text encoder."""
    torch.manual_seed(0)
    world = DiffusionPipeline.from_pretrained(WORLD / "generator")
    text = world.text_encoder.config.to_dict() | {"hidden_size": 256, "intermediate_size": 1024}
    StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=world.tokenizer,
        unet=UNet2DConditionModel(
            sample_size=24,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            cross_attention_dim=256,
            attention_head_dim=8,
        ),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _scheduler() -> object:
    from diffusers import PNDMScheduler

    return PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)


def build(case: Case, folder: Path) -> dict[str, Any]:
    """Write a case's models; returns its settings."""
    build_policy(folder / "policy", case.policy)
    {"sd3": build_sd3, "sd1": build_sd1}[case.generator](folder / "generator")
    models = {"vlm_model": str(folder / "policy"), "sd_model": str(folder / "generator")}
    sizes = {"generation_settings.height": None, "generation_settings.width": None}
    return COMMON | sizes | {f"model_settings.{name}": path for name, path in models.items()} | dict(case.settings)


# --- what is predicted, and what is measured --------------------------------------------------------------------------


def predicted(settings: Mapping[str, Any]) -> dict[str, float]:
    """MB, seconds and parameters by the planner, with a calibration of its own."""
    from grpo_kit.preflight.plan import plan
    from grpo_kit.preflight.plan.speed import calibrate

    started = time.perf_counter()
    torch.set_num_threads(1)
    config = load_config("tiny", settings)
    found = plan(config, speed=calibrate("cpu", config.model_settings.dtype, clock=time.process_time))
    phases = {f"{part.name}: {phase.name}": phase for part in found.parts for phase in part.phases}
    return {
        "mb": found.peak / 1e6,
        "seconds": found.seconds,
        "parameters": sum(part.parameters for part in found.parts),
        "planning": time.perf_counter() - started,
        "largest": found.largest[1].name,
        "phases": {name: [phase.cost.peak / 1e6, found.speed.seconds(phase.cost)] for name, phase in phases.items()},
        "resident": {part.name: part.resident / 1e6 for part in found.parts},
    }


def measured(settings: Mapping[str, Any]) -> dict[str, float]:
    """MB and processor seconds of real iterations; the libraries are there before."""
    import grpo_kit as gk
    from grpo_kit.training.iteration import run_iteration
    from grpo_kit.training.loop import make_optimizer

    torch.set_num_threads(1)
    _touch_libraries()
    found: dict[str, float] = {}

    def work() -> None:
        config = load_config("tiny", settings)
        kit = gk.load_experiment(config)
        optimizer = make_optimizer(kit, config)
        for iteration in range(1, ITERATIONS + 1):
            started = time.process_time()
            rollout, stats = run_iteration(kit, optimizer, iteration)
            found["seconds"] = time.process_time() - started
        found["updates"] = stats.updates
        found["tokens"] = float(rollout.completion_mask.float().sum(dim=1).mean())
        found["parts"] = rollout.seconds | {key: value for key, value in stats.metrics.items() if "time/" in key}

    found["mb"] = peak_growth_mb(work)
    return found


def _touch_libraries() -> None:
    """One iteration of the shipped models, so that what growing is measured from has every library in it."""
    import grpo_kit as gk
    from grpo_kit.training.iteration import run_iteration
    from grpo_kit.training.loop import make_optimizer

    config = load_config("tiny", {k: v for k, v in COMMON.items()} | {"training_settings.group_size": 2})
    kit = gk.load_experiment(config)
    run_iteration(kit, make_optimizer(kit, config), 1)


def check(name: str) -> dict[str, Any]:
    """Plan one case and measure it by every heap."""
    with tempfile.TemporaryDirectory() as folder:
        settings = in_fresh_process(build, CASES[name], Path(folder))
        plan = in_fresh_process(predicted, settings)
        found = {}
        for heap, library in HEAPS.items():
            with _preloaded(library):
                found[heap] = in_fresh_process(measured, settings)
    errors = {heap: {what: plan[what] / truth[what] - 1 for what in ("mb", "seconds")} for heap, truth in found.items()}
    return {"case": name, "predicted": plan, "error": errors} | found


@contextmanager
def _preloaded(library: str | None) -> Iterator[None]:
    """Processes started meanwhile take their memory by this library's `malloc`."""
    if library is None:
        yield
        return
    before = os.environ.pop("LD_PRELOAD", None)
    os.environ["LD_PRELOAD"] = find_library(library)
    try:
        yield
    finally:
        del os.environ["LD_PRELOAD"]
        if before is not None:
            os.environ["LD_PRELOAD"] = before


def main(
    only: Annotated[list[int] | None, typer.Argument(help="numbers of the cases, from 1; all of them")] = None,
    out: Annotated[Path | None, typer.Option(help="a JSON file for everything that was found")] = None,
) -> None:
    """Print predicted, measured and error of each case."""
    if missing := [name for name in HEAPS.values() if name and find_library(name) is None]:
        found = " and ".join(missing)
        raise typer.BadParameter(
            f"{found}: not installed; on Debian: apt-get install libtcmalloc-minimal4 libjemalloc2"
        )
    records = []
    typer.echo(f"{'':40} {'planned':>18}" + "".join(f"{heap:>28}" for heap in HEAPS))
    for number, name in enumerate(CASES, start=1):
        if only and number not in only:
            continue
        records.append(record := check(name))
        typer.echo(_row(record))
        if out is not None:
            out.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    for heap in HEAPS:
        for what, most in (("mb", 0.15), ("seconds", 0.3)):
            within = sum(abs(record["error"][heap][what]) <= most for record in records)
            typer.echo(f"{heap}, {what}: within {most:.0%} in {within} of {len(records)}")


def _row(record: Mapping[str, Any]) -> str:
    plan = record["predicted"]
    found = "".join(
        f"{record[heap]['mb']:>9.0f} MB {record['error'][heap]['mb']:>+4.0%}"
        f"{record[heap]['seconds']:>8.2f} s {record['error'][heap]['seconds']:>+4.0%}"
        for heap in HEAPS
    )
    return f"{record['case']:40} {plan['mb']:>7.0f} MB {plan['seconds']:>6.2f} s{found}"


if __name__ == "__main__":
    typer.run(main)
