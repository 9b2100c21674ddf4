"""Metrics: accuracy, macro-F1, paired gains and chance levels with their intervals, from records alone.

Several seeds may draw the same test item, and a method without randomness then answers it alike each
time. So the unit of every interval and test is the item: one that was met three times is not three items.
The intervals hold for the seeds that were run; three seeds are too few to estimate how seeds differ.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest

from icrouting.records import Record

Z95 = 1.959963984540054
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: the figure; a fraction, not a percentage.
        low: lower end of the interval.
        high: upper end of the interval.
        n: records behind the figure (tasks, for a mean over tasks).
    """

    value: float
    low: float
    high: float
    n: int


def accuracy(records: Sequence[Record]) -> Estimate:
    """Returns the share of right predictions with Wilson's interval.

    Where items repeat over seeds, Wilson's n is the effective sample size (`effective_n`). Differs from a
    cluster bootstrap in that it needs no draws and keeps its width when every prediction is right.
    """
    right, items = _outcomes(records)
    return wilson(float(right.mean()), effective_n(right, items), n=len(records))


def wilson(share: float, effective: float, n: int) -> Estimate:
    """Returns Wilson's score interval of a share."""
    spread = Z95**2 / effective
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / effective + spread / (4 * effective))
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n)


def effective_n(values: Float[np.ndarray, "n"], items: Int[np.ndarray, "n"]) -> float:
    """Returns how many independent records carry the same information on the mean.

    n / deff, where deff is the variance clustered by item over the variance of independent records
    (Kish's design effect). It lies between the size at full correlation within items, n^2 / sum(m_i^2)
    with m_i records of item i, and n.
    """
    n, sizes = len(values), np.bincount(items)
    floor = float(n**2 / (sizes**2).sum())
    residuals = values - values.mean()
    clustered = (np.bincount(items, weights=residuals) ** 2).sum()
    if clustered == 0 or len(sizes) == 1:
        return floor
    deff = clustered / (residuals**2).sum() * len(sizes) / (len(sizes) - 1)
    return float(np.clip(n / deff, floor, n))


def macro_f1(records: Sequence[Record], rng: np.random.Generator, n_draws: int = 1000) -> Estimate:
    """Returns the mean F1 over classes with a percentile bootstrap over items.

    A class that neither occurs nor is predicted is left out of the mean.
    """
    _, items = _outcomes(records)
    counts = np.zeros((int(items.max()) + 1, 2, max(len(record.option_logits) for record in records)))
    for item, record in zip(items, records, strict=True):
        counts[item, 0, record.label] += record.label == record.prediction
        counts[item, 1, record.label] += 1
        counts[item, 1, record.prediction] += 1
    n_items = len(counts)
    weights = rng.multinomial(n_items, np.full(n_items, 1 / n_items), size=n_draws)
    draws = _mean_f1(np.tensordot(weights, counts, axes=1))
    value = float(_mean_f1(counts.sum(axis=0)[None])[0])
    low, high = (float(end) for end in np.percentile(draws, [2.5, 97.5]))
    return Estimate(value, min(low, value), max(high, value), len(records))


def _mean_f1(counts: Float[np.ndarray, "draws 2 n_options"]) -> Float[np.ndarray, "draws"]:
    """Macro-F1 from hits and total, the occurrences plus predictions: F1 = 2 hits / total."""
    hits, total = counts[:, 0], counts[:, 1]
    return (2 * hits / np.maximum(total, 1)).sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1)


