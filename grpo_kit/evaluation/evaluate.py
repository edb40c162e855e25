"""Does the trained policy help? A paired comparison on held-out prompts, on the same latents for every variant."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from PIL import Image

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.config.display import Shown, line, table
from grpo_kit.config.prompts import Prompt
from grpo_kit.config.seeds import derive_seed
from grpo_kit.evaluation.conclusions import summarize
from grpo_kit.evaluation.pools import pool_evaluations, pool_runs, read_runs
from grpo_kit.evaluation.table import VARIANTS, comparison_rows, percent
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.models.card import add_results
from grpo_kit.models.policy import load_policy
from grpo_kit.rewards.gold import best_prompt
from grpo_kit.rewards.loading import reward_record
from grpo_kit.rewards.protocol import ABSTAINED
from grpo_kit.rollout import picture_prompts
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.own_rewards import Entries, changed_rewards
from grpo_kit.runs.places import dated_report
from grpo_kit.runs.record import ImageKey
from grpo_kit.shapeworld.captions import paraphrase

logger = logging.getLogger(__name__)
_SHOWN_METRICS = 8  # of an evaluation in a notebook


class Request(NamedTuple):
    """One text for the generator, and the user's prompt that its pictures are judged by."""

    prompt_id: int  # the prompt's place in the evaluation
    prompt: Prompt
    text: str


@dataclass(frozen=True, repr=False)
class EvalResult(Shown):
    """A tidy row for every (prompt, variant, seed), what was concluded from them, and the pictures.

    `paraphrases` has the rows of the reworded prompts, with the column `paraphrase`.
    """

    rows: pd.DataFrame
    results: dict
    images: Mapping[ImageKey, Image.Image]
    paraphrases: pd.DataFrame = field(default_factory=pd.DataFrame)

    def _shown(self) -> dict[str, object]:
        rewards = {name: found["reward"]["mean"] for name, found in self.results.get("variants", {}).items()}
        return {"prompts": self.results.get("num_prompts"), "rows": len(self.rows), "reward": rewards}

    def _repr_html_(self) -> str:
        names, rows = comparison_rows(self.results)
        left = f"; {len(names) - _SHOWN_METRICS} metrics more in .results" if len(names) > _SHOWN_METRICS else ""
        note = f"means with intervals ({percent(self.results.get('confidence'))}) over prompts{left}"
        shown = [(label, *cells[:_SHOWN_METRICS]) for label, cells, _ in rows]
        return table(line("EvalResult", self._shown()), shown, ["", *names[:_SHOWN_METRICS]], note)


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
        prompts: held-out prompts; by default those of the config that validation during training did not use.
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
    if run_dir is not None:
        _require_own_rewards(Path(run_dir), kit.config, kit.rewards.record())
    prompts = test_prompts(kit) if prompts is None else list(prompts)
    if len(prompts) < 2:
        raise KitError(f"prompts: found {len(prompts)}, allowed: at least 2, since intervals are taken over prompts")
    named = name_variants(compare)
    reworded = reword(kit, prompts) if (settings.paraphrases if paraphrases is None else paraphrases) else []
    rows, reworded_rows, images, unmatched = [], [], {}, {}
    for name, variant in named.items():
        write = writer(kit, variant)
        texts = write([prompt.user_prompt for prompt in prompts])
        unmatched |= {name: count} if (count := count_unmatched(texts)) else {}
        requests = map(Request, range(len(prompts)), prompts, texts)
        scored, drawn = draw_and_score(kit, list(requests), name, seeds_per_prompt or settings.seeds_per_prompt)
        rows, images = rows + scored, images | drawn
        if variant != "oracle":  # the oracle is not asked to paraphrase
            reworded_rows += answer_reworded(kit, reworded, write, name)
    frame, other = pd.DataFrame(rows), pd.DataFrame(reworded_rows)
    results = summarize(frame, settings, other)
    saved = {name: variant for name, variant in named.items() if variant not in VARIANTS}
    results |= ({"policies": saved} if saved else {}) | ({"unmatched": unmatched} if unmatched else {})
    result = EvalResult(frame, results, images, other)
    if run_dir is not None:
        _write(RunFolder(Path(run_dir)), result)
        add_results(Path(run_dir), kit.policy, results)
    return result


