"""Recommendation: which of several methods to use, from who was right on which held-back row.

The rule, for methods in order of cost, the first of them the baseline:

1. A method is shown to be better than the baseline where McNemar's exact test says so after Holm's
   correction over all methods that were tried (p < 0.05), and the 95 % interval of its paired gain
   lies above 0.
2. Where none is, the baseline is recommended, and nothing else is claimed.
3. Among those that are, the best has most rows right. The cheapest is recommended that is not
   shown to be worse than the best: by the same test, corrected over all pairs of them, so that it
   does not matter that the best was picked for its score.

Rows that a single label holds tell no method from a constant answer, so nothing is shown on them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.stats import binom, norm

from icrouting.report.metrics import SIGNIFICANCE, Estimate, difference_of, holm

# How often a gain is to be shown where a number of rows is said to show it.
POWER = 0.8

Outcomes = Mapping[str, Bool[np.ndarray, "n_rows"]]


@dataclass(frozen=True)
class Recommendation:
    """Which method to use, and how sure that is.

    Attributes:
        method: the one that is recommended.
        baseline: the cheapest, which all are held against.
        n_rows: held-back rows that every method answered.
        n_tried: methods that were held against the baseline.
        is_shown: whether `method` is shown to be better than the baseline.
        gain: its paired gain on the baseline.
        p_values: by method McNemar's against the baseline, corrected over the methods.
        best: of those that are shown to be better, the one with most rows right.
        lead: how far `best` is ahead of `method`.
        largest: the method with the largest gain, shown or not.
        largest_gain: that gain.
        gain_to_show: the gain that these rows show four times in five; None where they show none.
        rows_to_show: the rows on which a gain as large as the largest would be shown four times in
            five; None where no method gained.
        has_one_label: whether all rows have one label, so that nothing can be shown.
    """

    method: str
    baseline: str
    n_rows: int
    n_tried: int
    is_shown: bool
    gain: Estimate
    p_values: dict[str, float]
    best: str
    lead: Estimate
    largest: str
    largest_gain: float
    gain_to_show: float | None
    rows_to_show: int | None
    has_one_label: bool


def recommend(outcomes: Outcomes, labels: Int[np.ndarray, "n_rows"]) -> Recommendation:
    """Returns which method to use, by the rule at the head of this room.

    Args:
        outcomes: by method whether it was right on each held-back row, the same rows for all; in
            order of cost, the baseline first.
        labels: the rows' right options.

    Raises:
        ValueError: there is no method or no row, or the methods' rows are not as many.
    """
    _check(outcomes, labels)
    names = list(outcomes)
    baseline = names[0]
    others = names[1:]
    has_one_label = len(np.unique(labels)) == 1
    p_values = _corrected([(name, baseline) for name in others], outcomes)
    shown = []
    for name in others:
        is_clear = p_values[name, baseline] < SIGNIFICANCE
        if is_clear and not has_one_label and _lead(outcomes, name, baseline).low > 0:
            shown.append(name)
    best = max(shown, key=lambda name: outcomes[name].sum(), default=baseline)
    method = _cheapest_as_good(outcomes, shown, best)
    largest = max(others, key=lambda name: outcomes[name].sum(), default=baseline)
    largest_gain = _lead(outcomes, largest, baseline).value
    moved = float(np.mean(outcomes[largest] != outcomes[baseline]))
    rows = None
    if largest_gain > 0:
        rows = rows_to_show(largest_gain, moved, len(others))
    return Recommendation(
        method=method,
        baseline=baseline,
        n_rows=len(labels),
        n_tried=len(others),
        is_shown=bool(shown),
        gain=_lead(outcomes, method, baseline),
        p_values={name: p_values[name, baseline] for name in others},
        best=best,
        lead=_lead(outcomes, best, method),
        largest=largest,
        largest_gain=largest_gain,
        gain_to_show=gain_to_show(len(labels), moved, len(others)),
        rows_to_show=rows,
        has_one_label=has_one_label,
    )


def rows_to_show(gain: float, moved: float, n_tried: int) -> int:
    """Returns about how many rows show a gain four times in five, whatever else is tried.

    (z_a sqrt(d) + z_b sqrt(d - g^2))^2 / g^2 rows for a gain g where a share d of the answers
    changes between right and wrong (Connor 1987), with a the level of the first step of Holm's
    correction.

    Args:
        gain: in accuracy, above 0.
        moved: the share of rows on which one of the two methods alone is right.
        n_tried: methods that are held against the baseline.
    """
    # Fewer answers than the gain cannot have moved.
    moved = max(moved, gain)
    z_level = norm.isf(SIGNIFICANCE / 2 / max(1, n_tried))
    z_power = norm.ppf(POWER)
    root = z_level * math.sqrt(moved) + z_power * math.sqrt(moved - gain**2)
    return math.ceil(root**2 / gain**2)


def gain_to_show(n_rows: int, moved: float, n_tried: int) -> float | None:
    """Returns the least gain, in whole points, that a number of rows shows four times in five.

    None where they show none; see `rows_to_show`.
    """
    for percent in range(1, 101):
        if rows_to_show(percent / 100, moved, n_tried) <= n_rows:
            return percent / 100
    return None


def _check(outcomes: Outcomes, labels: Int[np.ndarray, "n_rows"]) -> None:
    n_rows = {name: len(is_right) for name, is_right in outcomes.items()}
    if not n_rows or not len(labels):
        raise ValueError("a recommendation needs the answers of one method or more on some rows")
    if set(n_rows.values()) != {len(labels)}:
        raise ValueError(
            f"a recommendation needs answers of all methods on the same {len(labels)} rows, got "
            f"{n_rows}"
        )


def _cheapest_as_good(outcomes: Outcomes, shown: Sequence[str], best: str) -> str:
    """The cheapest of those that are shown to be better which the best does not clearly beat."""
    pairs = list(itertools.combinations(shown, 2))
    p_values = _corrected(pairs, outcomes)
    for name in shown:
        if name == best:
            break
        is_worse = p_values[name, best] < SIGNIFICANCE and _lead(outcomes, best, name).low > 0
        if not is_worse:
            return name
    return best


def _corrected(
    pairs: Sequence[tuple[str, str]], outcomes: Outcomes
) -> dict[tuple[str, str], float]:
    """Holm-corrected p-values of McNemar's exact test, two-sided, of pairs of methods."""
    if not pairs:
        return {}
    changes = np.stack([_changes(outcomes, first, second) for first, second in pairs])
    wins = (changes > 0).sum(axis=1)
    losses = (changes < 0).sum(axis=1)
    one_sided = binom.cdf(np.minimum(wins, losses), wins + losses, 0.5)
    p_values = holm(pd.Series(np.minimum(1.0, 2 * one_sided)))
    return dict(zip(pairs, p_values.tolist(), strict=True))


def _lead(outcomes: Outcomes, first: str, second: str) -> Estimate:
    """How far the first method is ahead of the second, in accuracy."""
    changes = _changes(outcomes, first, second)
    return difference_of(changes, np.arange(len(changes)))


def _changes(outcomes: Outcomes, first: str, second: str) -> Float[np.ndarray, "n_rows"]:
    """1 on the rows where the first method alone is right, -1 where the second is, else 0."""
    return outcomes[first].astype(float) - outcomes[second].astype(float)
