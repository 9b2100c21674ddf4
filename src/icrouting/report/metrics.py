"""Metrics: accuracy, macro-F1, paired gains and chance levels with their intervals, from records alone.

All seeds ask the same test items, which a method without randomness answers alike. So the unit of every interval
and test is the item, and they hold for the draws that were made: three are too few to estimate how draws differ.
`records` is what `frame` makes of them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import binom, binomtest

from icrouting.evaluation.records import Record

Z95 = 1.959963984540054
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Estimate:
    """A fraction, its 95 % interval and the `n` records (tasks, for a mean over tasks) behind it; NaN where n is 0."""

    value: float
    low: float
    high: float
    n: int

    def columns(self, name: str) -> dict[str, float]:
        """The estimate as columns of a frame."""
        return {
            name: self.value,
            f"{name}_low": self.low,
            f"{name}_high": self.high,
            f"{name}_n": self.n,
        }


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Returns a line a record: its fields, whether it is `right` (1.0 or 0.0), `n_options`, its `item` and `pair`."""
    lines = pd.DataFrame(
        [vars(record) for record in records], columns=[field.name for field in fields(Record)]
    )
    lines = lines.assign(
        right=(lines.label == lines.prediction) * 1.0, n_options=lines.option_logits.map(len)
    )
    item = list(zip(lines.task, lines["index"], strict=True))
    return lines.assign(item=item, pair=list(zip(item, lines.seed, strict=True)))


def accuracy(records: pd.DataFrame) -> Estimate:
    """Returns the share of right predictions with Wilson's score interval.

    Where items repeat over seeds, Wilson's n is the effective sample size (`effective_n`). Differs from a
    cluster bootstrap in that it needs no draws and keeps its width when every prediction is right.
    """
    share, effective = (
        float(records.right.mean()),
        effective_n(records.right.to_numpy(), _items(records)),
    )
    spread = Z95**2 / effective
    centre = (share + spread / 2) / (1 + spread)
    half = (
        Z95 / (1 + spread) * math.sqrt(share * (1 - share) / effective + spread / (4 * effective))
    )
    return Estimate(
        share,
        min(share, max(0.0, centre - half)),
        max(share, min(1.0, centre + half)),
        len(records),
    )


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


def macro_f1(records: pd.DataFrame, rng: np.random.Generator, n_draws: int = 1000) -> Estimate:
    """Returns the mean F1 over classes with a percentile bootstrap over items.

    A class that neither occurs nor is predicted is left out of the mean.
    """
    items, options = _items(records), np.eye(records.n_options.max())
    label, prediction = options[records.label], options[records.prediction]
    counts = np.zeros((items.max() + 1, 2, len(options)))
    np.add.at(counts, items, np.stack([label * prediction, label + prediction], axis=1))
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


def paired(records: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Returns item, seed and `change` (1 won, -1 lost, else 0) of each pair on the same task, seed and index."""
    before = records.pair.map(dict(zip(baseline.pair, baseline.right, strict=True)))
    return records[["item", "seed"]].assign(change=records.right - before).dropna()


def difference(records: pd.DataFrame, baseline: pd.DataFrame) -> Estimate:
    """Returns the paired difference in accuracy with the interval of Agresti and Min (2005).

    With b pairs won and c lost of n, half a pair is added to each of the four outcomes:
    (b - c) / (n + 2) +- z sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2).
    Where items repeat over seeds, b, c and n shrink to the effective sample size. `value` is (b - c) / n;
    there is none without a common item.
    """
    pairs = paired(records, baseline)
    if pairs.empty:
        return NOTHING
    changes = pairs.change.to_numpy()
    n = effective_n(changes, _items(pairs)) + 2
    net, moved = float(changes.mean()) * (n - 2), float(np.abs(changes).mean()) * (n - 2)
    half = Z95 * math.sqrt(moved + 1 - net**2 / n) / n
    value = float(changes.mean())
    return Estimate(
        value,
        min(value, max(-1.0, net / n - half)),
        max(value, min(1.0, net / n + half)),
        len(pairs),
    )


def mcnemar(records: pd.DataFrame, baseline: pd.DataFrame) -> float:
    """Returns the two-sided p-value of McNemar's exact test: under no effect every change has either sign alike.

    Where items repeat over seeds, the sum of an item's changes has either sign alike, and weighs by its size.
    """
    changes = paired(records, baseline).groupby("item", sort=False).change.sum().to_numpy(dtype=int)
    law = np.ones(1)  # of the total, from its least value on
    for size, count in enumerate(np.bincount(np.abs(changes))[1:], start=1):
        flips = np.zeros(2 * size * count + 1)
        flips[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        law = np.convolve(law, flips)
    return min(
        1.0, float(law[np.abs(np.arange(len(law)) - len(law) // 2) >= abs(changes.sum())].sum())
    )


def holm(p_values: pd.Series) -> pd.Series:
    """Returns Holm's corrected p-values: all below 0.05 hold together at 5 %. NaN is no test and stays NaN."""
    ranked = p_values.dropna().sort_values(kind="stable")
    corrected = (ranked * np.arange(len(ranked), 0, -1)).clip(upper=1.0).cummax()
    return corrected.reindex(p_values.index)


def mean(estimates: pd.DataFrame, name: str) -> Estimate:
    """Returns the unweighted mean of the independent estimates called `name`, `n` being their number.

    Distances to each end add in squares (Zou and Donner, 2008), which keeps Wilson's asymmetry. The tasks
    are taken as given: the interval says nothing about tasks that were not run.
    """
    values, lows, highs = (
        estimates[column].dropna() for column in (name, f"{name}_low", f"{name}_high")
    )
    if not (n := len(values)):
        return NOTHING
    value = sum(values) / n
    return Estimate(
        value,
        value - math.hypot(*(values - lows)) / n,
        value + math.hypot(*(highs - values)) / n,
        n,
    )


def chance(records: pd.DataFrame) -> float:
    """Returns the expected accuracy of guessing: 1 / number of options, averaged over records."""
    return float((1 / records.n_options).mean())


def majority(records: pd.DataFrame) -> float:
    """Returns the accuracy of always giving the most frequent label of the tested items."""
    return float(records.drop_duplicates("item").label.value_counts(normalize=True).max())


def is_above_chance(records: pd.DataFrame) -> bool:
    """Returns whether a one-sided binomial test puts accuracy above `chance` (p < 0.05, uncorrected).

    Chance and not the majority level, which is known only from the tested labels themselves; a constant
    answer can pass on unbalanced items, so reports show both. Items with unequal numbers of options make
    the true spread smaller than the binomial one, so the test errs towards "not above".
    """
    n = max(1, math.floor(effective_n(records.right.to_numpy(), _items(records))))
    n_right = math.floor(float(records.right.mean()) * n + 1e-9)
    return bool(binomtest(n_right, n, chance(records), alternative="greater").pvalue < SIGNIFICANCE)


def confusion(records: pd.DataFrame) -> Int[np.ndarray, "n_options n_options"]:
    """Returns counts by label (rows) and prediction (columns)."""
    counts = np.zeros((records.n_options.max(),) * 2, dtype=int)
    np.add.at(counts, (records.label, records.prediction), 1)
    return counts


def _items(records: pd.DataFrame) -> Int[np.ndarray, "n"]:
    """The number of each record's item, counted from 0 as they come."""
    if records.empty:
        raise ValueError("no records to measure")
    return pd.factorize(records["item"])[0]
