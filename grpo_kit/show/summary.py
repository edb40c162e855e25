"""What a run's numbers say: a headline, a paragraph, tables, and which cases to look at; all of it computed."""

import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd

from grpo_kit.evaluation import table
from grpo_kit.evaluation.table import MAIN, VARIANTS, Interval, interval_text, metric_name, percent
from grpo_kit.runs.record import RunRecord
from grpo_kit.show import style

RISES, FALLS, UNCLEAR = "rises", "falls", "unclear"
Case = tuple[int, int]  # (prompt_id, seed)


def direction(difference: Interval | None) -> str:
    """Say where an interval of differences lies: above 0, below 0, or on both sides."""
    if difference is None or difference["low"] is None:  # one prompt alone has no interval
        return UNCLEAR
    return RISES if difference["low"] > 0 else FALLS if difference["high"] < 0 else UNCLEAR


def headline(results: Mapping) -> str:
    """Return one sentence on what the evaluation shows, no more than its intervals allow, and what got worse."""
    change = results.get("differences", {}).get("trained-raw")
    if not change:
        return "This run has not been evaluated yet."
    reward = direction(change.get("reward"))
    gold = direction(change["gold"]) if "gold" in change else reward
    sentences = {
        (RISES, RISES): "The trained policy's prompts are drawn better than the users' own.",
        (RISES, FALLS): "The reward rose while the gold check fell: the policy is gaming its reward.",
        (RISES, UNCLEAR): "The reward rose; the gold check shows no clear change.",
        (UNCLEAR, gold): "No clear difference from the users' own prompts yet.",
        (FALLS, gold): "Training made it worse: the users' own prompts score higher.",
    }
    fell = [m for m in change if m not in MAIN and direction(change[m]) == FALLS]
    worse = ", ".join(f"{metric_name(m)} {_change(m, change[m])}" for m in fell)
    return sentences[reward, gold] + (f" What got worse: {worse}." if worse else "")


def paragraph(record: RunRecord) -> str:
    """Return the run in a few sentences whose figures come from its files."""
    results, training = record.results, record.config.get("training_settings", {})
    change = results.get("differences", {}).get("trained-raw")
    trained = f"The policy was trained for {record.iterations} iterations"
    if {"prompts_per_iteration", "group_size"} <= set(training):
        trained += f" of {training['prompts_per_iteration']} prompts × {training['group_size']} rewrites"
    if "step_time" in record.metrics:
        trained += f" in {record.metrics['step_time'].sum() / 60:.1f} minutes"
    sentences = [f"{trained}." if record.iterations else "No iteration has been logged yet."]
    sentences.append(_reward_hacking_sentence(record.sentinel))
    if change is not None:
        count, seeds = results["num_prompts"], results["seeds_per_prompt"]
        sentences.append(f"It was judged on {count} held-out prompts, {seeds} images each.")
        check = "The gold check, a program that reads the image and that training never saw,"
        for metric, name in (("reward", "The reward"), ("gold", check)):
            if metric in change:
                means = (results["variants"][variant][metric]["mean"] for variant in ("raw", "trained"))
                start, end = (table.format_metric(metric, mean) for mean in means)
                sentences.append(f"{name} goes from {start} to {end}: {_change(metric, change[metric])}.")
    closed = results.get("gap_closed", {}).get("gold")
    if closed is not None:
        way = f"{percent(closed)} of the way from the raw prompt to the oracle, a rewrite that knows the answer"
        sentences.append(f"In the gold check that is {way}.")
    better = results.get("success_rate", {}).get("reward")
    if better is not None:
        sentences.append(f"{percent(better)} of the prompts score better than before.")
    return " ".join(filter(None, sentences))


def _reward_hacking_sentence(sentinel: Mapping) -> str:
    """Say whether the reward was gamed; nothing where no score was held out or too few validations were compared."""
    looks, held_out = sentinel.get("looks", 0), sentinel.get("held_out")
    if held_out is None or looks < 3:
        return ""
    found = f"the reward rose while the score held out ({metric_name(held_out)}) fell"
    if change := sentinel["divergence"]:
        return f"From iteration {change['since']} to {change['iteration']} {found}: the policy games its reward."
    return f"In none of {looks} validations was it found that {found}."


def _change(metric: str, value: Interval) -> str:
    return interval_text(metric, value, signed=True) + _unit(metric)


def _unit(metric: str) -> str:
    return " points" if metric in table.SHARES else ""


def comparison_table(final_results: Mapping) -> str:
    """Return the comparison as plain text: means with intervals, paired differences, the way to the oracle.

    Metrics stand two by two, so that a line fits a terminal. Below stand, where they were measured, how the policy
    did on paraphrases, what its rewrites share, and the smallest difference that this evaluation could have found.
    """
    names, rows = table.comparison_rows(final_results)
    if not rows:
        return "not evaluated yet"
    confidence = percent(final_results.get("confidence", 0.95))
    count, seeds = final_results.get("num_prompts", "?"), final_results.get("seeds_per_prompt", "?")
    title = f"{count} held-out prompts, {seeds} images each; mean [{confidence} interval over prompts]"
    blocks = [_text_block(names, rows, slice(start, start + 2)) for start in range(0, len(names), 2)]
    notes = [textwrap.fill(note, 80) for note in evaluation_notes(final_results)]
    return "\n\n".join([title, *blocks, *notes])


