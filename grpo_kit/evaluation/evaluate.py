"""Does the trained policy help? A paired comparison on held-out prompts, on the same latents for every variant."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd
from PIL import Image

from grpo_kit.config import Config, KitError, load_config
from grpo_kit.config.display import Shown, line, table
from grpo_kit.config.prompts import Prompt
from grpo_kit.evaluation.cells import cells_of, drawn_again, next_turn, scores_of
from grpo_kit.evaluation.conclusions import summarize
from grpo_kit.evaluation.looking import compare_looks, summarize_looks
from grpo_kit.evaluation.pools import pool_evaluations, pool_runs, read_runs
from grpo_kit.evaluation.table import VARIANTS, comparison_rows, percent
from grpo_kit.evaluation.writers import Request, Writer, name_variants, requests_of, writer
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.models.card import add_results
from grpo_kit.rewards.loading import reward_record
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.own_rewards import Entries, changed_rewards
from grpo_kit.runs.places import dated_report
from grpo_kit.runs.record import ImageKey
from grpo_kit.shapeworld.captions import paraphrase

logger = logging.getLogger(__name__)
_SHOWN_METRICS = 8  # of an evaluation in a notebook


@dataclass(frozen=True, repr=False)
class EvalResult(Shown):
    """A tidy row for every (prompt, variant, seed), what was concluded from them, and the pictures.

    `paraphrases` has the rows of the reworded prompts, with the column `paraphrase`; `looks`, of a policy of several
    turns, those of `looking.compare_looks`.
    """

    rows: pd.DataFrame
    results: dict
    images: Mapping[ImageKey, Image.Image]
    paraphrases: pd.DataFrame = field(default_factory=pd.DataFrame)
    looks: pd.DataFrame = field(default_factory=pd.DataFrame)

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
        requests = write(requests_of(prompts))
        unmatched |= {name: count} if (count := count_unmatched(requests)) else {}
        scored, drawn = draw_and_score(kit, requests, name, seeds_per_prompt or settings.seeds_per_prompt, write)
        rows, images = rows + scored, images | drawn
        if variant != "oracle":  # the oracle is not asked to paraphrase
            reworded_rows += answer_reworded(kit, reworded, write, name)
    frame, other = pd.DataFrame(rows), pd.DataFrame(reworded_rows)
    results = summarize(frame, settings, other)
    saved = {name: variant for name, variant in named.items() if variant not in VARIANTS}
    results |= ({"policies": saved} if saved else {}) | ({"unmatched": unmatched} if unmatched else {})
    looks = pd.DataFrame()
    if "trained" in named.values() and kit.config.generation_settings.turns > 1:
        looks = compare_looks(kit, prompts, seeds_per_prompt=seeds_per_prompt)
        results |= {"looks": summarize_looks(looks, settings)}
    result = EvalResult(frame, results, images, other, looks)
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
    if len(result.looks):
        folder.save_table("evaluation/looks.parquet", result.looks)
    folder.write_json("final_results.json", result.results)


def rewrites(kit: Experiment, prompts: Sequence[Prompt], variant: str | Path) -> list[str]:
    """The text that the generator gets first for each prompt in a variant (as in `evaluate`)."""
    return [request.text for request in writer(kit, str(variant))(requests_of(prompts))]


def count_unmatched(requests: Sequence[Request]) -> int:
    """In how many of a policy's texts `prompt_part` found no prompt."""
    return sum(not getattr(request.text, "matched", True) for request in requests)


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


def answer_reworded(kit: Experiment, reworded: Sequence[Request], write: Writer, variant: str) -> list[dict]:
    """Rows of a variant's pictures of paraphrases, from each prompt's first latent, judged by the prompt as it was."""
    if not reworded:
        return []
    rows, _ = draw_and_score(kit, write(reworded), variant, 1, write)
    return [row | {"paraphrase": request.text} for row, request in zip(rows, reworded, strict=True)]


def draw_and_score(
    kit: Experiment, requests: Sequence[Request], variant: str, count: int, write: Writer | None = None
) -> tuple[list[dict], dict[ImageKey, Image.Image]]:
    """Rows and pictures of one variant; a prompt's latents depend on its text and place alone, not on the variant.

    Args:
        count: pictures of each request, from as many latents.
        write: who may look at them and write again, where the requests say so; the last pictures count.
    """
    cells = cells_of(kit, requests, count)
    texts = [cell.words(kit) for cell in cells] if variant == "oracle" else [cell.request.text for cell in cells]
    images = kit.generator.generate_images(texts, [cell.latent for cell in cells])
    asked = [cell.request.asked for cell in cells]
    for _ in range(1, write.turns if write is not None else 1):
        asked = next_turn(cells, asked, texts, images, write.look_at)
        texts, images = drawn_again(kit, cells, write.answers(asked, step=count), texts, images)
    rows = [
        {
            "prompt_id": cell.request.prompt_id,
            "user_prompt": cell.request.prompt.user_prompt,
            "category": cell.request.prompt.category,
            "difficulty": cell.request.prompt.difficulty,
            "variant": variant,
            "seed": cell.seed,
            "text": str(text),
            **scores,
        }
        for cell, text, scores in zip(cells, texts, scores_of(kit, cells, texts, images), strict=True)
    ]
    keys = [ImageKey(cell.request.prompt_id, variant, cell.seed) for cell in cells]
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