def paired(records: Sequence[Record], baseline: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Returns the pairs of records on the same task, seed and index."""
    others = {record.key[1:]: record for record in baseline}
    return [(record, others[record.key[1:]]) for record in records if record.key[1:] in others]


def difference(records: Sequence[Record], baseline: Sequence[Record]) -> Estimate:
    """Returns the paired difference in accuracy with the interval of Agresti and Min (2005).

    With b pairs won and c lost of n, half a pair is added to each of the four outcomes:
    (b - c) / (n + 2) +- z sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2).
    Where items repeat over seeds, b, c and n shrink to the effective sample size. `value` is (b - c) / n.
    """
    pairs = paired(records, baseline)
    if not pairs:
        raise ValueError("no test item in common with the baseline: run both on the same tasks and seeds")
    mine, theirs = zip(*pairs, strict=True)
    (right, items), (right_before, _) = _outcomes(mine), _outcomes(theirs)
    changes = right - right_before
    n = effective_n(changes, items) + 2
    net, moved = float(changes.mean()) * (n - 2), float(np.abs(changes).mean()) * (n - 2)
    half = Z95 * math.sqrt(moved + 1 - net**2 / n) / n
    value = float(changes.mean())
    return Estimate(value, min(value, max(-1.0, net / n - half)), max(value, min(1.0, net / n + half)), len(pairs))


def mcnemar(records: Sequence[Record], baseline: Sequence[Record]) -> float:
    """Returns the two-sided p-value of McNemar's exact test.

    Each item votes once: won or lost over all its seeds together. With one seed this is McNemar's test,
    with several it stays exact, because under no effect every item's sign is a fair coin.
    """
    votes: dict[tuple[str, int], int] = defaultdict(int)
    for mine, theirs in paired(records, baseline):
        votes[mine.task, mine.index] += (mine.prediction == mine.label) - (theirs.prediction == theirs.label)
    n_won, n_lost = (sum(sign * vote > 0 for vote in votes.values()) for sign in (1, -1))
    return float(binomtest(n_won, n_won + n_lost).pvalue) if n_won + n_lost else 1.0


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Returns Holm's corrected p-values, in the order given: all below 0.05 hold together at 5 %."""
    corrected = [1.0] * len(p_values)
    worst = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = worst
    return tuple(corrected)


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the unweighted mean of independent estimates, `n` being their number.

    Distances to each end add in squares (Zou and Donner, 2008), which keeps Wilson's asymmetry. The tasks
    are taken as given: the interval says nothing about tasks that were not run.
    """
    n = len(estimates)
    value = sum(estimate.value for estimate in estimates) / n
    below = math.hypot(*(estimate.value - estimate.low for estimate in estimates)) / n
    above = math.hypot(*(estimate.high - estimate.value for estimate in estimates)) / n
    return Estimate(value, value - below, value + above, n)


def collapse(gains: Sequence[Estimate], p_values: Sequence[float]) -> tuple[int, int]:
    """Returns on how many tasks a method is below the baseline, and on how many significantly.

    As the paper counts it (section 7): a gain below 0; the p-values are the corrected ones.
    """
    lost = [p_value for gain, p_value in zip(gains, p_values, strict=True) if gain.value < 0]
    return len(lost), sum(p_value < SIGNIFICANCE for p_value in lost)


def chance(records: Sequence[Record]) -> float:
    """Returns the expected accuracy of guessing: 1 / number of options, averaged over records."""
    return float(np.mean([1 / len(record.option_logits) for record in records]))


def majority(records: Sequence[Record]) -> float:
    """Returns the accuracy of always giving the most frequent label of the tested items."""
    labels = {(record.task, record.index): record.label for record in records}
    return max(Counter(labels.values()).values()) / len(labels)


def is_above_chance(records: Sequence[Record]) -> bool:
    """Returns whether a one-sided binomial test puts accuracy above `chance` (p < 0.05, uncorrected).

    Chance and not the majority level, which is known only from the tested labels themselves; a constant
    answer can pass on unbalanced items, so reports show both. Items with unequal numbers of options make
    the true spread smaller than the binomial one, so the test errs towards "not above".
    """
    right, items = _outcomes(records)
    n = max(1, math.floor(effective_n(right, items)))
    n_right = math.floor(float(right.mean()) * n + 1e-9)
    return bool(binomtest(n_right, n, chance(records), alternative="greater").pvalue < SIGNIFICANCE)


def confusion(records: Sequence[Record]) -> tuple[tuple[int, ...], ...]:
    """Returns counts by label (rows) and prediction (columns)."""
    n_options = max(len(record.option_logits) for record in records)
    counts = Counter((record.label, record.prediction) for record in records)
    return tuple(tuple(counts[label, guess] for guess in range(n_options)) for label in range(n_options))


def _outcomes(records: Sequence[Record]) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """1 for each right record and 0 for each wrong one; the number of its item, counted from 0."""
    if not records:
        raise ValueError("no records to measure")
    numbers: dict[tuple[str, int], int] = {}
    items = [numbers.setdefault((record.task, record.index), len(numbers)) for record in records]
    right = [record.prediction == record.label for record in records]
    return np.array(right, dtype=np.float64), np.array(items)
