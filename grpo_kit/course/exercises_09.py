"""Checks of the exercise of 09_ablations: intervals with pairs and without, and which of them to use."""

from collections.abc import Callable

from scipy import stats

from grpo_kit.course.exercise import WrongAnswer, exercise, expect


@exercise("09.1", "Paired or not? Decide before you look", minutes=10, difficulty=4)
def check_half_widths(half_widths: Callable, choose: Callable) -> None:
    """Both half-widths for several seeds and correlations, then the choice between them."""
    for n, s, r in ((3, 6.0, 0.3), (5, 5.7, -0.4), (10, 4.0, 0.3), (8, 2.0, 0.9)):
        given = f"{n} seeds, s = {s}, r = {r}"
        found = half_widths(n, s, r)
        if len(found) != 2:
            raise WrongAnswer(f"for {given}: expected two numbers, found {len(found)}")
        t_pairs, t_two = stats.t.ppf(0.975, [n - 1, 2 * n - 2])
        error, shared = s * (2 / n) ** 0.5, (1 - r) ** 0.5
        pairs, two = t_pairs * error * shared, t_two * error
        wrong = {
            "n pairs have n − 1 degrees of freedom, not 2n − 2": t_two * error * shared,
            "the correlation is missing: a difference has the variance 2 s² (1 − r)": t_pairs * error,
            "1 − r belongs under the root": t_pairs * error * (1 - r),
            "these are the two samples; pairs come first": two,
        }
        expect(found[0], pairs, f"{given}, paired", wrong=wrong | _slips(pairs, n, t_pairs))
        wrong = {
            "two samples of n have 2n − 2 degrees of freedom, not n − 1": t_pairs * error,
            "two samples share nothing: the correlation does not enter": two * shared,
        }
        expect(found[1], two, f"{given}, two samples", wrong=wrong | _slips(two, n, t_two))
    for n, r in ((3, 0.3), (3, 0.7), (10, 0.3), (10, 0.1), (2, 0.8), (20, 0.1), (5, -0.4)):
        t_pairs, t_two = stats.t.ppf(0.975, [n - 1, 2 * n - 2])
        best = "paired" if t_pairs * (1 - r) ** 0.5 < t_two else "two samples"
        wrong = {
            "pairs cost degrees of freedom: a positive correlation alone is not enough": "paired" if r > 0 else None,
            "with enough correlation pairs are narrower": "two samples",
            "a negative correlation makes pairs wider": "paired",
        }
        expect(choose(n, r), best, f"the choice for {n} seeds, r = {r}", wrong=wrong)


def _slips(right: float, n: int, t: float) -> dict[str, float]:
    """Misconceptions about either half-width."""
    return {
        "1.96 stands in place of t": right / t * 1.96,
        "the variances of both settings add up: a 2 is missing": right / 2**0.5,
        "divided by n, not by √n": right / n**0.5,
    }
