"""The exercises of notebook 02b: expected reward, its gradient, estimates of it, baselines, and a loop that learns."""

from collections.abc import Callable, Iterator

import numpy as np

from grpo_kit.course.exercise import WrongAnswer, exercise, expect

ESTIMATES = 2000
TEXTS = 13


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _policies() -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Logits and rewards of policies that choose one of K texts, and their description."""
    yield np.log([0.3, 0.7]), np.array([1.0, 0.0]), "two texts with p = 0.3, 0.7 and rewards 1, 0"
    rng = np.random.default_rng(2)
    for count in (3, 5):
        logits, rewards = rng.normal(size=count).round(1), rng.uniform(-1, 1, count).round(1)
        yield logits, rewards, f"logits {logits.tolist()} and rewards {rewards.tolist()}"


@exercise("02b.1", "Expected reward of thirteen texts", minutes=5, difficulty=1)
def expected_reward(answer: Callable) -> None:
    """`answer(first, second, rewards)`: (4,) and (3, 4) probabilities, (13,) rewards, "<end>" first → J."""
    rng = np.random.default_rng(1)
    for case in range(3):
        first, second = _softmax(rng.normal(size=4)), _softmax(rng.normal(size=(3, 4)))
        rewards = rng.uniform(-1, 1, TEXTS).round(1)
        chances = np.concatenate([first[3:], (first[:3, None] * second).ravel()])
        second_alone = first[3] * rewards[0] + second.ravel() @ rewards[1:]
        wrong = {
            "this is the plain mean: a text that is likelier must count more": rewards.mean(),
            "the text that ends at once is left out": chances[1:] @ rewards[1:],
            "a text of two tokens has the product of both probabilities": second_alone,
            "this is the reward of the likeliest text; J is a mean over all": rewards[chances.argmax()],
        }
        found = answer(first.copy(), second.copy(), rewards.copy())
        expect(found, chances @ rewards, f"policy {case + 1}", wrong=wrong)


@exercise("02b.2", "The log trick, derived and coded", minutes=10, difficulty=3)
def log_trick(answer: Callable) -> None:
    """`answer(logits, rewards)`: (K,) each → the gradient of J by the logits (K,), held against finite differences."""
    for logits, rewards, given in _policies():
        p = _softmax(logits)
        nudges = 1e-5 * np.eye(len(p))
        exact = [(_softmax(logits + step) - _softmax(logits - step)) @ rewards / 2e-5 for step in nudges]
        wrong = {
            "the mean over texts is missing: weigh each text by its probability": rewards - p * rewards.sum(),
            "∇ log p has a second part: −p of every text, not only the chosen one": p * rewards,
            "this goes down: the sign is turned round": -np.array(exact),
            "∇p was weighted by p once more: p · ∇ log p is ∇p already": p * exact,
            "the reward is left out: this is the mean of ∇ log p, which is 0": np.zeros(len(p)),
        }
        expect(answer(logits.copy(), rewards.copy()), exact, given, wrong=wrong, tolerance=1e-5)


@exercise("02b.3", "REINFORCE is right on average", minutes=10, difficulty=3)
def reinforce(answer: Callable) -> None:
    """`answer(logits, rewards, drawn)`: the numbers of the texts drawn (G,) → one estimate of the gradient (K,)."""
    rng = np.random.default_rng(3)
    for logits, rewards, given in _policies():
        p, one_hot = _softmax(logits), np.eye(len(logits))
        drawn = rng.choice(len(p), size=(ESTIMATES, 6), p=p)
        texts = drawn[0]
        each = rewards[texts, None] * (one_hot[texts] - p)
        wrong = {
            "a mean of the drawn texts is asked for, not their sum": each.sum(axis=0),
            "the draws hold the probabilities already: do not weigh by p again": (p[texts, None] * each).mean(axis=0),
            "∇ log p has a second part: −p of every text": (rewards[texts, None] * one_hot[texts]).mean(axis=0),
            "this is the exact gradient: estimate it from the drawn texts alone": p * (rewards - p @ rewards),
            "the reward is left out": (one_hot[texts] - p).mean(axis=0),
        }
        group = f"{given}, drawn {texts.tolist()}"
        expect(answer(logits.copy(), rewards.copy(), texts.copy()), each.mean(axis=0), group, wrong=wrong)
        found = np.array([answer(logits.copy(), rewards.copy(), one) for one in drawn])
        error = found.std(axis=0, ddof=1) / ESTIMATES**0.5
        off = np.abs(found.mean(axis=0) - p * (rewards - p @ rewards)) / np.maximum(error, 1e-12)
        if off.max() > 4:
            raise WrongAnswer(f"for {given}: the mean of {ESTIMATES} estimates is {off.max():.0f} standard errors off")


@exercise("02b.4", "A baseline changes the noise, not the aim", minutes=10, difficulty=3)
def baseline(answer: Callable) -> None:
    """`answer(p, grad_log_p, rewards, b)`: (N,), (N, D), (N,), a number → mean (D,) and total variance of one draw."""
    for logits, rewards, given in _policies():
        p, grad_log_p = _softmax(logits), np.eye(len(logits)) - _softmax(logits)
        for b in (0.0, float(p @ rewards), 2.5):
            mean, noise = _moments(p, grad_log_p, rewards - b)
            got = answer(p.copy(), grad_log_p.copy(), rewards.copy(), b)
            if not isinstance(got, (tuple, list)) or len(got) != 2:
                raise WrongAnswer(f"for {given}, b = {b:.2g}: expected two values, mean and variance")
            found_mean, found_noise = got
            moved = {
                "a likelier text counts more: weigh by p": ((rewards - b)[:, None] * grad_log_p).mean(axis=0),
                "the baseline moved the aim: subtract it from the reward": mean - b,
                "the reward is left out": np.zeros_like(mean),
            }
            expect(found_mean, mean, f"{given}, b = {b:.2g}, mean", wrong=moved)
            wrong = {
                "this is the mean square: take the square of the mean off": noise + mean @ mean,
                "the baseline is left out of the noise": _moments(p, grad_log_p, rewards)[1],
                "the baseline is added": _moments(p, grad_log_p, rewards + b)[1],
                "this is a standard deviation, the root of the variance": noise**0.5,
                "the variances of all D parts are to be added up, not averaged": noise / len(mean),
            }
            expect(found_noise, noise, f"{given}, b = {b:.2g}, variance", wrong=wrong)


def _moments(p: np.ndarray, grad_log_p: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean and total variance of weight · ∇ log p over the texts."""
    each = weights[:, None] * grad_log_p
    mean = p @ each
    return mean, float(p @ ((each - mean) ** 2).sum(axis=1))


