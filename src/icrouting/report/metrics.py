"""Metrics: accuracy, macro-F1, paired gains and chance levels with their intervals.

All are computed from records alone; `records` is what `frame` makes of them. All seeds ask the
same test items, which a method without randomness answers alike. So the unit of every interval
and test is the item, and they hold for the draws that were made: three are too few to estimate
how draws differ.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import binom, binomtest

from icrouting.evaluation.records import Record

# The 97.5 % quantile of the normal distribution, for two-sided intervals of 95 %.
Z95 = 1.959963984540054
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Estimate:
    """A fraction and its 95 % interval; NaN where `n` is 0.

    Attributes:
        n: the records behind it (for a mean over tasks: the tasks).
    """

    value: float
    low: float
    high: float
    n: int

    def columns(self, name: str) -> dict[str, float]:
        """Returns the estimate as columns of a frame."""
        return {
            name: self.value,
            f"{name}_low": self.low,
            f"{name}_high": self.high,
            f"{name}_n": self.n,
        }


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Returns a line a record: its fields and what follows from them.

    These are whether it is `right` (1.0 or 0.0), its `n_options`, its `item` (task and index)
    and its `pair` (item and seed).
    """
    values = [vars(record) for record in records]
    # The columns are named so that a run without records has them too.
    lines = pd.DataFrame(values, columns=[field.name for field in fields(Record)])
    lines["right"] = (lines.label == lines.prediction) * 1.0
    lines["n_options"] = lines.option_logits.map(len)
    items = list(zip(lines.task, lines["index"], strict=True))
    pairs = list(zip(items, lines.seed, strict=True))
    return lines.assign(item=items, pair=pairs)


def accuracy(records: pd.DataFrame) -> Estimate:
    """Returns the share of right predictions with Wilson's score interval.

    With share p of n, the interval is
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    Where items repeat over seeds, n is the effective sample size (`effective_n`). Differs from a
    cluster bootstrap in that it needs no draws and keeps its width when every prediction is right.

    Raises:
        ValueError: there are no records.
    """
    share = float(records.right.mean())
    n = effective_n(records.right.to_numpy(), _item_numbers(records))
    spread = Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    variance = share * (1 - share) / n + spread / (4 * n)
    half_width = Z95 / (1 + spread) * math.sqrt(variance)
    # A share of 0 or 1 is an end itself, which rounding may miss.
    low = min(share, max(0.0, centre - half_width))
    high = max(share, min(1.0, centre + half_width))
    return Estimate(share, low, high, len(records))


def effective_n(values: Float[np.ndarray, "n"], items: Int[np.ndarray, "n"]) -> float:
    """Returns how many independent records carry the same information on the mean.

    n / deff, where deff is the variance clustered by item over the variance of independent records
    (Kish's design effect). It lies between the size at full correlation within items,
    n^2 / sum(m_i^2) with m_i records of item i, and n.
    """
    n = len(values)
    item_sizes = np.bincount(items)
    n_items = len(item_sizes)
    fully_correlated = float(n**2 / (item_sizes**2).sum())
    residuals = values - values.mean()
    item_residuals = np.bincount(items, weights=residuals)
    clustered = (item_residuals**2).sum()
    # Without any variance between items there is nothing to estimate deff from: the cautious end.
    if clustered == 0 or n_items == 1:
        return fully_correlated
    independent = (residuals**2).sum()
    deff = clustered / independent * n_items / (n_items - 1)
    return float(np.clip(n / deff, fully_correlated, n))


