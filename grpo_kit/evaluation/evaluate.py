"""Does the trained policy help? A paired comparison on held-out prompts, on the same latents for every variant."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from grpo_kit.config import Config, EvaluationSettings, KitError, load_config
from grpo_kit.config.prompts import Prompt
from grpo_kit.config.seeds import derive_seed
from grpo_kit.evaluation.conclusions import interval, summarize
from grpo_kit.evaluation.diversity import rewrite_diversity
from grpo_kit.evaluation.statistics import VARIANTS, success_rate
from grpo_kit.experiment import Experiment
from grpo_kit.models.card import add_results
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.rollout import picture_prompts
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.iterations import iteration_name

__all__ = ["EvalResult", "evaluate", "interval", "reword", "rewrites", "summarize", "test_prompts", "validate"]

ImageKey = tuple[int, str, int]  # (prompt_id, variant, seed's number)
Asked = tuple[int, Prompt, str]  # (prompt_id, the prompt that the picture is judged by, what the generator gets)
PARAPHRASED = 2  # a validation asks every second prompt in other words too: all of them would double its time


@dataclass(frozen=True)
class EvalResult:
    """A tidy row for every (prompt, variant, seed), what was concluded from them, and the pictures.

    `paraphrases` has the rows of the reworded prompts, with the column `paraphrase`; empty where there are none.
    """

    rows: pd.DataFrame
    results: dict
    images: Mapping[ImageKey, Image.Image]
    paraphrases: pd.DataFrame = field(default_factory=pd.DataFrame)


def evaluate(
    kit: Experiment,
    prompts: Sequence[Prompt] | None = None,
    compare: Sequence[str | Path] = ("raw", "initial", "trained"),
    *,
    run_dir: Path | str | None = None,
    seeds_per_prompt: int | None = None,
    paraphrases: bool | None = None,
) -> EvalResult:
    """Draw every prompt in every variant from the same latents, score it, and compare with bootstrap intervals.

    Args:
        prompts: held-out prompts; by default those of the config that validation during training did not look at.
        compare: of "raw" (the user's prompt as it is), "initial" and "trained" (the policy before and after), "oracle"
            (the best prompt there is, in worlds that know it), and folders: a run's (its `best/` answers, under the
            run's own settings) or a policy's. A folder is called by its name.
        run_dir: where to write `final_results.json` and `evaluation/`; None writes nothing.
        seeds_per_prompt: latents per prompt; by default as in the config.
        paraphrases: let the variants answer reworded prompts too, one picture each; by default as in the config.

    Raises:
        KitError: an unknown variant, fewer than two prompts, or an oracle where there is none.
    """
    settings = kit.config.evaluation_settings
    prompts = test_prompts(kit) if prompts is None else list(prompts)
    if len(prompts) < 2:
        raise KitError(f"prompts: found {len(prompts)}, allowed: at least 2, since intervals are taken over prompts")
    named = name_variants(compare)
    wanted = settings.paraphrases if paraphrases is None else paraphrases
    reworded = reword(kit, prompts) if wanted else []
    rows, reworded_rows, images = [], [], {}
    for name, variant in named.items():
        write = _writer(kit, variant)
        asked = _asked(prompts, write([prompt.user_prompt for prompt in prompts]))
        scored, drawn = _draw_and_score(kit, asked, name, seeds_per_prompt or settings.seeds_per_prompt)
        rows, images = rows + scored, images | drawn
        if variant != "oracle":  # who knows the answer needs no words
            reworded_rows += _answer_reworded(kit, reworded, write, name)
    frame, other = pd.DataFrame(rows), pd.DataFrame(reworded_rows)
    results = summarize(frame, settings, other)
    saved = {name: variant for name, variant in named.items() if variant not in VARIANTS}
    results |= {"policies": saved} if saved else {}
    if run_dir is not None:
        _write(RunFolder(Path(run_dir)), frame, other, images, results)
        add_results(Path(run_dir), kit.policy, results)
    return EvalResult(frame, results, images, other)


def test_prompts(kit: Experiment) -> list[Prompt]:
    """The held-out prompts for the final comparison: those that the periodic validation leaves."""
    settings = kit.config.evaluation_settings
    rest = kit.val_prompts[settings.validation_prompts :] or kit.val_prompts
    return rest[: settings.num_prompts]


# --- variants: who writes what the generator gets ---------------------------------------------------------------------


def rewrites(kit: Experiment, prompts: Sequence[Prompt], variant: str | Path) -> list[str]:
    """What the generator gets for each prompt in a variant (as in `evaluate`)."""
    return _writer(kit, str(variant))([prompt.user_prompt for prompt in prompts])


def name_variants(compare: Sequence[str | Path]) -> dict[str, str]:
    """What each variant is called in tables → the variant: itself, or the path of a saved run or policy.

    A folder has its own name (a run's, where its `best/` is given), and its parent's before it where two are alike.

    Raises:
        KitError: a variant stands twice, or is neither known nor a folder with a policy.
    """
    named: dict[str, str] = {}
    for variant in map(str, compare):
        if variant in named.values():
            raise KitError(f"compare: {variant!r} stands twice. Give it once")
        if variant in VARIANTS:
            names = [variant]
        else:
            parts = [part for part in _policy_folder(variant).resolve().parts if part != "best"]
            names = [re.sub(r"[^A-Za-z0-9._]+", "_", "/".join(parts[-depth:]))[-80:] for depth in (1, 2, 3)]
            names = [name for name in names if name not in VARIANTS]
        free = [name for name in names if name not in named]
        if not free:
            raise KitError(f"compare: {variant!r} has the name of another one ({names[-1]}). Rename a folder")
        named[free[0]] = variant
    return named


def _policy_folder(variant: str) -> Path:
    """The folder that holds a saved variant's weights: a run's `best/`, or the folder itself."""
    folder = Path(variant)
    for place in (folder / "best", folder):
        if any((place / name).is_file() for name in ("adapter_config.json", "generation_config.json")):
            return place
    allowed = ", ".join(VARIANTS)
    raise KitError(f"compare: found {variant!r:.200}, allowed: {allowed}, or the folder of a trained run or policy")


def _writer(kit: Experiment, variant: str) -> Callable[[list[str]], list[str]]:
    """What turns users' prompts into a variant's; a saved policy is loaded once, here."""
    if variant == "raw":
        return list
    if variant == "oracle":
        return lambda texts: _oracle(kit, texts)
    policy, config = _policy(kit, variant)
    seed = derive_seed(kit.config.training_settings.seed, "evaluation")

    def write(texts: list[str]) -> list[str]:
        seen = picture_prompts(kit.generator, texts, seed) if config.model_settings.use_image else None
        return list(policy.enhance_prompts(texts, seen, reference=variant == "initial"))

    return write


def _policy(kit: Experiment, variant: str) -> tuple[Policy, Config]:
    """The policy of a variant and the config that it was trained under; a policy without a run has the kit's."""
    if variant in VARIANTS:
        return kit.policy, kit.config
    weights = _policy_folder(variant)
    run = weights.parent if weights.name == "best" and (weights.parent / "config.json").is_file() else None
    here = {"model_settings.device": kit.config.model_settings.device}
    config = kit.config if run is None else load_config(run, here)
    return load_policy(config, weights), config


def _oracle(kit: Experiment, texts: list[str]) -> list[str]:
    if kit.config.evaluation_settings.gold is None:
        raise KitError("compare: found 'oracle', which only the embedded world has; leave it out")
    from grpo_kit.rewards.gold import best_prompt

    best = [best_prompt(text) for text in texts]
    if None in best:
        raise KitError(f"prompt {texts[best.index(None)]!r}: outside the embedded world's grammar, so it has no oracle")
    return best


# --- the same request in other words ----------------------------------------------------------------------------------


def reword(kit: Experiment, prompts: Sequence[Prompt]) -> list[Asked]:
    """Paraphrases of the prompts that have any: (the prompt's place, the prompt, its request in other words).

    They stand in a prompt's metadata (`"paraphrases": ["…"]`); the embedded world's prompts are reworded by a program.

    Raises:
        KitError: a prompt's paraphrases are no list of texts.
    """
    return [(i, prompt, text) for i, prompt in enumerate(prompts) for text in _paraphrases(kit, prompt)]


def _paraphrases(kit: Experiment, prompt: Prompt) -> list[str]:
    given = prompt.metadata.get("paraphrases")
    if given is not None:
        if not isinstance(given, list) or not all(isinstance(text, str) and text.strip() for text in given):
            raise KitError(
                f"prompt {prompt.user_prompt!r:.80}: paraphrases: found {given!r:.80}, allowed: a list of texts"
            )
        return given
    if kit.config.evaluation_settings.gold != "shapeworld":
        return []
    from grpo_kit.shapeworld.captions import paraphrase

    text = paraphrase(prompt.user_prompt)
    return [] if text is None else [text]


def _answer_reworded(
    kit: Experiment, reworded: Sequence[Asked], write: Callable[[list[str]], list[str]], name: str
) -> list[dict]:
    """Rows of a variant's pictures of paraphrases, from each prompt's first latent, judged by the prompt as it was.

    The paraphrase asks for the same, so the picture must show the same: what differs is what the policy understood.
    """
    if not reworded:
        return []
    texts = write([text for _, _, text in reworded])
    asked = [(i, prompt, text) for (i, prompt, _), text in zip(reworded, texts, strict=True)]
    rows, _ = _draw_and_score(kit, asked, name, 1)
    return [row | {"paraphrase": text} for row, (_, _, text) in zip(rows, reworded, strict=True)]


# --- pictures and scores ----------------------------------------------------------------------------------------------


def _asked(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Asked]:
    return [(i, prompt, text) for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))]


