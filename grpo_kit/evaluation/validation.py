"""The periodic validation during training: one rewrite and one picture of each of the first held-out prompts."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from grpo_kit.config import EvaluationSettings
from grpo_kit.config.prompts import Prompt
from grpo_kit.evaluation.diversity import rewrite_diversity
from grpo_kit.evaluation.evaluate import answer_reworded, count_unmatched, draw_and_score, reword
from grpo_kit.evaluation.intervals import interval, success_rate
from grpo_kit.evaluation.writers import requests_of, writer
from grpo_kit.experiment import Experiment
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.iterations import iteration_name

PARAPHRASED = 2  # every second prompt is asked in other words too: all of them would double a validation's time


def validate(kit: Experiment, iteration: int, folder: RunFolder) -> dict:
    """Judge the policy's greedy rewrites of the first held-out prompts, and write `validation_iter_NNNNNN.json`.

    Every validation draws the same prompts from the same latents, so that two can be compared prompt by prompt; the
    change since the first one stands in the result. Every second prompt is asked in other words too.
    """
    settings = kit.config.evaluation_settings
    prompts = kit.val_prompts[: settings.validation_prompts]
    write = writer(kit, "trained")
    requests = write(requests_of(prompts))
    scored, images = draw_and_score(kit, requests, "trained", 1, write)
    names = [f"{iteration_name(iteration, 'validation')}_{number:03d}" for number in range(len(scored))]
    thumbnails = map(folder.save_thumbnail, images.values(), names)
    samples = [_sample(row) | {"thumbnail": place} for row, place in zip(scored, thumbnails, strict=True)]
    frame = pd.DataFrame(scored)
    described = rewrite_diversity(list(frame["user_prompt"]), list(frame["text"]))
    result = {
        "iteration": iteration,
        "num_prompts": len(prompts),
        **({"unmatched": count} if (count := count_unmatched(requests)) else {}),
        **_mean_scores(frame),
        "intervals": {name: interval(values, settings).to_dict() for name, values in _score_columns(samples).items()},
        **{
            f"by_{column}": {
                str(value): {"num_prompts": len(group), **_mean_scores(group)}
                for value, group in frame.groupby(column, sort=False)
            }
            for column in ("category", "difficulty")
        },
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
    first = {request.prompt_id: request for request in reversed(reword(kit, prompts))}  # one a prompt
    reworded = [first[prompt_id] for prompt_id in sorted(first)][::PARAPHRASED]
    if not reworded:
        return {}
    rows = answer_reworded(kit, reworded, writer(kit, "trained"), "trained")
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
    differences = {name: interval(values, settings).to_dict() for name, values in change.items()}
    success = {name: success_rate(c[:, None], settings.confidence).to_dict() for name, c in change.items()}
    return {"since_start": {"differences": differences, "success": success}}


def _score_columns(samples: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """Reward and parts of a validation's samples, (N,) each, NaN where one could not be scored."""
    frame = pd.DataFrame([{"reward": sample["reward"], **sample["rewards"]} for sample in samples], dtype=float)
    return {str(name): frame[name].to_numpy() for name in frame}


def _sample(row: Mapping) -> dict:
    """One row as validations list it."""
    asked = {name: row[name] for name in ("user_prompt", "category", "difficulty")}
    return asked | {"enhanced_prompt": row["text"]} | _scores(row)


def _mean_scores(frame: pd.DataFrame) -> dict:
    return _scores({name: float(frame[name].mean()) for name in frame if name.startswith("reward")})


def _scores(row: Mapping) -> dict:
    parts = {name.removeprefix("reward/"): value for name, value in row.items() if name.startswith("reward/")}
    return {"reward": row["reward"], "rewards": parts}
