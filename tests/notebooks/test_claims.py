"""What the notebooks' prose claims is computed again, from the data that it cites: text and number cannot drift apart.

A claim is written as it stands in the notebook, with # for each number. Where a sentence changes, its test fails until
it says the same again; where the data change, until the sentence does.
"""

from __future__ import annotations

import ast
import io
import json
import random
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import special, stats

from grpo_kit.config import PROJECT_ROOT

NOTEBOOKS, DATA = PROJECT_ROOT / "notebooks", PROJECT_ROOT / "data"
NUMBER = r"([+−]?\d+(?:\.\d+)?)"


def cells(stem: str, folder: Path | None = None) -> list[dict]:
    """A notebook's cells, by the two digits of its name."""
    (path,) = (folder or NOTEBOOKS).glob(f"{stem}_*.ipynb")
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def prose(stem: str) -> str:
    """All markdown as one line."""
    texts = ["".join(cell["source"]) for cell in cells(stem) if cell["cell_type"] == "markdown"]
    return " ".join("\n".join(texts).split())


def said(stem: str, claim: str) -> list[str]:
    """The numbers of a claim, as they are written; the claim must stand once in the notebook."""
    found = re.findall(re.escape(claim).replace(r"\#", NUMBER), prose(stem))
    assert len(found) == 1, f"{stem} says {len(found)} times: {claim}"
    return [found[0]] if isinstance(found[0], str) else list(found[0])


def states(stem: str, claim: str) -> None:
    """Assert that a claim without a number stands in the notebook."""
    assert prose(stem).count(claim) == 1, f"{stem} does not say: {claim}"


def printed(stem: str, piece: str) -> list[str]:
    """The lines that the one code cell with this piece of code has printed, without a reader's prediction."""
    (cell,) = [c for c in cells(stem) if c["cell_type"] == "code" and piece in "".join(c["source"])]
    lines = "".join("".join(output.get("text", [])) for output in cell["outputs"]).splitlines()
    return [line for line in lines if not line.startswith("you said:")]


def assert_rounds(written: list[str], values: list[float]) -> None:
    """Assert that each number is the value, rounded as it is written."""
    assert len(written) == len(values)
    for text, value in zip(written, values, strict=True):
        plain = text.replace("−", "-").lstrip("+")
        digits = len(plain.partition(".")[2])
        assert f"{value:.{digits}f}" == plain, f"found {text}, computed {value:.4f}"


@cache
def metrics() -> pd.DataFrame:
    """A row an iteration of the recorded run."""
    return pd.read_json(DATA / "demo_run/metrics.jsonl", lines=True)


@cache
def settings() -> dict:
    """The recorded run's training settings."""
    return json.loads((DATA / "demo_run/config.json").read_text(encoding="utf-8"))["training_settings"]


@cache
def results() -> dict:
    """The recorded evaluation."""
    return json.loads((DATA / "demo_run/final_results.json").read_text(encoding="utf-8"))


@cache
def rows() -> pd.DataFrame:
    """A row a picture of the recorded evaluation."""
    return pd.read_parquet(DATA / "demo_run/evaluation/rows.parquet")


def rows_of_paraphrases() -> pd.DataFrame:
    """A row a paraphrase and variant of the recorded evaluation."""
    return pd.read_parquet(DATA / "demo_run/evaluation/paraphrases.parquet")


@cache
def by_seed() -> pd.DataFrame:
    """The gold check, in points, of the recorded grid: a row a seed, a column a setting, the baseline first."""
    runs = pd.read_json(DATA / "demo_grid/runs.jsonl", lines=True)
    table = runs.pivot(index="seed", columns="setting", values="gold/trained")
    return 100 * table[runs["setting"].unique()]


def differences(name: str) -> np.ndarray:
    """Of a setting of the grid and the baseline, seed by seed."""
    return (by_seed()[name] - by_seed().iloc[:, 0]).to_numpy()


def spread_over_seeds() -> float:
    """Of one setting, in points: the root of the mean variance over its seeds."""
    return float(by_seed().var(ddof=1).mean() ** 0.5)


def power_of_two_samples(n: int, d: float, s: float, level: float = 0.05) -> float:
    """The chance that n seeds of each find a difference d, where the standard deviation over seeds is s."""
    freedom = 2 * n - 2
    return float(stats.nct.sf(stats.t.ppf(1 - level / 2, freedom), freedom, (n / 2) ** 0.5 * d / s))


def holm(p: list[float]) -> list[float]:
    """Adjusted p values, by the definition: the k-th smallest of m times m − k + 1, never below the one before."""
    order = sorted(range(len(p)), key=p.__getitem__)
    steps = [min(1.0, p[i] * (len(p) - k)) for k, i in enumerate(order)]
    return [max(steps[: order.index(i) + 1]) for i in range(len(p))]


def ends(interval: dict, scale: float = 1.0) -> list[float]:
    """Mean and ends of an interval of the recorded evaluation."""
    return [scale * interval[name] for name in ("mean", "low", "high")]


# --- gold is a check --------------------------------------------------------------------------------------------------