def macro_f1(records: pd.DataFrame, rng: np.random.Generator, n_draws: int = 1000) -> Estimate:
    """Returns the mean F1 over classes with a percentile bootstrap over items.

    A class that neither occurs nor is predicted is left out of the mean.

    Raises:
        ValueError: there are no records.
    """
    items = _item_numbers(records)
    n_items = items.max() + 1
    n_options = records.n_options.max()
    one_hot = np.eye(n_options)
    labels = one_hot[records.label]
    predictions = one_hot[records.prediction]
    counts = np.zeros((n_items, 2, n_options))
    np.add.at(counts, items, np.stack([labels * predictions, labels + predictions], axis=1))
    # Items are drawn with all their seeds, because the seeds' answers to one item are not
    # independent. How often each item is drawn is multinomial, so no item is copied.
    item_weights = rng.multinomial(n_items, np.full(n_items, 1 / n_items), size=n_draws)
    draws = _mean_f1(np.tensordot(item_weights, counts, axes=1))
    value = float(_mean_f1(counts.sum(axis=0)[None])[0])
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, min(float(low), value), max(float(high), value), len(records))


def _mean_f1(counts: Float[np.ndarray, "draws 2 n_options"]) -> Float[np.ndarray, "draws"]:
    """Macro-F1 from hits and total, the occurrences plus predictions: F1 = 2 hits / total."""
    hits = counts[:, 0]
    totals = counts[:, 1]
    f1 = 2 * hits / np.maximum(totals, 1)
    n_classes = (totals > 0).sum(axis=1)
    return f1.sum(axis=1) / np.maximum(n_classes, 1)