def pooled_table(pooled: Mapping) -> str:
    """Return what several training seeds gave together as plain text: means and differences, over seeds and prompts."""
    return _text_block(*table.comparison_rows(pooled), slice(None))


def _text_block(names: Sequence[str], rows: Sequence[tuple[str, list[str], str]], columns: slice) -> str:
    """Return some columns of the table, aligned, a blank line between kinds of rows; rows without a figure left out."""
    kept = [(label, cells[columns], kind) for label, cells, kind in rows if set(cells[columns]) != {"–"}]
    heading, *lines = style.aligned([["", *names[columns]], *([label, *cells] for label, cells, _ in kept)])
    by_kind = pd.Series(lines).groupby([kind for *_, kind in kept], sort=False).agg("\n".join)
    return f"{heading}\n" + "\n\n".join(by_kind)


def evaluation_notes(results: Mapping) -> list[str]:
    """Return in sentences what the table does not hold; an older evaluation has none of it."""
    policy = _judged(results)
    notes = []
    asked = results.get("paraphrases", {})
    changes = asked.get("from_originals", {}).get(policy, {})
    texts = [f"{metric_name(metric)} {_change(metric, changes[metric])}" for metric in MAIN if metric in changes]
    if texts:
        same = f"The same {asked['num_prompts']} requests in other words change"
        notes.append(f"{same} the {policy} policy's {' and '.join(texts)}.")
    found = results.get("diversity", {}).get(policy)
    if found and found["suffix"]:
        share, ending = percent(found["suffix_share"]), style.plain_text(found["suffix"], 60)
        end = f"{share} of the {policy} policy's rewrites end in “{ending}”"
        notes.append(f"{end}; {percent(found['distinct'])} are distinct.")
    return [*notes, *filter(None, [detectable_note(results)])]


def _judged(results: Mapping) -> str | None:
    """The policy that the notes are about: the trained one, else the first saved one."""
    return next((v for v in ("trained", *results.get("policies", {})) if v in results.get("variants", {})), None)


def detectable_note(results: Mapping) -> str:
    """Return how small a difference the evaluation could have found; empty where that was not computed."""
    saved = list(results.get("policies", {}))
    pair = f"{saved[1]}-{saved[0]}" if len(saved) > 1 else f"{_judged(results)}-raw"
    found = results.get("detectable", {})
    by_metric = found.get("differences", {}).get(pair, {})
    metrics = [m for m in MAIN if m in by_metric]
    if not metrics:
        return ""

    def sizes(key: str) -> str:
        return " and ".join(f"{table.format_metric(m, by_metric[m][key], True).lstrip('+')}{_unit(m)}" for m in metrics)

    names = " and ".join(metric_name(m) for m in metrics)
    more = [("twice the prompts", "with_twice_the_prompts"), ("twice the images of each", "with_twice_the_seeds")]
    known = [f"{sizes(key)} with {text}" for text, key in more if by_metric[metrics[0]][key] is not None]
    shares = (found["power"], 1 - results.get("confidence", 0.95))
    chance, error = (percent(share).replace(" ", "\N{NO-BREAK SPACE}") for share in shares)
    return (
        f"A difference {pair.replace('-', ' − ')} in {names} is found with a chance of {chance} (two-sided "
        f"{error}) from {sizes('difference')} on; {'; '.join(known)}."
    )


def representative_cases(rows: pd.DataFrame, count: int) -> list[Case]:
    """Choose cases without looking at scores: the first prompt of each category, then the second of each, …"""
    if rows.empty:
        return []
    first = rows.sort_values(["prompt_id", "seed"]).drop_duplicates("prompt_id")
    turn = first.groupby("category").cumcount()
    chosen = first.assign(turn=turn).sort_values(["turn", "prompt_id"])[["prompt_id", "seed"]].head(count)
    return [(int(prompt_id), int(seed)) for prompt_id, seed in chosen.to_numpy()]


def worst_cases(rows: pd.DataFrame, count: int, metric: str = "gold") -> list[Case]:
    """Return the (prompt, seed) where the trained policy lost most against the raw prompt; only those where it lost."""
    if rows.empty or metric not in rows:
        return []
    scores = rows.pivot_table(index=["prompt_id", "seed"], columns="variant", values=[metric, "reward"])
    if not {"raw", "trained"} <= set(scores[metric].columns):
        return []
    loss = pd.DataFrame({m: scores[m]["trained"] - scores[m]["raw"] for m in dict.fromkeys((metric, "reward"))})
    lost = loss[loss[metric] < 0].sort_values(list(loss.columns), kind="stable")
    prompts = lost[~lost.index.get_level_values("prompt_id").duplicated()]  # each prompt once, at its worst seed
    return [(int(prompt_id), int(seed)) for prompt_id, seed in prompts.index[:count]]


def category_rows(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Return a table by category: the header, then per category its prompts and the main metrics of each variant."""
    found = dict(sorted(record.results.get("by_category", {}).items()))
    columns = [(m, v) for m in MAIN for v in VARIANTS if any(m in values.get(v, {}) for values in found.values())]
    counts = record.evaluation.groupby("category")["prompt_id"].nunique() if len(record.evaluation) else {}
    body = [
        [name, str(counts.get(name, "–")), *(table.format_metric(m, values.get(v, {}).get(m)) for m, v in columns)]
        for name, values in found.items()
    ]
    return ["category", "prompts", *(f"{metric_name(m)}: {v}" for m, v in columns)], body