def test_no_text_says_that_the_check_knows_the_truth_or_that_the_oracle_is_a_ceiling() -> None:
    """00 to 11 and docs: gold is a program with errors of its own; the oracle is a reference."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (PROJECT_ROOT / "docs").glob("*.md")}
    texts |= {f"{number:02}": prose(f"{number:02}") for number in range(12)}
    for name, text in texts.items():
        assert not re.search(r"knows the truth|destroys the truth|is (a|the) ceiling", text), name
    for stem in ("00", "01", "07", "08"):
        assert re.search(r"errors of its own", prose(stem)), stem
    states("04", "It does not share CLIP's mistakes, and makes others.")


def test_the_check_and_the_reward_contradict_each_other_on_some_pictures() -> None:
    """08_evaluate: how many of the trained policy's pictures one judge likes and the other does not."""
    claim = "of the # pictures of the recorded trained policy # have a reward above # and a check of at most #,"
    count, disputed, high, low = map(float, said("08", claim))
    trained = rows().query("variant == 'trained'")
    assert len(trained) == count
    assert ((trained["reward"] > high) & (trained["gold"] <= low)).sum() == disputed > 0


def test_how_many_disputed_pictures_the_present_check_leaves() -> None:
    (count,) = said("08", "pictures that show what was asked, and only # of them")
    assert printed("08", "disputed = rows")[0] == f"{count} pictures"


def test_how_much_the_check_misreads_of_scenes_that_are_known() -> None:
    """08_evaluate: rendered scenes, crisp and blurred; all of them hold what is checked, blurred ones are not clean."""
    from grpo_kit.shapeworld.render import render
    from grpo_kit.shapeworld.scene import random_scenes
    from grpo_kit.shapeworld.verify import check

    claim = "of # crisp scenes it misreads # % of what it checks, of # blurred ones # %."
    crisp, crisp_share, blurred, blurred_share = said("08", claim)
    for count, share, style in ((crisp, crisp_share, "clean"), (blurred, blurred_share, "dreamy")):
        rng, wrong = random.Random(11), []
        for scene in random_scenes(int(count), seed=10, style=style):
            found = check(render(scene, rng), scene)
            wrong += [ok != (name != "clean" or style == "clean") for name, ok in found.items()]
        assert_rounds([share], [100 * float(np.mean(wrong))])


# --- baselines, groups ------------------------------------------------------------------------------------------------

TOY = np.array([[0.90, 0.84, 0.78, 0.88], [0.30, 0.10, 0.20, 0.40]])  # a row a prompt, four texts, equally likely


def gradients(baseline: Callable[[np.ndarray], np.ndarray | float], batches: int = 40_000) -> np.ndarray:
    """(batches, 8): REINFORCE's estimates by the logits, four rewrites of each prompt a batch."""
    drawn = np.random.default_rng(9).integers(4, size=(batches, 2, 4))
    rewards = TOY[[[0], [1]], drawn]
    slopes = np.eye(4)[drawn] - 1 / 4
    return ((rewards - baseline(rewards))[..., None] * slopes).mean(axis=2).reshape(batches, 8)


def of_everyone(rewards: np.ndarray) -> np.ndarray:
    """The mean of all other rewrites of the batch."""
    return (rewards.sum(axis=(1, 2), keepdims=True) - rewards) / 7


def of_the_group(rewards: np.ndarray) -> np.ndarray:
    """The mean of the other rewrites of the same prompt."""
    return (rewards.sum(axis=2, keepdims=True) - rewards) / 3


def test_a_baseline_changes_the_noise_and_not_the_aim() -> None:
    """05_groups: the same expected gradient with every baseline, and how much the variance differs."""
    states("05", "leaves the *expected* gradient as it is.")
    exact = ((TOY - TOY.mean(axis=1, keepdims=True)) / 4).ravel()
    found = {}
    for name, baseline in {"none": lambda _: 0.0, "everyone": of_everyone, "own group": of_the_group}.items():
        estimates = gradients(baseline)
        error = estimates.std(axis=0, ddof=1) / len(estimates) ** 0.5
        assert (np.abs(estimates.mean(axis=0) - exact) < 4.5 * error).all(), name
        found[name] = estimates.var(axis=0).sum()
    ratio = found["everyone"] / found["own group"]
    claim = "a variance that is # times as large against everyone as against the own group"
    assert [float(text) for text in said("05", claim)] == pytest.approx([ratio], rel=0.05)
    assert said("05", "it takes # times as many batches") == said("05", claim)
    for line in printed("05", "worth = np.array(rewards)"):
        name, variance = line[:9].strip(), float(line.split()[-1])
        assert variance == pytest.approx(found[name], rel=0.03, abs=1e-4)


def test_a_baseline_that_looks_at_the_rewrite_itself_would_change_the_aim() -> None:
    """05_groups: the condition of the sentence; such a baseline is not one of these."""
    estimates = gradients(lambda rewards: rewards**2)
    error = estimates.std(axis=0, ddof=1) / len(estimates) ** 0.5
    exact = ((TOY - TOY.mean(axis=1, keepdims=True)) / 4).ravel()
    assert (np.abs(estimates.mean(axis=0) - exact) > 10 * error).any()


def test_luck_does_no_harm_to_exact_copies_and_harms_those_that_nearly_agree() -> None:
    """05_groups: the sum of A ∇log p over identical rewrites is 0; one word apart it is not."""
    states("05", "For exact copies they cancel, since one sentence has one log-probability")
    states("05", "nothing cancels: the word in which they differ is made likelier or less likely by luck.")
    rng = np.random.default_rng(0)
    rewards, probabilities = rng.normal(size=8), special.softmax(rng.normal(size=5))
    advantages = (rewards - rewards.mean()) / rewards.std(ddof=1)
    slopes = np.eye(5) - probabilities  # of log p, a row a text
    assert np.abs(advantages @ slopes[[2] * 8]).max() < 1e-12
    assert np.abs(advantages @ slopes[[2, 3] * 4]).max() > 0.1