def _draw_and_score(
    kit: Experiment, asked: Sequence[Asked], variant: str, count: int
) -> tuple[list[dict], dict[ImageKey, Image.Image]]:
    """Rows and pictures of one variant; a prompt's latents depend on its text and place alone, not on the variant."""
    cells = [(i, prompt, text, seed) for i, prompt, text in asked for seed in range(count)]
    run_seed = kit.config.training_settings.seed
    latents = [derive_seed(run_seed, "evaluation", prompt.user_prompt, i, seed) for i, prompt, _, seed in cells]
    drawn = kit.generator.generate_images([text for _, _, text, _ in cells], latents)
    parts = kit.rewards.score(
        drawn,
        [prompt.user_prompt for _, prompt, _, _ in cells],
        [text for _, _, text, _ in cells],
        group_ids=torch.tensor([i for i, _, _, _ in cells]),
        image_seeds=torch.tensor(latents),
    )
    totals = kit.rewards.total(parts, in_groups=False)
    rows = [
        {
            "prompt_id": i,
            "user_prompt": prompt.user_prompt,
            "category": prompt.category,
            "difficulty": prompt.difficulty,
            "variant": variant,
            "seed": seed,
            "text": str(text),
            "reward": float(totals[cell]),
            **{f"reward/{name}": float(values[cell]) for name, values in parts.items()},
            **({"gold": float(parts["gold"][cell])} if "gold" in parts else {}),
        }
        for cell, (i, prompt, text, seed) in enumerate(cells)
    ]
    return rows, {(i, variant, seed): image for (i, _, _, seed), image in zip(cells, drawn, strict=True)}


