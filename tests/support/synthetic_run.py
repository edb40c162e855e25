"""Write a run folder in the documented schema without training anything, for tests of what a person looks at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

PROMPTS = [
    ("a crimson ball", "dialect", "easy"),
    ("two azure squares", "count", "medium"),
    ("a tiny star at the top", "place", "hard"),
    ("a green ring and a red cross", "two-objects", "hard"),
    ("a big triangle", "size", "easy"),
    ("a violet circle on grey", "single", "medium"),
]
VARIANTS = {"raw": 0.50, "initial": 0.53, "trained": 0.68, "oracle": 0.72}
TEXTS = {"initial": "{} , drawn , faded", "trained": "a sharp picture of {}", "oracle": "sharp , {} , white background"}


def write_synthetic_run(run: Path, iterations: int = 24, seeds: int = 2, prompts: list[tuple] = PROMPTS) -> Path:
    """Write config, metrics, validations, rollouts, evaluation and final results under `run`; deterministic."""
    rng = np.random.default_rng(0)
    (run / "thumbnails").mkdir(parents=True, exist_ok=True)
    config = {
        "profile": "tiny",
        "model_settings": {"vlm_model": "policy", "sd_model": "generator", "clip_model": "clip"},
        "reward_settings": {"weights": {"clip_similarity": 1.0}, "monitors": ["gold", "keeps_objects", "grammatical"]},
        "training_settings": {"group_size": 4, "prompts_per_iteration": 3, "num_iterations": iterations},
    }
    (run / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(metrics_line(i, iterations, rng)) for i in range(1, iterations + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for iteration in range(0, iterations + 1, 8):
        write_validation(run, iteration, iterations, prompts)
    for iteration in (1, iterations):
        write_rollout(run, iteration, iterations, prompts[:3], rng)
    rows = write_evaluation(run, prompts, seeds, rng)
    (run / "final_results.json").write_text(json.dumps(final_results(rows, seeds)))
    return run


def metrics_line(iteration: int, iterations: int, rng: np.random.Generator) -> dict:
    """Return one training line with every documented key."""
    progress = 1 - np.exp(-3 * iteration / iterations)
    noise = rng.normal(0, 0.02, 8)
    line = {
        "iteration": iteration,
        "loss": noise[0] * 1e-3,
        "reward": 0.53 + 0.15 * progress + noise[1],
        "reward_std": 0.1 - 0.05 * progress + abs(noise[2]),
        "frac_reward_zero_std": 0.0,
        "rewards/gold/mean": 0.5 + 0.25 * progress + 2 * noise[3],
        "rewards/keeps_objects/mean": 0.85 + 0.1 * progress + noise[4],
        "rewards/grammatical/mean": 0.97,
        "kl": 0.08 * progress + 0.1 * abs(noise[5]),
        "entropy": 1.2 - 0.5 * progress,
        "completions/mean_length": 11 + 2 * progress + 10 * noise[6],
        "completions/clipped_ratio": 0.0,
        "grad_norm": 0.5 + noise[7],
        "learning_rate": 2e-4,
    }
    line["rewards/clip_similarity/mean"] = line["reward"]
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        line[name] = 0.01
    times = {"sampling": 0.1, "images": 0.8, "rewards": 0.05, "scoring": 0.06, "backward": 0.15, "rest": 0.02}
    return line | {f"time/{name}": seconds for name, seconds in times.items()} | {"step_time": sum(times.values())}


def write_validation(run: Path, iteration: int, iterations: int, prompts: list[tuple]) -> None:
    """Write one periodic validation with its samples."""
    reward = 0.53 + 0.15 * (1 - np.exp(-3 * iteration / iterations))
    samples = [
        {
            "user_prompt": text,
            "category": category,
            "difficulty": difficulty,
            "enhanced_prompt": f"a sharp picture of {text}",
            "reward": reward,
            "rewards": {"clip_similarity": reward, "gold": 0.7},
            "thumbnail": draw_thumbnail(run, f"val_{iteration}_{i}", i, reward),
        }
        for i, (text, category, difficulty) in enumerate(prompts)
    ]
    means = {"clip_similarity": reward, "gold": reward + 0.05, "keeps_objects": 0.9}
    body = {"iteration": iteration, "reward": reward, "rewards": means, "num_prompts": len(samples), "samples": samples}
    (run / f"validation_iter_{iteration:06d}.json").write_text(json.dumps(body))


def write_rollout(run: Path, iteration: int, iterations: int, prompts: list[tuple], rng: np.random.Generator) -> None:
    """Write the rollout of one iteration: 4 samples a prompt."""
    rows = []
    for group, (text, category, difficulty) in enumerate(prompts):
        rewards = rng.uniform(0.35, 0.75, 4)
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for sample in range(4):
            rows.append(
                {
                    "iteration": iteration,
                    "group_id": group,
                    "sample": sample,
                    "user_prompt": text,
                    "category": category,
                    "difficulty": difficulty,
                    "enhanced_prompt": f"rewrite {sample} of {text}",
                    "image_seed": 7 + group,
                    "reward": rewards[sample],
                    "advantage": advantages[sample],
                    "reward/clip_similarity": rewards[sample],
                    "reward/gold": float(rewards[sample] > 0.5),
                    "thumbnail": draw_thumbnail(run, f"it{iteration}_{group}_{sample}", group, rewards[sample]),
                    "completion_ids": [1, 2, 3],
                    "tokens": ["a ", "star", "<end>"],
                    "old_logprobs": [-0.1, -0.2, -0.3],
                    "ref_logprobs": [-0.1, -0.4, -0.3],
                    "new_logprobs": [-0.1, -0.2 + 0.1 * advantages[sample], -0.3],
                }
            )
    (run / "rollouts").mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(run / "rollouts" / f"iter_{iteration:06d}.parquet")


def write_evaluation(run: Path, prompts: list[tuple], seeds: int, rng: np.random.Generator) -> pd.DataFrame:
    """Write evaluation/rows.parquet, a row (prompt, variant, seed), and return it."""
    rows = []
    for prompt_id, (text, category, difficulty) in enumerate(prompts):
        level = rng.normal(0, 0.04)
        for variant, mean in VARIANTS.items():
            for seed in range(seeds):
                reward = mean + level + rng.normal(0, 0.02)
                rows.append(
                    {
                        "prompt_id": prompt_id,
                        "user_prompt": text,
                        "category": category,
                        "difficulty": difficulty,
                        "variant": variant,
                        "seed": seed,
                        "text": TEXTS.get(variant, "{}").format(text),
                        "reward": reward,
                        "gold": float(np.clip(reward + 0.1, 0, 1)),
                        "reward/clip_similarity": reward,
                        "thumbnail": draw_thumbnail(run, f"eval_{prompt_id}_{variant}_{seed}", prompt_id, reward),
                    }
                )
    frame = pd.DataFrame(rows)
    (run / "evaluation").mkdir(exist_ok=True)
    frame.to_parquet(run / "evaluation" / "rows.parquet")
    return frame


def final_results(rows: pd.DataFrame, seeds: int) -> dict:
    """Summarise the rows as evaluate does (the interval here is mean ± 2 standard errors: enough to be drawn)."""
    means = rows.groupby(["prompt_id", "variant"])[["reward", "gold"]].mean().unstack("variant")

    def interval(values: pd.Series) -> dict[str, float]:
        half = 2 * values.std() / len(values) ** 0.5
        return {"mean": values.mean(), "low": values.mean() - half, "high": values.mean() + half}

    def difference(pair: str) -> dict:
        first, second = pair.split("-")
        return {m: interval(means[m][first] - means[m][second]) for m in ("reward", "gold")}

    pairs = ("trained-raw", "trained-initial", "oracle-raw")
    differences = {pair: difference(pair) for pair in pairs}
    categories = rows.groupby(["category", "variant"])[["reward", "gold"]].mean()
    variants = {v: {m: interval(means[m][v]) for m in ("reward", "gold")} for v in VARIANTS}
    for number, values in enumerate(variants.values()):  # a check of the texts
        values["keeps_objects"] = {"mean": 0.8 + number / 20, "low": 0.75 + number / 20, "high": 0.85 + number / 20}
    return {
        "num_prompts": int(rows["prompt_id"].nunique()),
        "seeds_per_prompt": seeds,
        "confidence": 0.95,
        "variants": variants,
        "differences": differences,
        "by_category": {
            c: {v: categories.loc[(c, v)].to_dict() for v in VARIANTS} for c in sorted(rows["category"].unique())
        },
        "success_rate": {m: float((means[m]["trained"] > means[m]["raw"]).mean()) for m in ("reward", "gold")},
        "gap_closed": {
            m: differences["trained-raw"][m]["mean"] / differences["oracle-raw"][m]["mean"] for m in ("reward", "gold")
        },
        "minutes": {"train": 1.2, "evaluate": 0.4},
    }


def draw_thumbnail(run: Path, name: str, kind: int, clarity: float) -> str:
    """Draw a small picture, duller the lower `clarity`, and return its path relative to the run."""
    colours = [(220, 20, 60), (0, 127, 255), (250, 200, 0), (0, 158, 115), (200, 80, 0), (120, 60, 180)]
    strength = float(np.clip((clarity - 0.3) * 2.5, 0.15, 1))
    colour = tuple(int(255 - strength * (255 - channel)) for channel in colours[kind % 6])
    image = Image.new("RGB", (48, 48), "white")
    box = (10, 10, 38, 38)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if kind % 2 == 0 else draw.rectangle)(box, fill=colour)
    path = Path("thumbnails") / f"{name}.jpg"
    image.save(run / path, quality=90)
    return path.as_posix()