def test_how_often_a_group_holds_one_of_the_best_tenth_is_an_identity() -> None:
    """05_groups: 1 − 0.9^G for rewards of any kind, and so the notebook's figure says."""
    states("05", "1 − 0.9^G, for any policy and any reward, so that is computed and not measured.")
    rng = np.random.default_rng(0)
    for line in printed("05", "tries = {size: rng.choice(pool"):
        size, share = re.search(r"G = +(\d+).*best tenth: (\d+)%", line).groups()
        assert_rounds([share], [100 * (1 - 0.9 ** int(size))])
        for draw in (rng.normal, rng.random, rng.standard_cauchy):
            rewards = draw(size=(20_000, int(size)))
            held = (rewards.max(axis=1) >= np.quantile(rewards, 0.9)).mean()
            assert held == pytest.approx(int(share) / 100, abs=0.02)


def test_which_budgets_of_pictures_differ_by_more_than_chance() -> None:
    """05_groups: only 2 × 2 × 8 does, in the table of docs/rewards.md; shared and own seeds do not."""
    text = (PROJECT_ROOT / "docs/rewards.md").read_text(encoding="utf-8").split("## How many rewrites")[1]
    found = re.findall(r"^\| (.+?) \| \d \| .+ \| ([−+]\S+) \[([−+]\S+), ([−+]\S+)\] \|$", text, flags=re.MULTILINE)
    clear = [name for name, _, low, high in found if low[0] == high[0]]
    assert len(found) == 6 and clear == ["2 × 2 × 8"]
    assert any("its own seed" in name for name, *_ in found)
    states("05", "Of its six alternatives to 4 prompts × 8 rewrites × 1 picture only one differs by more than chance")
    states("05", "and is worse: 2 × 2 × 8 (`docs/rewards.md`). Own seeds in place of shared ones do not.")


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_what_the_log_calls_loss_is_mostly_the_kl_term() -> None:
    """07_train: beta · KL beside |loss| in the recorded run."""
    claim = (
        "(beta #) the median of beta · KL is #, that of |loss| #, and the loss lies above 0 in # % of the iterations."
    )
    term, loss = settings()["beta"] * metrics()["kl"], metrics()["loss"]
    values = [settings()["beta"], term.median(), loss.abs().median(), 100 * (loss > 0).mean()]
    assert_rounds(said("07", claim), values)
    assert np.corrcoef(term, loss)[0, 1] > 0.9 and (loss - term).abs().median() < 0.5 * term.median()


def test_a_loss_is_0_at_the_start_only_for_some_types_and_without_a_kl_term() -> None:
    """06_grpo_loss, 07_train: ratios of 1, four lengths; grpo gives 0, dapo, dr_grpo, luspo and cispo do not."""
    states("06", "Types that give long rows more weight have another value here, and so has every loss with a KL term.")
    states("07", "Without a KL term the loss of a fresh batch is 0 by construction (loss type `grpo`)")
    rewards, lengths = np.array([0.8, 0.6, 0.4, 0.2]), np.array([12, 10, 6, 5])
    advantages = (rewards - rewards.mean()) / rewards.std(ddof=1)
    each = {"grpo": 1 / (4 * lengths), "dapo": 1 / lengths.sum(), "dr_grpo": 1 / (4 * 40), "luspo": 1 / 4}
    value = {name: float(-(weight * lengths * advantages).sum()) for name, weight in each.items()}
    assert abs(value.pop("grpo")) < 1e-12 and all(abs(other) > 0.05 for other in value.values())
    logprobs = -np.linspace(0.5, 1.5, 4)  # cispo weighs log p itself
    assert abs((advantages * lengths * logprobs).sum() / lengths.sum()) > 0.03


def test_the_steps_do_not_shrink_with_the_spread() -> None:
    """07_train: spread and gradient norm in the first and the last quarter of the recorded run."""
    claim = "first and last quarter the standard deviation is # and #, the gradient's norm # and #."
    part = len(metrics()) // 4
    first, last = metrics().head(part).mean(), metrics().tail(part).mean()
    assert settings()["scale_rewards"] == "group"
    values = [first["reward_std"], last["reward_std"], first["grad_norm"], last["grad_norm"]]
    assert_rounds(said("07", claim), values)
    assert values[1] < values[0] / 2 and values[3] > 0.9 * values[2]


def test_the_clip_acts_on_few_tokens_and_never_in_a_single_update() -> None:
    """06_grpo_loss, 07_train: the share of clipped tokens in the recorded run, and the profiles' updates."""
    claim = "it acts on # % of the tokens in the median iteration, and on # % at most."
    acted = 100 * metrics()["clip_ratio/region_mean"]
    assert_rounds(said("06", claim), [acted.median(), acted.max()])
    full = json.loads((PROJECT_ROOT / "grpo_kit/config/profiles/full.json").read_text(encoding="utf-8"))
    assert full["training_settings"]["updates_per_rollout"] == 1 and settings()["updates_per_rollout"] == 2
    states("06", "With one update for a rollout (profile `full`) all ratios are 1, and the clip never acts.")
    states("07", "where there is only one (profile `full`), never.")


