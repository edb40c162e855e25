"""Checks of the exercises of 04_rewards: a cosine, a reward of one's own, and a reward that is broken."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from PIL import Image

from grpo_kit.config import load_config
from grpo_kit.config.paths import PROJECT_ROOT
from grpo_kit.course.exercise import WrongAnswer, exercise, expect

AGREEMENT = 0.75  # with the check, of a reward of one's own
LIKED, DISLIKED = 0.60, 0.40  # a reward that is broken: at least this, while the check is at most that


@exercise("04.1", "CLIP's score from two matrices", minutes=5, difficulty=1)
def check_clip_scores(clip_scores: Callable) -> None:
    """`clip_scores(images, texts)` on random vectors of any length."""
    for seed, N, D in ((0, 4, 3), (1, 5, 5)):
        images, texts = np.random.default_rng(seed).normal(2, 3, size=(2, N, D))
        a, b = (np.linalg.norm(v, axis=1) for v in (images, texts))
        dots = (images * texts).sum(axis=1)
        unit_columns = [v / np.linalg.norm(v, axis=0) for v in (images, texts)]
        wrong = {
            "the vectors were not brought to length 1": dots,
            "that is every picture against every text; the score is the diagonal": images @ texts.T / np.outer(a, b),
            "that is every text against every picture; the score is the diagonal": texts @ images.T / np.outer(b, a),
            "the columns were brought to length 1; a vector is a row": (unit_columns[0] * unit_columns[1]).sum(axis=1),
            "only the pictures' vectors have length 1": dots / a,
            "only the texts' vectors have length 1": dots / b,
            "divided by the squares of the lengths: the root is missing": dots / (a * b) ** 2,
            "the mean of the products; a cosine is their sum": dots / (a * b) / D,
        }
        found = clip_scores(images.copy(), texts.copy())
        expect(found, dots / (a * b), f"random images and texts of the shape ({N}, {D})", wrong=wrong)


@exercise("04.2", "A reward of your own, audited", minutes=15, difficulty=3)
def check_my_reward(my_reward: Callable) -> None:
    """`my_reward(images, prompts, rewrites)` against the check, within prompts, on pictures of the recorded run."""
    folder = PROJECT_ROOT / "data" / "demo_run"
    rows = pd.read_parquet(folder / "evaluation" / "rows.parquet").dropna(subset=["thumbnail"])
    images = [Image.open(folder / name).convert("RGB") for name in rows["thumbnail"]]
    prompts, rewrites = rows["user_prompt"].tolist(), rows["text"].tolist()
    given = f"for {len(rows)} pictures of {rows['prompt_id'].nunique()} prompts"

    def scores(prompts: list[str], rewrites: list[str]) -> np.ndarray:
        values = np.asarray(my_reward(images, prompts, rewrites), float)
        if values.shape != (len(images),) or not np.isfinite(values).all():
            found = f"found the shape {values.shape}, {np.isfinite(values).sum()} of the numbers finite"
            raise WrongAnswer(f"{given}: expected {len(images)} finite numbers, {found}")
        return values

    values = scores(prompts, rewrites)
    agreement = _agreement(rows.assign(mine=values))
    reads_rewrites = not np.array_equal(values, scores(prompts, rewrites[::-1]))
    order = pd.Series(values, rows.index).rank().corr(rows["reward/clip_similarity"].rank())
    if agreement >= AGREEMENT and not reads_rewrites and order < 0.99:
        return
    reads_prompts = not np.array_equal(values, scores(prompts[::-1], rewrites))
    wrong = {
        "other rewrites changed the numbers: a policy would be paid for its words": reads_rewrites,
        "all pictures have the same number: there is nothing to compare": np.ptp(values) == 0,
        "these are CLIP's numbers: the task is a reward without CLIP": order >= 0.99,
        "the sign is turned: better pictures must have higher numbers": agreement <= -0.2,
        "another user's prompt gives the same numbers: it never looks at what was asked": not reads_prompts,
        "what else did the user ask for that can be seen in the pixels?": True,
    }
    idea = next(name for name, holds in wrong.items() if holds)
    raise WrongAnswer(f"{given}: expected an agreement of at least {AGREEMENT}, found {agreement:.2f} ({idea})")


def _agreement(rows: pd.DataFrame) -> float:
    """The mean rank correlation of "mine" and "gold" within a prompt; 0 where one of them does not vary."""
    groups = [group[["mine", "gold"]].rank() for _, group in rows.groupby("prompt_id")]
    return float(np.mean([ranks["mine"].corr(ranks["gold"]) if ranks.std().all() else 0.0 for ranks in groups]))


@exercise("04.3", "Break the reward", minutes=10, difficulty=3)
def check_broken(broken: Callable) -> None:
    """`broken()` gives a user's prompt and a rewrite; they are drawn from four latent seeds, and judged twice."""
    from grpo_kit.models.generator import load_generator
    from grpo_kit.rewards.loading import load_rewards
    from grpo_kit.shapeworld.captions import parse

    user, rewrite = broken()
    if parse(user) is None:
        raise WrongAnswer(f"for the user's prompt {user!r}: the check cannot read it; use words of this world")
    config = load_config("tiny")
    generator = load_generator(config)
    images = generator.generate_images([rewrite] * 4, range(4))
    parts = load_rewards(config, generator).score(images, [user] * 4, [rewrite] * 4)
    reward, gold = float(parts["clip_similarity"].mean()), float(parts["gold"].mean())
    if reward >= LIKED and gold <= DISLIKED:
        return
    wrong = {
        "both judges like it: that is a good rewrite": reward >= LIKED,
        "both judges dislike it: that breaks the picture, not the reward": gold <= DISLIKED,
        "the check likes it more than the reward does: that is the other way round": True,
    }
    idea = next(name for name, holds in wrong.items() if holds)
    wanted = f"expected a reward of at least {LIKED} and a check of at most {DISLIKED}"
    raise WrongAnswer(f"for {user!r} rewritten as {rewrite!r}: {wanted}, found {reward:.2f} and {gold:.2f} ({idea})")
