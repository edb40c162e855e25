"""Exercises of 06_grpo_loss: the clip, losses that are 0, KL estimators, broken losses, token weights."""

from collections.abc import Callable, Mapping

import numpy as np

from grpo_kit.course.exercise import exercise, expect

LINES = {  # of a sound loss; each broken one has one line changed
    1: "ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()",
    2: "A = advantages.unsqueeze(1)",
    3: "pushed = torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)",
    4: "return -((pushed * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
}
BROKEN = {  # loss → which line is changed, and what stands there
    "loss_a": (3, "pushed = ratio.clamp(0.8, 1.2) * A"),
    "loss_b": (1, "ratio = (logprobs - ref_logprobs).clamp(-20, 20).exp()"),
    "loss_c": (4, "return -pushed.mean()"),
    "loss_d": (2, "A = (advantages / (advantages.std() + 1e-4)).unsqueeze(1)"),
    "loss_e": (4, "return -((pushed * mask).sum() / mask.sum(dim=1)).mean()"),
}


@exercise("06.1", "Which side does a clip close?", minutes=10, difficulty=3)
def check_push(push: Callable[[float, float, float], float]) -> None:
    """The derivative of a token's loss by its log-probability, against finite differences."""
    rng = np.random.default_rng(61)
    drawn = zip(np.exp(rng.uniform(-1, 1, 30)), rng.normal(size=30), rng.choice([0.1, 0.3], 30), strict=True)
    shown = [(1.0, 1.0, 0.2), (1.5, 1.0, 0.2), (0.5, -1.0, 0.2), (0.5, 1.0, 0.2), (1.5, -1.0, 0.2)]
    for ratio, advantage, epsilon in [*shown, *drawn]:
        near = ratio * np.exp([1e-5, -1e-5])
        up, down = -np.minimum(near * advantage, near.clip(1 - epsilon, 1 + epsilon) * advantage)
        right = (up - down) / 2e-5
        whole = -ratio * advantage
        on_both_sides = 0.0 if abs(ratio - 1) > epsilon else whole
        wrong = {
            "the clip is missing: this token has already gone far enough in the direction of its advantage": whole,
            "the clip holds on both sides: it must act only on the side to which the advantage pushes": on_both_sides,
            "this is the slope by the ratio; by the log-probability it is that times the ratio": right / ratio,
            "the sign is turned: where the advantage is positive, the loss falls as the log-probability grows": -right,
        }
        given = f"ratio {ratio:.2f}, A = {advantage:+.2f}, epsilon {epsilon}"
        expect(push(ratio, advantage, epsilon), right, given, wrong=wrong, tolerance=1e-5)


@exercise("06.2", "Six settings: which losses are 0?", minutes=5, difficulty=2)
def check_zero_losses(loss_is_0: Callable[[], Mapping[str, bool]]) -> None:
    """Value of the loss before an update: True for 0."""
    reasons = {
        "a": "with ratios of 1 the loss is minus the mean of the advantages, which add up to 0 in each group",
        "b": "leave one out only multiplies the advantages by G / (G - 1): they still add up to 0",
        "c": "a scale only multiplies the advantages of a group: they still add up to 0",
        "d": "dapo weighs each token the same, so a long row counts more than a short one: nothing cancels",
        "e": "where all rows are of one length, every type that only averages weighs them alike",
        "f": "the policy has left the reference, and beta · KL is in the loss",
    }
    found = loss_is_0()
    expect(sorted(found), sorted(reasons), "the settings that are answered")
    for letter, why in reasons.items():
        is_zero = letter not in "df"
        expect(bool(found[letter]), is_zero, f"setting {letter}", wrong={why: not is_zero})