def test_a_good_token_at_half_its_probability_is_pushed_half_as_hard() -> None:
    """06_grpo_loss: the push on log p is the slope by the ratio, times the ratio."""
    states("06", "The push on its log-probability is the slope times the ratio, so half of that at ratio 1.")
    step, push = 1e-6, {}
    for ratio in (1.0, 0.5):
        up, down = (-min(r, min(r, 1.2)) for r in ratio * np.exp([step, -step]))
        push[ratio] = (up - down) / (2 * step)
    assert push[0.5] == pytest.approx(push[1.0] / 2)


def test_the_mean_log_ratio_of_a_row_moves_less_than_its_tokens() -> None:
    """06_grpo_loss: after the recorded steps, how many tokens and how many rows lie outside of 1 ± 0.2."""
    paths = sorted((DATA / "demo_run/rollouts").glob("*.parquet"))
    kept = pd.concat([pd.read_parquet(path, columns=["new_logprobs", "old_logprobs"]) for path in paths])
    moved = [np.exp(np.subtract(new, old)) for new, old in zip(kept["new_logprobs"], kept["old_logprobs"], strict=True)]
    tokens = np.concatenate(moved)
    means = np.exp([np.log(ratio).mean() for ratio in moved])
    left, rows_left, count = said("06", "recorded steps # % of the tokens have left 1 ± 0.2, and # of # rows.")
    assert_rounds([left, rows_left], [100 * (np.abs(tokens - 1) > 0.2).mean(), (np.abs(means - 1) > 0.2).sum()])
    assert int(count) == len(moved)
    limits = said("06", "So the paper on GSPO sets ε to #e-4 and #e-4;")
    assert limits == ["3", "4"] and (np.abs(means - 1) > 3e-4).mean() > 0.5  # at these the clip does act


def test_kl_estimates_have_the_gradient_of_the_kl_for_one_decision_and_not_for_a_rewrite() -> None:
    """06_grpo_loss: k2 by token against ∇KL of all rewrites of two tokens, on a policy that is listed."""
    states("06", "This is proven for *one* decision, and while the batch is the policy's own.")
    states("06", "what an early token does to the KL of the later ones is left out.")
    rng = np.random.default_rng(0)
    first, second, first_ref, second_ref = (
        special.log_softmax(rng.normal(size=shape), axis=-1) for shape in (3, (3, 3), 3, (3, 3))
    )
    later = (np.exp(second) * (second - second_ref)).sum(axis=1)  # (3,): the KL of the second token, by prefix

    def by_logits(weights: np.ndarray) -> np.ndarray:
        """Σ p(a) weights(a) ∇log p(a), by the first token's logits."""
        return np.exp(first) * (weights - (np.exp(first) * weights).sum())

    k2, whole = by_logits(first - first_ref), by_logits(first - first_ref + later)

    def kl(logits: np.ndarray, rest: np.ndarray | float) -> float:
        log_p = special.log_softmax(logits)
        return float((np.exp(log_p) * (log_p - first_ref + rest)).sum())

    for rest, exact in ((0.0, k2), (later, whole)):  # one decision: k2 is ∇KL; two: `whole` is, k2 is not
        steps = 1e-6 * np.eye(3)
        assert [(kl(first + e, rest) - kl(first - e, rest)) / 2e-6 for e in steps] == pytest.approx(exact, abs=1e-7)
    assert np.linalg.norm(k2 - whole) > 0.1 * np.linalg.norm(whole)


def test_which_loss_types_change_the_objective() -> None:
    """06_grpo_loss: three of the eight have no clip."""
    code = (PROJECT_ROOT / "grpo_kit/grpo/loss.py").read_text(encoding="utf-8")  # importing it would load torch
    every, clipped = (
        ast.literal_eval(re.search(rf"^{name} = (\(.+?\))", code, flags=re.MULTILINE | re.DOTALL)[1])
        for name in ("LOSS_TYPES", "CLIPPED_LOSS_TYPES")
    )
    assert sorted(set(every) - set(clipped)) == ["cispo", "sapo", "vespo"] and len(every) == 8
    states("06", "(`cispo`, `sapo` and `vespo` also change the objective")
    states("06", "and for three of eight what is aimed at.")


def test_the_kl_of_a_token_and_of_a_rewrite() -> None:
    """02_policy, 06_grpo_loss: both at the end of the recorded run, and their ratio."""
    last = pd.read_parquet(sorted((DATA / "demo_run/rollouts").glob("*.parquet"))[-1])
    gaps = [np.subtract(old, ref) for old, ref in zip(last["old_logprobs"], last["ref_logprobs"], strict=True)]
    token, rewrite = np.concatenate(gaps).mean(), np.mean([gap.sum() for gap in gaps])
    assert_rounds(said("02", "has # nats a token, # a rewrite."), [token, rewrite])
    assert_rounds(said("06", "# times as much in the last row):"), [rewrite / token])


def test_a_scale_cancels_only_where_advantages_are_divided_by_the_spread() -> None:
    """04_rewards: another CLIP's scale, with scale_rewards "group" and "none"."""
    states("04", 'With `scale_rewards` "none" they are not divided, and a smaller scale makes smaller steps.')
    rewards = np.array([0.8, 0.6, 0.4, 0.2])
    centred = [values - values.mean() for values in (rewards, 0.3 * rewards)]
    by_group = [values / values.std(ddof=1) for values in centred]
    assert np.allclose(*by_group) and np.allclose(0.3 * centred[0], centred[1])