@exercise("02b.5", "Mean of all or of the others?", minutes=5, difficulty=2)
def others(answer: Callable) -> None:
    """`answer(rewards)`: of one group (G,) → each reward minus the mean of the others (G,)."""
    drawn = np.random.default_rng(5).uniform(-1, 1, 7).round(2)
    for rewards in (np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.4, 1.0]), drawn):
        count, apart = len(rewards), rewards - rewards.mean()
        wrong = {
            "this is the mean of all: leave the sample itself out": apart,
            "the factor is turned round: G / (G − 1), not (G − 1) / G": apart * (count - 1) / count,
            "the others are G − 1, not G": rewards - (rewards.sum() - rewards) / count,
            "this is the mean of the others; subtract it from the reward": (rewards.sum() - rewards) / (count - 1),
            "this divides by the standard deviation too": apart / (rewards.std(ddof=1) + 1e-4),
        }
        expect(answer(rewards.copy()), apart * count / (count - 1), f"rewards {rewards.tolist()}", wrong=wrong)


@exercise("02b.6", "Train it in twenty lines", minutes=10, difficulty=3)
def train(answer: Callable) -> None:
    """`answer(logits, rewards, rng)`: (13,) each → logits of a policy that gets 0.9 of the best reward on average."""
    rng = np.random.default_rng(6)
    for offset in (0.0, 50.0):
        rewards = rng.permutation(np.array([1.0] + [0.5] * 4 + [0.2] * 4 + [0.0] * 4))
        logits = rng.normal(scale=0.5, size=TEXTS)
        given = f"thirteen texts, rewards from {offset:g} to {offset + 1:g}"
        source = np.random.default_rng(0)
        found = np.asarray(answer(logits.copy(), rewards + offset, source), dtype=float)
        if found.shape != (TEXTS,):
            raise WrongAnswer(f"for {given}: expected {TEXTS} logits, found an array of shape {found.shape}")
        start, end = float(_softmax(logits) @ rewards), float(_softmax(found) @ rewards)
        if end > 0.9 and source.bit_generator.state == np.random.default_rng(0).bit_generator.state:
            idea = "`rng` drew no text: the exact gradient needs a list of all texts, which nobody has of a real policy"
            raise WrongAnswer(f"for {given}: expected texts drawn with `rng`, found none", idea)
        if end > 0.9:
            continue
        if np.isnan(end):
            idea = "the logits are NaN: the steps are too long"
        elif np.allclose(found, logits):
            idea = "the logits are what they were: no step was made"
        elif end < start and not offset:
            idea = "J has fallen: does the step go up, and is the probability of the text drawn the one that rises?"
        elif _softmax(found).max() > 0.9:
            idea = "it settled on a wrong text: without a baseline whatever is drawn becomes likelier"
        else:
            idea = "it climbs, and too little: more steps, longer ones, or more texts a step"
        reached = f"found {offset + end:.2f}, at the start {offset + start:.2f}"
        raise WrongAnswer(f"for {given}: expected J above {offset + 0.9:g}, {reached}", idea)
