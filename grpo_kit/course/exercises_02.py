"""The exercises of notebook 02: log-probabilities of what was written, the mask, and a temperature that differs."""

from collections.abc import Callable

from grpo_kit.course.exercise import WrongAnswer, exercise, expect

PROMPT, WRITTEN, WORDS = 3, 4, 6


@exercise("02.1", "Log-probabilities, shifted by one", minutes=10, difficulty=2)
def log_probabilities(answer: Callable) -> None:
    """`answer(logits, ids, prompt_length)`: (N, L, V), (N, L) → log-probabilities of what follows the prompt."""
    import torch

    source = torch.Generator().manual_seed(1)
    for rows in (1, 3):
        logits = torch.randn(rows, PROMPT + WRITTEN, WORDS, generator=source)
        ids = torch.randint(WORDS, (rows, PROMPT + WRITTEN), generator=source)
        given = f"{rows} × {PROMPT + WRITTEN} tokens, {PROMPT} of them the prompt"

        def picked(scores: torch.Tensor, shift: int, ids: torch.Tensor = ids, start: int = PROMPT) -> torch.Tensor:
            moved = scores.roll(shift, dims=1)[:, start:]
            return moved.gather(2, ids[:, start:].unsqueeze(2)).squeeze(2)

        logprobs = logits.log_softmax(dim=-1)
        wrong = {
            "not shifted: the logits at a token are about the next token": picked(logprobs, 0),
            "shifted to the wrong side": picked(logprobs, -1),
            "these are logits: take the log-softmax over the vocabulary": picked(logits, 1),
            "these are probabilities: the logarithm is missing": picked(logits.softmax(dim=-1), 1),
            "the softmax is over the places: it must be over the vocabulary": picked(logits.log_softmax(dim=1), 1),
            "the prompt's tokens were not written by the policy": picked(logprobs, 1, start=1),
            "this is the sum over the tokens: one number for each token is asked for": picked(logprobs, 1).sum(dim=1),
        }
        expect(answer(logits.clone(), ids.clone(), PROMPT), picked(logprobs, 1), given, wrong=wrong, tolerance=1e-4)


@exercise("02.2", "Through the end token, no further", minutes=5, difficulty=1)
def mask(answer: Callable) -> None:
    """`answer(ids, end)`: (N, T) → True where a token counts: through the first end token."""
    import torch

    for rows in ([[1, 9, 2, 9], [3, 2, 1, 9]], [[4, 9, 9, 9], [5, 6, 7, 8], [9, 9, 9, 9]]):
        ids = torch.tensor(rows)
        is_end = ids == 9
        right = is_end.cumsum(dim=1) - is_end.int() == 0
        wrong = {
            "the end token is not counted: to stop was a choice too": is_end.cumsum(dim=1) == 0,
            "only end tokens are left out: what stands behind the first one is padding": ~is_end,
            "padding counts too": torch.ones_like(is_end),
            "this is the mask of the padding: turn it round": ~right,
            "a row without an end token was cut: all of it counts": right & is_end.any(dim=1, keepdim=True),
        }
        found = answer(ids.clone(), 9)
        found = found.bool() if hasattr(found, "bool") else found
        expect(found, right, f"ids {rows}, end token 9", wrong=wrong)


@exercise("02.3", "The ratio of a wrong temperature", minutes=10, difficulty=3)
def wrong_temperature(answer: Callable) -> None:
    """`answer(logits, ids, sampled_at, scored_at)`: (T, V), (T,) → the ratio of each token before any step."""
    import torch

    source = torch.Generator().manual_seed(3)
    for sampled_at, scored_at in ((2.0, 1.0), (1.0, 0.5), (1.0, 1.0)):
        logits = 2 * torch.randn(WRITTEN, WORDS, generator=source)
        ids = torch.randint(WORDS, (WRITTEN,), generator=source)
        given = f"{WRITTEN} tokens sampled at temperature {sampled_at:g} and scored at {scored_at:g}"

        def picked(scores: torch.Tensor, ids: torch.Tensor = ids) -> torch.Tensor:
            return scores.gather(1, ids.unsqueeze(1)).squeeze(1)

        new, old = (picked((logits / t).log_softmax(dim=-1)) for t in (scored_at, sampled_at))
        unnormed = picked(logits / scored_at - logits / sampled_at).exp()
        times = picked((logits * scored_at).softmax(dim=-1)) / picked((logits * sampled_at).softmax(dim=-1))
        wrong = {
            "the ratio is turned round: new by old, scored by sampled": (old - new).exp(),
            "this is the log of the ratio": new - old,
            "this is a difference of probabilities: divide": new.exp() - old.exp(),
            "the temperature divides the logits, it does not multiply them": times,
            "the logits' ratio alone: both softmaxes have sums of their own": unnormed,
            "no step was made, and still the ratio is not 1": torch.ones(WRITTEN),
        }
        found = answer(logits.clone(), ids.clone(), sampled_at, scored_at)
        if hasattr(found, "dim") and found.dim() == 0:
            raise WrongAnswer(f"for {given}: expected {WRITTEN} ratios, one a token, found one number")
        expect(found, (new - old).exp(), given, wrong=wrong, tolerance=1e-4)