def test_what_the_wrong_reward_does_in_training_is_what_the_readme_says() -> None:
    """04_rewards: the alarms of ten runs each, and one run's numbers, as the README has them from the study."""
    readme = " ".join((PROJECT_ROOT / "README.md").read_text(encoding="utf-8").split())
    wrong, of, right, of_right = said(
        "04", "# of # raise the alarm that the reward is gamed, with the right one # of #."
    )
    assert f"{wrong} of {of} raise the alarm" in readme and f"the normal reward: {right} of {of_right}." in readme
    rose, fell = "the reward rose by # [#, #]", "the check fell by # [#, #]."
    numbers = [*said("04", rose), *said("04", fell)]
    run = "the reward rose by {} [{}, {}] since iteration 20, gold fell by {} [{}, {}]: the policy is gaming the reward"
    assert run.format(*numbers) in readme


def test_how_far_easy_rewards_agree_with_the_check() -> None:
    """04_rewards: within a prompt, on the pictures of the recorded evaluation that were kept."""
    kept = rows().dropna(subset=["thumbnail"])
    assert list(map(int, said("04", "It is tried on # pictures of # prompts"))) == [
        len(kept),
        kept["prompt_id"].nunique(),
    ]
    sizes = kept["thumbnail"].map(lambda name: jpeg_bytes(DATA / "demo_run" / name))
    found = []
    for values in (kept["reward"], sizes, kept["text"].str.len()):
        ranks = [g.rank() for _, g in kept.assign(mine=values).groupby("prompt_id")[["mine", "gold"]]]
        found.append(float(np.mean([r["mine"].corr(r["gold"]) if r.std().all() else 0.0 for r in ranks])))
    claim = "CLIP reaches #, the size of the JPEG file #, the length of the rewrite #."
    assert_rounds(said("04", claim), found)


def test_the_reward_of_a_rewrite_for_half_of_the_request() -> None:
    """04_rewards: paraphrases of which the trained policy dropped the second object, and the best paid of them."""
    from grpo_kit.shapeworld.captions import parse

    answers = rows_of_paraphrases().query("variant == 'trained'")
    kinds = answers[["user_prompt", "text"]].map(lambda text: parse(text).kind)
    dropped = answers[(kinds["user_prompt"] == "pair") & (kinds["text"] != "pair")]
    claim = "on # of # paraphrases it drops the second object, and for one of them it gets a reward of #."
    assert_rounds(said("04", claim), [len(dropped), len(answers), dropped["reward"].max()])


def jpeg_bytes(path: Path) -> int:
    """The size of a picture as a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(path).convert("RGB").save(file, "JPEG")
    return file.tell()


def test_the_first_step_is_two_updates_with_a_kl_term() -> None:
    """00_start_here: what `grpo_step` does with the profile tiny."""
    tiny = json.loads((PROJECT_ROOT / "grpo_kit/config/profiles/tiny.json").read_text(encoding="utf-8"))
    assert tiny["training_settings"]["updates_per_rollout"] == 2 and tiny["training_settings"]["beta"] > 0
    states("00", "(with the profile `tiny`: two updates, with a KL term that holds the policy near where it was)")


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_the_oracle_is_a_reference_and_is_beaten() -> None:
    """08_evaluate: a fixed form, and how often the trained policy's reward is higher."""
    from grpo_kit.shapeworld.captions import oracle_caption, parse

    assert oracle_caption(parse("a crimson ball")) == "a large red circle, in the center, white background, sharp"
    means = rows().pivot_table(index="prompt_id", columns="variant", values="reward")
    claim = "In the recorded evaluation the trained policy has the higher reward on # of # prompts."
    assert_rounds(said("08", claim), [(means["trained"] > means["oracle"]).sum(), len(means)])
    states("08", "*Oracle* is a reference and not a ceiling")


def test_on_paraphrases_the_raw_prompt_gains_and_the_trained_policy_loses() -> None:
    """08_evaluate: changes from the originals with their intervals, and the levels."""
    changes, levels = results()["paraphrases"]["from_originals"], results()["paraphrases"]["variants"]
    raw, trained = ends(changes["raw"]["reward"]), ends(changes["trained"]["reward"])
    assert raw[1] > 0 > trained[2]
    assert_rounds(said("08", "The raw prompt *gains* (recorded: reward # [#, #])"), raw)
    assert_rounds(said("08", "*loses* a little (# [#, #])"), trained)
    values = [levels[name]["reward"]["mean"] for name in ("trained", "raw")]
    assert_rounds(said("08", "on the paraphrases #, the raw prompt #."), values)


def test_what_got_worse_is_counted_and_quoted() -> None:
    """08_evaluate: "keeps the user's objects" falls; how many prompts, and what became of tangerine."""
    falls = ends(results()["differences"]["trained-raw"]["keeps_objects"], 100)
    falls += ends(results()["paraphrases"]["from_originals"]["trained"]["keeps_objects"], 100)
    numbers = said("08", "falls by # points [#, #], on the paraphrases by # [#, #].")
    assert_rounds([("−" * (i % 3 == 0)) + text for i, text in enumerate(numbers)], falls)
    written = rows().query("variant == 'trained'").groupby("prompt_id").agg(
        {"user_prompt": "first", "text": "first", "reward": "mean", "reward/keeps_objects": "mean"}
    )  # fmt: skip
    changed = written[written["reward/keeps_objects"] < 1]
    became = changed["user_prompt"].str.contains("tangerine") & changed["text"].str.contains("cyan")
    claim = 'You should see # prompts, all with two things, and in # of them "tangerine" has become "cyan".'
    assert_rounds(said("08", claim), [len(changed), became.sum()])
    assert changed["user_prompt"].str.contains(r" (?:on top of|beside|above|left of|and) ").all()
    assert_rounds(said("08", "rewards are # to #."), [changed["reward"].min(), changed["reward"].max()])
    shown = " ".join(printed("08", "wanted = render("))
    assert all(repr(text) in shown for text in (*changed["user_prompt"], *changed["text"]))
    assert any(line.startswith("keeps_objects: ") for line in printed("08", "print(headline(result.results))"))