def test_prompts(kit: Experiment) -> list[Prompt]:
    """The held-out prompts for the final comparison: those that the periodic validation leaves."""
    settings = kit.config.evaluation_settings
    rest = kit.val_prompts[settings.validation_prompts :] or kit.val_prompts
    return rest[: settings.num_prompts]


def _write(folder: RunFolder, result: EvalResult) -> None:
    rows = result.rows
    keys = zip(rows["prompt_id"], rows["variant"], rows["seed"], strict=True)
    names = [folder.save_thumbnail(result.images[key], "evaluation_{}_{}_{}".format(*key)) for key in keys]
    folder.save_table("evaluation/rows.parquet", rows.assign(thumbnail=names))
    if len(result.paraphrases):
        folder.save_table("evaluation/paraphrases.parquet", result.paraphrases)
    folder.write_json("final_results.json", result.results)


def rewrites(kit: Experiment, prompts: Sequence[Prompt], variant: str | Path) -> list[str]:
    """The text that the generator gets for each prompt in a variant (as in `evaluate`)."""
    return writer(kit, str(variant))([prompt.user_prompt for prompt in prompts])


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
        names = [variant]
        if variant not in VARIANTS:
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


def writer(kit: Experiment, variant: str) -> Callable[[list[str]], list[str]]:
    """The function from users' prompts to a variant's texts; a saved policy is loaded once, here.

    A saved policy answers under the settings of its run; one without a run has the experiment's.
    """
    if variant == "raw":
        return list
    if variant == "oracle":
        if kit.config.evaluation_settings.gold is None:
            raise KitError("compare: found 'oracle', which only the embedded world has; leave it out")
        return _best_prompts
    policy, config = kit.policy, kit.config
    if variant not in VARIANTS:
        weights = _policy_folder(variant)
        if weights.name == "best" and (weights.parent / "config.json").is_file():
            config = load_config(weights.parent, {"model_settings.device": config.model_settings.device})
        policy = load_policy(config, weights)
    seed = derive_seed(kit.config.training_settings.seed, "evaluation")

    def write(texts: list[str]) -> list[str]:
        seen = picture_prompts(kit.generator, texts, seed) if config.model_settings.use_image else None
        return list(policy.enhance_prompts(texts, seen, reference=variant == "initial"))

    return write


def _best_prompts(texts: list[str]) -> list[str]:
    best = [best_prompt(text) for text in texts]
    if None in best:
        raise KitError(f"prompt {texts[best.index(None)]!r}: outside the embedded world's grammar, so it has no oracle")
    return best


def count_unmatched(texts: Sequence[str]) -> int:
    """In how many of a policy's texts `prompt_part` found no prompt."""
    return sum(not getattr(text, "matched", True) for text in texts)


def reword(kit: Experiment, prompts: Sequence[Prompt]) -> list[Request]:
    """A request for every paraphrase of the prompts that have any.

    They stand in a prompt's metadata (`"paraphrases": ["…"]`); the embedded world's prompts are reworded by a program.

    Raises:
        KitError: a prompt's paraphrases are no list of texts.
    """
    by_program, found = kit.config.evaluation_settings.gold == "shapeworld", []
    for number, prompt in enumerate(prompts):
        texts = prompt.metadata.get("paraphrases")
        if texts is None:
            texts = [text] if by_program and (text := paraphrase(prompt.user_prompt)) else []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            where = f"prompt {prompt.user_prompt!r:.80}: paraphrases"
            raise KitError(f"{where}: found {texts!r:.80}, allowed: a list of texts")
        found += [Request(number, prompt, text) for text in texts]
    return found


def answer_reworded(
    kit: Experiment, reworded: Sequence[Request], write: Callable[[list[str]], list[str]], variant: str
) -> list[dict]:
    """Rows of a variant's pictures of paraphrases, from each prompt's first latent, judged by the prompt as it was."""
    if not reworded:
        return []
    texts = write([request.text for request in reworded])
    requests = [request._replace(text=text) for request, text in zip(reworded, texts, strict=True)]
    rows, _ = draw_and_score(kit, requests, variant, 1)
    return [row | {"paraphrase": request.text} for row, request in zip(rows, reworded, strict=True)]


