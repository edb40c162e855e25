"""How far what was found lies from what was expected, as a number and in words."""

import math

import torch

ROUNDING = 1e-5  # relative: cases are float64, but a function may well compute in float32


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value; infinite where something is not a number."""
    if torch.equal(found, expected):
        return 0.0
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
    return math.inf if math.isnan(difference) else difference


def percent(share: float) -> str:
    """A relative difference in words."""
    if not math.isfinite(share):
        return "nan"
    if share >= 10:
        return f"{share:.2g} times its size"
    return f"{share:.0%}" if share >= 0.005 else f"{100 * share:.1g}%"


def exactly(share: float) -> str:
    """Whether nothing differed at all, as the end of a sentence."""
    return ", bit for bit" if share == 0 else ""


def within(settings: dict[str, object]) -> str:
    """Under which settings something was found, as the end of a sentence; nothing where there are none."""
    names = [value for value in settings.values() if isinstance(value, str)]
    return f" ({', '.join(names)})" if names else ""