def test_the_kinds_of_failure_are_counted() -> None:
    """08_evaluate: a colour exchanged, a shape of the neighbour, a place that nobody asked for."""
    from grpo_kit.shapeworld.captions import parse

    written = rows().query("variant == 'trained' and seed == 0")
    pairs = [(parse(asked), parse(text)) for asked, text in zip(written["user_prompt"], written["text"], strict=True)]
    colours = [(a, b) for a, b in pairs if a.colour != b.colour]
    assert_rounds(said("08", '"orange → cyan", # prompts.'), [len(colours)])
    assert {(a.colour, b.colour) for a, b in colours} == {("orange", "cyan")}
    shapes = [(a, b) for a, b in pairs if a.shape != b.shape]
    claim = '"square → cross" and "circle → cross", # prompts; in all of them the other object is a cross.'
    assert_rounds(said("08", claim), [len(shapes)])
    assert {(a.shape, b.shape) for a, b in shapes} == {("square", "cross"), ("circle", "cross")}
    assert all(a.second_shape == b.shape == "cross" for a, b in shapes)
    placed = [a.place for a, b in pairs if b.place == "bottom" and a.place is None]
    assert_rounds(said("08", 'In # of # rewrites the policy adds "at the bottom"'), [len(placed), len(pairs)])
    assert sum(a.kind == "single" and a.place is None for a, _ in pairs) == len(placed)
    lost = rows_of_paraphrases().query("variant == 'trained'")
    changed = [(parse(a).stated(), parse(b).stated()) for a, b in lost[["user_prompt", "text"]].to_numpy()]
    names = [name for a, b in changed for name in a if a[name] != b.get(name)]
    assert names.count("background") > 0 and names.count("second_shape") > 0 and names.count("count") > 0


def test_more_prompts_are_the_better_buy_since_they_divide_both_scatters() -> None:
    """08_evaluate: the detectable difference with twice the prompts and with twice the seeds."""
    found = results()["detectable"]["differences"]["trained-raw"]["reward"]
    assert found["with_twice_the_prompts"] < found["with_twice_the_seeds"] < found["difference"]
    states("08", "More prompts divide both kinds of scatter, over prompts and over seeds;")


def test_seeds_that_all_prompts_share_make_the_correction_too_large() -> None:
    """01_prompts: what is taken off the variance between prompts, with shared seeds and with seeds of their own."""
    states("01", "Here all prompts share their seeds, and luck that all share does not set their means apart:")
    rng, found = np.random.default_rng(0), {}
    for name, shape in {"own": (4000, 12, 6), "shared": (4000, 1, 6)}.items():
        rewards = 0.3 * rng.normal(size=(4000, 12, 1)) + 0.4 * rng.normal(size=shape)
        rewards = rewards + 0.2 * rng.normal(size=(4000, 12, 6))
        between = rewards.mean(axis=2).var(axis=1, ddof=1) - rewards.var(axis=2, ddof=1).mean(axis=1) / 6
        found[name] = between.mean()
    assert found["own"] == pytest.approx(0.09, abs=0.004)
    assert found["shared"] == pytest.approx(0.09 - 0.16 / 6, abs=0.004)  # less by the shared part over their number


# --- several seeds ----------------------------------------------------------------------------------------------------


def test_clear_where_there_is_no_difference_is_not_no_difference_where_it_is_clear() -> None:
    """09_ablations: P(clear | no difference) of 1.96 with three seeds; P(no difference | clear) depends on more."""
    claim = 'and *where there is no difference*, it would call # % of the comparisons "clear".'
    (clear,) = said("09", claim)
    assert_rounds([clear], [100 * 2 * stats.t.sf(1.96, 2)])
    shares = [float(clear) / 100 * none / (float(clear) / 100 * none + 0.5 * (1 - none)) for none in (0.1, 0.5, 0.9)]
    assert max(shares) > 0.7 and min(shares) < 0.1  # of the clear results, where half of all true effects are found


def test_what_pairing_costs() -> None:
    """09_ablations: t of three pairs and of two samples, and from which correlation or share on pairs pay."""
    pairs, two = stats.t.ppf(0.975, [2, 4])
    claim = "t is # in place of #, so pairing pays only where the two settings' results correlate by more than #."
    assert_rounds(said("09", claim), [pairs, two, 1 - (two / pairs) ** 2])
    pairs, two = stats.t.ppf(0.975, [4, 8])
    assert_rounds(said("09", "and with five seeds pairs pay from # on"), [1 - (two / pairs) ** 2])
    assert_rounds(said("09", "is narrower only where the share lies below # %"), [100 * (two / pairs) ** 2])
    assert "Pairing is free" not in prose("09")