def draw_and_score(
    kit: Experiment, requests: Sequence[Request], variant: str, count: int
) -> tuple[list[dict], dict[ImageKey, Image.Image]]:
    """Rows and pictures of one variant; a prompt's latents depend on its text and place alone, not on the variant.

    Args:
        count: pictures of each request, from as many latents.
    """
    cells = [(request, seed) for request in requests for seed in range(count)]
    run_seed = kit.config.training_settings.seed
    latents = [derive_seed(run_seed, "evaluation", r.prompt.user_prompt, r.prompt_id, seed) for r, seed in cells]
    images = kit.generator.generate_images([request.text for request, _ in cells], latents)
    parts = kit.rewards.score(
        images,
        [request.prompt.user_prompt for request, _ in cells],
        [request.text for request, _ in cells],
        group_ids=torch.tensor([request.prompt_id for request, _ in cells]),
        image_seeds=torch.tensor(latents),
        metadata=[request.prompt.metadata for request, _ in cells],
    )
    scores = {"reward": kit.rewards.total(parts, in_groups=False)}
    scores |= {f"reward/{name}": values.masked_fill(values == ABSTAINED, torch.nan) for name, values in parts.items()}
    scores |= {"gold": scores["reward/gold"]} if "gold" in parts else {}
    rows = [
        {
            "prompt_id": request.prompt_id,
            "user_prompt": request.prompt.user_prompt,
            "category": request.prompt.category,
            "difficulty": request.prompt.difficulty,
            "variant": variant,
            "seed": seed,
            "text": str(request.text),
            **{name: float(values[cell]) for name, values in scores.items()},
        }
        for cell, (request, seed) in enumerate(cells)
    ]
    keys = [ImageKey(request.prompt_id, variant, seed) for request, seed in cells]
    return rows, dict(zip(keys, images, strict=True))


def evaluate_runs(config: Config, folders: Sequence[Path], out: Path | None = None) -> Path:
    """Evaluate the policies of runs on the same prompts and latents, and return the folder with the results.

    Args:
        config: whose settings, generator and rewards judge all of them.
        folders: of the runs.
        out: the folder for the results; None is the run's own, for several runs a new one in reports/.

    Raises:
        KitError: the first run has no trained policy, or `out` is one of several runs.
    """
    first, several = folders[0], len(folders) > 1
    if not (first / "best").is_dir():
        raise KitError(f"run {first}: no trained policy in it (best/). Train it: grpo-kit train --run-dir {first}")
    place = dated_report("evaluate") if several else first
    place = place if out is None else out.expanduser().resolve()
    if several and place in folders:
        raise KitError(f"--out {place}: one of the runs, whose own evaluation would be lost. Name another folder")
    policies = map(str, folders) if several else ["trained"]
    oracle = ["oracle"] if config.evaluation_settings.gold else []
    _require_own_rewards(first, config, reward_record(config))
    kit = load_experiment(config, trained=None if several else first / "best")
    result = evaluate(kit, compare=("raw", "initial", *policies, *oracle), run_dir=place)
    if several and (pooled := _pooled(result, folders)):
        RunFolder(place).write_json("final_results.json", result.results | {"pooled": pooled})
    return place


def _require_own_rewards(run_dir: Path, config: Config, rewards: Entries) -> None:
    """Refuse to judge a run by other rewards than its own, where no setting asks for that; warn of changed code."""
    own = load_config(run_dir if (run_dir / "config.json").is_file() else config)
    if config.reward_settings == own.reward_settings:
        if difference := changed_rewards(run_dir, rewards):
            _warn_once(f"run {run_dir}: {difference}: all variants are judged by what it is now")


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _pooled(result: EvalResult, folders: Sequence[Path]) -> dict[str, dict]:
    """What runs of one setting with several training seeds show together, by the pool's label."""
    rows, names = result.rows, {path: name for name, path in result.results["policies"].items()}
    pooled = {}
    for pool in pool_runs(read_runs(folder for folder in folders if (folder / "best").is_dir())):
        if len(pool.runs) > 1:
            own = [names[str(run.path)] for run in pool.runs]
            kept = [(name, rows[rows["variant"].isin(["raw", "initial", name])]) for name in own]
            tables = [table.replace({"variant": {name: "trained"}}) for name, table in kept]
            pooled[pool.label] = {"policies": own} | pool_evaluations(tables, confidence=result.results["confidence"])
    return pooled