# --- the quick look during training -----------------------------------------------------------------------------------


def validate(kit: Experiment, iteration: int, folder: RunFolder) -> dict:
    """The quick look during training: greedy rewrites of the first held-out prompts, one picture each.

    Every look draws the same prompts from the same latents, so that two looks can be compared prompt by prompt; the
    change since the first look stands in the result. Every second prompt is asked in other words too.
    """
    prompts = kit.val_prompts[: kit.config.evaluation_settings.validation_prompts]
    asked = _asked(prompts, rewrites(kit, prompts, "trained"))
    scored, images = _draw_and_score(kit, asked, "trained", 1)
    names = [f"{iteration_name(iteration, 'validation')}_{number:03d}" for number in range(len(scored))]
    thumbnails = map(folder.save_thumbnail, images.values(), names)
    samples = [_sample(row) | {"thumbnail": place} for row, place in zip(scored, thumbnails, strict=True)]
    frame, settings = pd.DataFrame(scored), kit.config.evaluation_settings
    described = rewrite_diversity(list(frame["user_prompt"]), list(frame["text"]))
    result = {
        "iteration": iteration,
        "num_prompts": len(prompts),
        **_mean_scores(frame),
        "intervals": {name: interval(values, settings) for name, values in _score_columns(samples).items()},
        "by_category": _mean_scores_by(frame, "category"),
        "by_difficulty": _mean_scores_by(frame, "difficulty"),
        "diversity": described["added_distance"],
        "rewrites": described,
        **_validate_reworded(kit, prompts, frame),
        **_since_start(samples, [v for v in folder.validations() if v["iteration"] < iteration], settings),
        "samples": samples,
    }
    folder.write_json(f"validation_{iteration_name(iteration)}.json", result)
    return result