def test_welch_and_paired_in_the_recorded_grid() -> None:
    """09_ablations: both intervals of every setting, and where pairs made them narrower."""
    by_welch, in_pairs, narrower = printed("09", 'print(f"p {p:.4f}'), printed("09", "shared = by_seed"), []
    first = by_seed().iloc[:, 0]
    for one, other, name in zip(by_welch, in_pairs, by_seed().columns[1:], strict=True):
        test, paired = stats.ttest_ind(by_seed()[name], first, equal_var=False), stats.ttest_1samp(differences(name), 0)
        alone, paired = test.confidence_interval(), paired.confidence_interval()
        found = re.match(r" *(\S+) \[ *(\S+), +(\S+)\]  p (\S+)  (.+)", one).groups()
        assert_rounds(list(found[:4]), [differences(name).mean(), alone.low, alone.high, test.pvalue])
        low, high, shared, same = re.match(r"\[ *(\S+), +(\S+)\]  correlation (\S+)  (.+)", other).groups()
        assert_rounds([low, high, shared], [paired.low, paired.high, np.corrcoef(by_seed()[name], first)[0, 1]])
        assert found[4] == same == name
        narrower += [name] if paired.high - paired.low < alone.high - alone.low else []
    states("09", "You should see that pairs make the interval narrower for three settings of four.")
    assert len(narrower) == 3 and len(by_welch) == len(in_pairs) == 4


def test_what_is_clear_in_the_recorded_grid_by_its_plan() -> None:
    """09_ablations: Welch and Holm for both outcomes, and what the text says of the one clear effect."""
    lines = [line for line in printed("09", "def holm") if "Holm" in line]
    runs, clear = pd.read_json(DATA / "demo_grid/runs.jsonl", lines=True), set()
    names = list(by_seed().columns)
    assert len(names) == 5 and len(lines) == 8
    for metric in ("gold", "reward"):
        table = runs.pivot(index="seed", columns="setting", values=f"{metric}/trained")
        assert len(table) == 5 and not table.isna().any(axis=None)
        tests = [stats.ttest_ind(table[name], table[names[0]], equal_var=False).pvalue for name in names[1:]]
        for name, p in zip(names[1:], holm(tests), strict=True):
            (line,) = [one for one in lines if one.startswith(metric) and one.endswith(name)]
            written, verdict = re.match(r"\w+ +Holm's p (\S+)  (clear|could be chance) ", line).groups()
            assert_rounds([written], [p])
            assert (verdict == "clear") == (p < 0.05)
            clear |= {(metric, name)} if p < 0.05 else set()
        group = names.index(next(name for name in names if name.startswith("group_size 2")))
        claim = "its p value of # becomes #." if metric == "gold" else "In the reward it could be chance (#),"
        adjusted = holm(tests)[group - 1]
        assert_rounds(said("09", claim), [tests[group - 1], adjusted] if metric == "gold" else [adjusted])
    rate = next(name for name in names if name.startswith("learning_rate"))
    assert clear == {("gold", rate), ("gold", names[group]), ("reward", rate)}
    costs = [-differences(rate).mean(), (table[names[0]] - table[rate]).mean()]  # the table of the reward
    assert_rounds(said("09", "A tenth of the learning rate costs # points of the check and # of the reward:"), costs)
    assert_rounds(said("09", "at equal pictures costs # points of the check;"), [-differences(names[group]).mean()])


def test_the_plan_of_the_grid_and_the_power_that_it_states() -> None:
    """grid.yaml and 09_ablations: the plan names outcome, comparison and correction, and its figures are right."""
    plan = " ".join((DATA / "demo_grid/grid.yaml").read_text(encoding="utf-8").replace("#", " ").split())
    for word in ("`gold/trained`", "`reward/trained`", "Welch's t-test", "Holm", "Not paired"):
        assert word in plan, word
    assert "(4.5 points) Welch's test finds a difference of 10 points in 87 % of all grids, of 15 in nearly all" in plan
    assert "p below .0125, in 63 % and 96 %. Of 5 points: 34 % and 15 %." in plan
    asked = {(10, 0.05): 87, (10, 0.0125): 63, (15, 0.0125): 96, (5, 0.05): 34, (5, 0.0125): 15}
    for (d, level), percent in asked.items():
        assert round(100 * power_of_two_samples(5, d, 4.473, level)) == percent
    states("09", "How it would be read was written down **before the first run**")


def test_how_many_seeds_a_difference_needs() -> None:
    """09_ablations: power of two samples from the noncentral t, from the scatter over seeds of the recorded grid."""
    s = spread_over_seeds()
    claim = "they find a difference of 10 points in # % of all grids, and # seeds are needed for 80 %."
    chance, ten = said("09", claim)
    (five,) = said("09", "A difference of 5 points needs #,")
    assert_rounds([chance], [100 * power_of_two_samples(5, 10, s)])
    needed = {
        int(d): int(n) for d, n in re.findall(r"of +(\d+) points: (\d+) seeds", "\n".join(printed("09", "enough = n[")))
    }
    assert set(needed) == {1, 2, 5, 10} and (needed[10], needed[5]) == (int(ten), int(five))
    now, then = said("09", "# points over seeds now, # then.")
    base, beta = said("09", "by # points for the first one, and by # with beta 0.")
    deviations = by_seed().std(ddof=1)
    assert float(then) == 4.5  # as the plan has it
    assert_rounds([now, base, beta], [s, deviations.iloc[0], deviations["beta 0"]])
    for d, n in needed.items():
        assert power_of_two_samples(n - 1, d, s) < 0.8 <= power_of_two_samples(n, d, s)
        assert n > 2 * (2.8 * s / d) ** 2  # what z in place of t would say