@exercise("06.3", "k1, k2, k3: values and pulls", minutes=15, difficulty=4)
def check_pulls(mean_and_pull: Callable) -> None:
    """The mean of each estimator over the policy's own actions, and its gradient with the sample held fixed."""
    import torch

    rng = np.random.default_rng(63)
    for actions in (3, 5):
        logits, others = rng.normal(size=(2, actions))
        p, q = (np.exp(x) / np.exp(x).sum() for x in (logits, others))
        log_r = np.log(q / p)
        forms = {  # the estimator, and its derivative by log p
            "k1": (-log_r, np.ones(actions)),
            "k2": (log_r**2 / 2, -log_r),
            "k3": (q / p - 1 - log_r, 1 - q / p),
        }
        turned = {"k1": log_r, "k2": log_r**2 / 2, "k3": p / q - 1 + log_r}
        for name, (value, slope) in forms.items():
            given = f"{name}, {actions} actions"
            mean, pull = mean_and_pull(name, torch.tensor(logits), torch.tensor(others))
            wrong = {
                "r is upside down: it is reference / policy": p @ turned[name],
                "k2 is half of the square": p @ log_r**2,
                "k3 has the term - log r beside r - 1": p @ (q / p - 1),
                "the mean is over the policy's actions: weigh each by its probability": value.mean(),
            }
            expect(mean, p @ value, f"the mean of {given}", wrong=wrong)
            right = _by_logits(p, slope)
            through = "the gradient also went through how often an action is sampled: detach the probabilities"
            wrong = {through: right + _by_logits(p, value), "the sign is turned: it is the gradient itself": -right}
            expect(pull, right, f"the pull of {given}", wrong=wrong)


def _by_logits(p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ p(a) weight(a) ∇log p(a), by the logits."""
    return p * (weights - p @ weights)


def broken_losses() -> dict[str, tuple[str, Callable]]:
    """Loss → its code as text, and the function: five losses with one wrong line each, for exercise 06.4."""
    import torch

    found = {}
    for name, (place, changed) in BROKEN.items():
        lines = [f"    {changed if number == place else line}  # {number}" for number, line in LINES.items()]
        text = "\n".join([f"def {name}(logprobs, old_logprobs, ref_logprobs, advantages, mask):", *lines])
        space = {"torch": torch}
        exec(text, space)  # the text above, nothing of a reader's
        found[name] = text, space[name]
    return found


@exercise("06.4", "Find the bug: five broken losses", minutes=15, difficulty=3)
def check_wrong_lines(wrong_line: Callable[[], Mapping[str, int]]) -> None:
    """Loss → the number of its wrong line."""
    sound = {
        "line 1 is sound: the bound of 20 is far outside of anything that a sampled token has": 1,
        "line 2 is sound: it gives the advantages a second axis and changes none": 2,
        "line 3 is sound: of the clipped and the unclipped value the smaller one counts": 3,
        "line 4 is sound: the mean of row means is what GRPO states, with its length bias": 4,
    }
    found = wrong_line()
    expect(sorted(found), sorted(BROKEN), "the losses that are answered")
    for name, (place, _) in BROKEN.items():
        expect(found[name], place, f"the wrong line of {name}", wrong=sound)


@exercise("06.5", "Ten tokens and a hundred", minutes=10, difficulty=2)
def check_token_weight(token_weight: Callable) -> None:
    """What one token of each row weighs under four loss types."""
    rng = np.random.default_rng(65)
    for lengths, limit in (([10, 100], 120), (rng.integers(1, 40, 5).tolist(), 64)):
        lengths = np.array(lengths)
        rows, total = len(lengths), lengths.sum()
        right = {
            "grpo": 1 / (rows * lengths),
            "dapo": np.full(rows, 1 / total),
            "dr_grpo": np.full(rows, 1 / (rows * limit)),
            "luspo": np.full(rows, 1 / rows),
        }
        wrong = {
            "grpo averages over the tokens of a row first: a row's own length is missing": np.full(rows, 1 / rows),
            "grpo and luspo average over the rows too: their number is missing": 1 / lengths,
            "dapo weighs all tokens of the batch alike: divide by their number, not by rows": 1 / (rows * lengths),
            "dr_grpo divides by the length limit, not by the longest row": np.full(rows, 1 / (rows * lengths.max())),
            "the number of rows is missing": np.full(rows, 1 / limit),
            "luspo divides by the number of rows, not by that of tokens": np.full(rows, 1 / total),
            "the weight is that of one token, not of the whole row": np.ones(rows),
        }
        for name, weights in right.items():
            given = f"{name}, rows of {lengths.tolist()} tokens, limit {limit}"
            expect(token_weight(name, lengths, limit), weights, given, wrong=wrong)