def _validate_reworded(kit: Experiment, prompts: Sequence[Prompt], frame: pd.DataFrame) -> dict:
    """`paraphrase`, the reward on reworded prompts, and beside it what the same prompts scored as they were."""
    if not kit.config.evaluation_settings.paraphrases:
        return {}
    first = {i: (i, prompt, text) for i, prompt, text in reversed(reword(kit, prompts))}  # one a prompt
    reworded = [first[i] for i in sorted(first)][::PARAPHRASED]
    if not reworded:
        return {}
    rows = _answer_reworded(kit, reworded, _writer(kit, "trained"), "trained")
    other = pd.DataFrame(rows)
    originals = _mean_scores(frame[frame["prompt_id"].isin(other["prompt_id"])])
    samples = [_sample(row) | {"paraphrase": row["paraphrase"]} for row in rows]
    details = {"num_prompts": len(rows), **_mean_scores(other), "originals": originals, "samples": samples}
    return {"paraphrase": details["reward"], "paraphrases": details}


def _since_start(samples: Sequence[Mapping], earlier: Sequence[Mapping], settings: EvaluationSettings) -> dict:
    """The paired change of each score since the run's first validation; nothing where that had other prompts."""
    first = earlier[0]["samples"] if earlier else []
    if [sample["user_prompt"] for sample in first] != [sample["user_prompt"] for sample in samples]:
        return {}
    now, then = _score_columns(samples), _score_columns(first)
    change = {name: now[name] - then[name] for name in now if name in then}
    return {
        "since_start": {
            "differences": {name: interval(values, settings) for name, values in change.items()},
            "success": {name: success_rate(values[:, None], settings.confidence) for name, values in change.items()},
        }
    }


def _score_columns(samples: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """Reward and parts of a validation's samples, (N,) each, NaN where one could not be scored."""
    frame = pd.DataFrame([{"reward": sample["reward"], **sample["rewards"]} for sample in samples], dtype=float)
    return {str(name): frame[name].to_numpy() for name in frame}


def _sample(row: Mapping) -> dict:
    """One row as validations list it."""
    parts = {name.removeprefix("reward/"): value for name, value in row.items() if name.startswith("reward/")}
    asked = {name: row[name] for name in ("user_prompt", "category", "difficulty")}
    return asked | {"enhanced_prompt": row["text"], "reward": row["reward"], "rewards": parts}


def _mean_scores(frame: pd.DataFrame) -> dict:
    parts = [name for name in frame if name.startswith("reward/")]
    means = {name.removeprefix("reward/"): float(frame[name].mean()) for name in parts}
    return {"reward": float(frame["reward"].mean()), "rewards": means}


def _mean_scores_by(frame: pd.DataFrame, column: str) -> dict:
    groups = frame.groupby(column, sort=False)
    return {str(value): {"num_prompts": len(group), **_mean_scores(group)} for value, group in groups}


# --- files ------------------------------------------------------------------------------------------------------------


def _write(
    folder: RunFolder,
    rows: pd.DataFrame,
    reworded: pd.DataFrame,
    images: Mapping[ImageKey, Image.Image],
    results: dict,
) -> None:
    keys = zip(rows["prompt_id"], rows["variant"], rows["seed"], strict=True)
    names = [folder.save_thumbnail(images[key], "evaluation_{}_{}_{}".format(*key)) for key in keys]
    folder.save_table("evaluation/rows.parquet", rows.assign(thumbnail=names))
    if len(reworded):
        folder.save_table("evaluation/paraphrases.parquet", reworded)
    folder.write_json("final_results.json", results)