def paired(records: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Returns item, seed and `change` of each pair on the same task, seed and index.

    `change` is 1 where the method won the pair, -1 where it lost it, else 0.
    """
    baseline_right = dict(zip(baseline.pair, baseline.right, strict=True))
    changes = records.right - records.pair.map(baseline_right)
    return records[["item", "seed"]].assign(change=changes).dropna()


def difference(records: pd.DataFrame, baseline: pd.DataFrame) -> Estimate:
    """Returns the paired difference in accuracy with the interval of Agresti and Min (2005).

    With b pairs won and c lost of n, half a pair is added to each of the four outcomes:
    (b - c) / (n + 2) +- z sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2).
    Where items repeat over seeds, b, c and n shrink to the effective sample size. `value` is
    (b - c) / n; there is none without a common item.
    """
    pairs = paired(records, baseline)
    if pairs.empty:
        return NOTHING
    return difference_of(pairs.change.to_numpy(), _item_numbers(pairs))


def difference_of(changes: Float[np.ndarray, "n"], items: Int[np.ndarray, "n"]) -> Estimate:
    """Returns what `difference` does, of the changes of pairs and the numbers of their items."""
    value = float(changes.mean())
    share_moved = float(np.abs(changes).mean())
    n_with_added = effective_n(changes, items) + 2
    net = value * (n_with_added - 2)
    moved = share_moved * (n_with_added - 2)
    centre = net / n_with_added
    half_width = Z95 * math.sqrt(moved + 1 - net**2 / n_with_added) / n_with_added
    # The added pairs pull the centre towards 0: the interval is stretched to hold the value.
    low = min(value, max(-1.0, centre - half_width))
    high = max(value, min(1.0, centre + half_width))
    return Estimate(value, low, high, len(changes))


def mcnemar(records: pd.DataFrame, baseline: pd.DataFrame) -> float:
    """Returns the two-sided p-value of McNemar's exact test.

    Under no effect every change has either sign alike. Where items repeat over seeds, the sum of
    an item's changes has either sign alike, and weighs by its size.
    """
    by_item = paired(records, baseline).groupby("item", sort=False)
    changes = by_item.change.sum().to_numpy(dtype=int)
    null_law = _law_of_sign_flips(np.abs(changes))
    # The total is symmetric about 0, which lies in the middle of the law.
    largest_total = len(null_law) // 2
    totals = np.arange(len(null_law)) - largest_total
    is_as_extreme = np.abs(totals) >= abs(changes.sum())
    # Rounding may put the sum of all probabilities just above 1.
    return min(1.0, float(null_law[is_as_extreme].sum()))


def _law_of_sign_flips(sizes: Int[np.ndarray, "n_items"]) -> Float[np.ndarray, "n_totals"]:
    """The probabilities of the total of `sizes` with random signs, from the least total on.

    Exact and without drawing signs: the number of positive ones among the items of one size is
    binomial, and the sizes' totals are independent, so that their laws are convolved.
    """
    law = np.ones(1)
    n_by_size = np.bincount(sizes)
    for size, n_items in enumerate(n_by_size[1:], start=1):
        # One more positive sign moves the total by twice the size.
        law_of_size = np.zeros(2 * size * n_items + 1)
        law_of_size[:: 2 * size] = binom.pmf(np.arange(n_items + 1), n_items, 0.5)
        law = np.convolve(law, law_of_size)
    return law


def holm(p_values: pd.Series) -> pd.Series:
    """Returns Holm's corrected p-values: all below 0.05 hold together at 5 %.

    NaN is no test: it stays NaN and is not counted.
    """
    ascending = p_values.dropna().sort_values(kind="stable")
    # The smallest of m p-values is multiplied by m, the next by m - 1, and so on.
    n_left = np.arange(len(ascending), 0, -1)
    corrected = (ascending * n_left).clip(upper=1.0)
    # A test cannot hold where one with a smaller p-value does not.
    return corrected.cummax().reindex(p_values.index)


def mean(estimates: pd.DataFrame, name: str) -> Estimate:
    """Returns the unweighted mean of the independent estimates called `name`.

    Its `n` is their number. Distances to each end add in squares (Zou and Donner, 2008), which
    keeps Wilson's asymmetry. The tasks are taken as given: the interval says nothing about tasks
    that were not run.
    """
    values = estimates[name].dropna()
    lows = estimates[f"{name}_low"].dropna()
    highs = estimates[f"{name}_high"].dropna()
    n = len(values)
    if n == 0:
        return NOTHING
    value = sum(values) / n
    low = value - math.hypot(*(values - lows)) / n
    high = value + math.hypot(*(highs - values)) / n
    return Estimate(value, low, high, n)


def chance(records: pd.DataFrame) -> float:
    """Returns the expected accuracy of guessing: the mean of 1 / number of options."""
    return float((1 / records.n_options).mean())


def majority(records: pd.DataFrame) -> float:
    """Returns the accuracy of always giving the most frequent label of the tested items."""
    items = records.drop_duplicates("item")
    label_shares = items.label.value_counts(normalize=True)
    return float(label_shares.max())


def is_above_chance(records: pd.DataFrame) -> bool:
    """Returns whether a one-sided binomial test puts accuracy above `chance`.

    (p < 0.05, uncorrected.) Chance and not the majority level, which is known only from the tested
    labels themselves; a constant answer can pass on unbalanced items, so reports show both. Items
    with unequal numbers of options make the true spread smaller than the binomial one, so the test
    errs towards "not above".

    Raises:
        ValueError: there are no records.
    """
    # The binomial test needs whole numbers: rounding both down errs towards "not above", too.
    n = math.floor(effective_n(records.right.to_numpy(), _item_numbers(records)))
    n = max(1, n)
    # 0.29 * 100 is 28.999...: a whole number must not lose one to rounding.
    n_right = math.floor(float(records.right.mean()) * n + 1e-9)
    test = binomtest(n_right, n, chance(records), alternative="greater")
    return bool(test.pvalue < SIGNIFICANCE)


def confusion(records: pd.DataFrame) -> Int[np.ndarray, "n_options n_options"]:
    """Returns counts by label (rows) and prediction (columns)."""
    n_options = records.n_options.max()
    counts = np.zeros((n_options, n_options), dtype=int)
    np.add.at(counts, (records.label, records.prediction), 1)
    return counts


def _item_numbers(records: pd.DataFrame) -> Int[np.ndarray, "n"]:
    """The number of each record's item, counted from 0 as they come."""
    if records.empty:
        raise ValueError("no records to measure")
    return pd.factorize(records["item"])[0]