def test_with_several_questions_the_chance_of_an_error_is_bounded_by_the_sum() -> None:
    """09_ablations: 20 % for four questions; 1 − 0.95⁴ would need that they are independent."""
    (line, *_) = printed("09", "0.05 * questions")
    questions, bound = map(int, re.match(r"(\d+) questions: .* up to (\d+)%", line).groups())
    assert questions == 4 and bound == 100 * 0.05 * questions > 100 * (1 - 0.95**questions)
    states("09", "the chance that *some* interval is wrong is higher: at most the sum of the 5 %.")


def test_the_grid_has_dr_grpo_with_both_of_its_changes() -> None:
    """09_ablations: no weight by length and no division by the standard deviation, in the same runs."""
    grid = yaml.safe_load((DATA / "demo_grid/grid.yaml").read_text(encoding="utf-8"))
    halves = [(g.get("training_settings.loss_type"), g.get("training_settings.scale_rewards")) for g in grid]
    assert halves.count(("dr_grpo", "none")) == 1 and halves.count((None, None)) == 4
    assert all(g["seeds"] == [0, 1, 2, 3, 4] for g in grid)
    states("09", "`loss_type dr_grpo` is the first, `scale_rewards none` the second, and its runs have both.")


# --- these tests can fail ---------------------------------------------------------------------------------------------


def require_caught_in_a_copy(
    stem: str, right: str, wrong: str, test: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of all notebooks passes the test as it is, and no longer where some words of one notebook are others."""
    sources = {source.name: source.read_text(encoding="utf-8") for source in NOTEBOOKS.glob("[0-9]*_*.ipynb")}
    for name, text in sources.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "NOTEBOOKS", folder)
    test()
    (name,) = [name for name in sources if name.startswith(f"{stem}_")]
    notebook, count = json.loads(sources[name]), 0
    for cell in notebook["cells"]:
        words = r"\s+".join(map(re.escape, right.split()))
        cell["source"], found = re.subn(words, wrong, "".join(cell["source"]))
        count += found
    assert count == 1
    (folder / name).write_text(json.dumps(notebook), encoding="utf-8")
    with pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize(
    ("stem", "right", "wrong", "test"),
    [
        ("07", "in 89 % of the", "in 98 % of the", test_what_the_log_calls_loss_is_mostly_the_kl_term),
        ("09", "10 points in 64 % of", "10 points in 99 % of", test_how_many_seeds_a_difference_needs),
        ("05", "is 15 times as large", "is 5 times as large", test_a_baseline_changes_the_noise_and_not_the_aim),
        ("08", "a reference and not", "a ceiling and not", test_the_oracle_is_a_reference_and_is_beaten),
    ],
)
def test_a_wrong_number_in_a_copied_notebook_is_caught(
    stem: str, right: str, wrong: str, test: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_caught_in_a_copy(stem, right, wrong, test, tmp_path, monkeypatch)


# --- 07: the dip, and the check for reward hacking --------------------------------------------------------------------


def said_once(text: str) -> str:
    """A rewrite with each of its parts said once."""
    return ", ".join(dict.fromkeys(text.split(", ")))


def test_what_the_dip_at_iteration_40_is() -> None:
    """07_train: the rewrites say a part twice, which the check cannot read; what the user asked for is in them."""
    from grpo_kit.rewards.gold import keeps_objects

    samples = json.loads((DATA / "demo_run/validation_iter_000040.json").read_text(encoding="utf-8"))["samples"]
    texts = [sample["enhanced_prompt"] for sample in samples]
    kept = keeps_objects([], [sample["user_prompt"] for sample in samples], list(map(said_once, texts)))
    twice = sum(text != said_once(text) for text in texts)
    assert [int(n) for n in said("07", "At iteration 40, # of the # rewrites say a part twice")] == [twice, len(texts)]
    assert [int(n) for n in said("07", "said once, # of the # keep what the user")] == [sum(kept), len(texts)]
    assert "three blue circles, crisp, crisp" in texts
    pairs = {sample["user_prompt"]: sample["enhanced_prompt"] for sample in samples}
    assert said_once(pairs["a violet pyramid, in the middle"]) == "two purple triangles, crisp"
    checked = [sample["rewards"]["keeps_objects"] for sample in samples]
    assert_rounds(said("07", "falls on held-out prompts to # at iteration 40"), [float(np.mean(checked))])


def test_the_kl_beside_the_dip() -> None:
    """07_train: means over the five iterations before a validation."""
    values = [metrics()["kl"][at - 5 : at].mean() for at in (40, 20)]
    assert_rounds(said("07", "five iterations before is #, after # at iteration 20"), values)


def test_the_check_for_reward_hacking_finds_nothing_in_the_recorded_run() -> None:
    """07_train: gold between the validations of iterations 20 and 40."""
    scores = []
    for at in (20, 40):
        found = json.loads((DATA / f"demo_run/validation_iter_{at:06d}.json").read_text(encoding="utf-8"))
        scores.append(np.array([sample["rewards"]["gold"] for sample in found["samples"]]))
    d = scores[1] - scores[0]
    assert_rounds(said("07", "noise explains (p = #)"), [stats.norm.cdf(d.sum() / (d**2).sum() ** 0.5)])
    assert json.loads((DATA / "demo_run/sentinel.json").read_text(encoding="utf-8"))["divergence"] is None
