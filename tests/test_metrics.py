from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from fake_run import record
from icrouting.report import metrics
from icrouting.report.metrics import Estimate

# a coverage of 95 % over N_SIMULATED draws has a standard error of 1.4 points; four of them below
N_SIMULATED = 250
LEAST_COVERAGE = 0.895


def answers(outcomes, **changes):
    return metrics.frame(
        record(index, bool(is_right), **changes) for index, is_right in enumerate(outcomes)
    )


def over_seeds(outcomes, n_seeds):
    """A method without randomness: each seed draws the same items and gets the same answers."""
    return pd.concat([answers(outcomes, seed=seed) for seed in range(n_seeds)])


def answered_again(records, outcomes):
    """The same items and seeds with other outcomes, without the cost of making a frame anew."""
    is_right = np.asarray(outcomes, dtype=bool).ravel()
    prediction = np.where(is_right, records.label, 1 - records.label)
    return records.assign(prediction=prediction, right=is_right * 1.0)


def test_answers_again_are_the_answers_of_a_new_frame():
    rng = np.random.default_rng(6)
    outcomes = rng.random((3, 8)) < 0.5
    anew = pd.concat([answers(outcomes[seed], seed=seed) for seed in range(3)])
    pd.testing.assert_frame_equal(answered_again(over_seeds([1] * 8, 3), outcomes), anew)


@pytest.mark.parametrize(
    ("n_right", "n"), [(0, 1), (1, 1), (0, 40), (17, 40), (40, 40), (250, 500)]
)
def test_accuracy_over_items_met_once_is_wilsons(n_right, n):
    found = metrics.accuracy(answers([index < n_right for index in range(n)]))
    wilson = binomtest(n_right, n).proportion_ci(method="wilson")
    assert found.value == n_right / n
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-9)
    assert found.low <= found.value <= found.high
    assert found.n == n


def test_intervals_shrink_with_more_items():
    widths = [
        (interval := metrics.accuracy(answers([True, False, True] * k))).high - interval.low
        for k in (3, 10, 50)
    ]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("outcomes", [[1, 0, 1, 1, 0, 1], [1] * 9, [0] * 5])
def test_answering_the_same_items_again_adds_no_certainty(outcomes):
    once, thrice = (
        metrics.accuracy(over_seeds(outcomes, 1)),
        metrics.accuracy(over_seeds(outcomes, 3)),
    )
    assert (thrice.value, thrice.low, thrice.high) == pytest.approx(
        (once.value, once.low, once.high)
    )
    baseline = over_seeds([0] * len(outcomes), 3)
    assert metrics.mcnemar(over_seeds(outcomes, 3), baseline) == metrics.mcnemar(
        over_seeds(outcomes, 1), over_seeds([0] * len(outcomes), 1)
    )


def test_effective_n_lies_between_items_and_records():
    rng = np.random.default_rng(3)
    for n_seeds in (1, 2, 5):
        items = np.tile(np.arange(37), n_seeds)
        found = metrics.effective_n(rng.integers(0, 2, len(items)).astype(float), items)
        assert 37 - 1e-9 <= found <= 37 * n_seeds


@pytest.mark.slow
def test_accuracy_intervals_cover_when_seeds_share_items():
    rng = np.random.default_rng(5)
    items = over_seeds([1] * 60, 3)
    n_covered = 0
    for _ in range(N_SIMULATED):
        pool = rng.random(60) < 0.7
        drawn = np.array([rng.permutation(60)[:40] for _ in range(3)])
        lines = drawn + 60 * np.arange(3)[:, None]
        records = answered_again(items.iloc[lines.ravel()], pool[drawn])
        share = metrics.accuracy(records)
        n_covered += share.low <= 0.7 <= share.high
    assert n_covered / N_SIMULATED >= LEAST_COVERAGE


@pytest.mark.slow
def test_difference_intervals_cover_when_seeds_share_items():
    rng = np.random.default_rng(7)
    items = over_seeds([1] * 50, 3)
    n_covered = 0
    for _ in range(N_SIMULATED):
        mine = rng.random(50) < 0.6
        theirs = rng.random(50) < 0.5
        # seeds of mine differ by noise on a fifth of the items, the baseline answers alike
        noisy = [np.where(rng.random(50) < 0.2, rng.random(50) < 0.6, mine) for _ in range(3)]
        baseline = answered_again(items, [theirs] * 3)
        gain = metrics.difference(answered_again(items, noisy), baseline)
        n_covered += gain.low <= 0.1 <= gain.high
    assert n_covered / N_SIMULATED >= LEAST_COVERAGE


def test_a_method_against_itself_has_no_difference():
    mine = answers([1, 0, 1, 1, 0, 0, 1])
    found = metrics.difference(mine, mine)
    assert found.value == 0
    assert found.low == -found.high < 0
    assert metrics.mcnemar(mine, mine) == 1


def test_difference_changes_sign_with_its_sides():
    mine, theirs = answers([1, 1, 1, 0, 1, 0, 1, 1]), answers([0, 1, 0, 0, 1, 1, 0, 0])
    there, back = metrics.difference(mine, theirs), metrics.difference(theirs, mine)
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )
    assert metrics.mcnemar(mine, theirs) == metrics.mcnemar(theirs, mine)


@pytest.mark.parametrize("n", [1, 2, 10])
def test_difference_stays_in_range_at_the_extremes(n):
    found = metrics.difference(answers([1] * n), answers([0] * n))
    assert -1 <= found.low <= found.value == found.high == 1


def test_only_common_items_are_compared():
    mine, theirs = answers([1, 1, 1, 1]), answers([0, 0])
    assert metrics.difference(mine, theirs).n == 2
    assert metrics.difference(mine, answers([0, 0], seed=9)) is metrics.NOTHING


def test_mcnemar_counts_only_items_that_changed():
    mine, theirs = answers([1, 1, 1, 1, 0, 1, 1]), answers([0, 0, 0, 1, 1, 0, 0])
    assert metrics.mcnemar(mine, theirs) == pytest.approx(binomtest(5, 6).pvalue)


@pytest.mark.slow
def test_mcnemar_seldom_rejects_without_an_effect():
    rng = np.random.default_rng(9)
    items = over_seeds([1] * 40, 3)
    n_rejected = 0
    for _ in range(N_SIMULATED):
        mine = rng.random(40) < 0.6
        theirs = rng.random(40) < 0.6
        baseline = answered_again(items, [theirs] * 3)
        p_value = metrics.mcnemar(answered_again(items, [mine] * 3), baseline)
        n_rejected += p_value < metrics.SIGNIFICANCE
    assert n_rejected / N_SIMULATED <= 1 - LEAST_COVERAGE


@pytest.mark.slow
def test_mcnemar_seldom_rejects_where_seeds_move_a_method_about_an_equal_baseline():
    rng = np.random.default_rng(13)
    n_items = 200
    items = over_seeds([1] * n_items, 3)
    n_rejected = 0
    n_rejected_by_votes = 0
    for _ in range(N_SIMULATED):
        right = rng.random(n_items) < 0.8
        turned = [
            np.where(right, rng.random(n_items) > 0.1, rng.random(n_items) < 0.4) for _ in range(3)
        ]
        baseline = answered_again(items, [right] * 3)
        p_value = metrics.mcnemar(answered_again(items, turned), baseline)
        n_rejected += p_value < metrics.SIGNIFICANCE
        # the test that is not used: each item has one vote, the sign of its seeds' changes
        votes = np.sign(np.sum(turned, axis=0) - 3 * right)
        p_of_votes = binomtest(int((votes > 0).sum()), int((votes != 0).sum())).pvalue
        n_rejected_by_votes += p_of_votes < metrics.SIGNIFICANCE
    assert n_rejected / N_SIMULATED <= 1 - LEAST_COVERAGE
    assert n_rejected_by_votes / N_SIMULATED == 0.244, (
        "what benchmarks/LOG.md, entry 28, says of one vote an item"
    )


def test_mcnemar_over_seeds_counts_all_flips_of_the_items_signs():
    rng = np.random.default_rng(14)
    for n in (1, 4, 9):
        mine, theirs = rng.random((3, n)) < 0.6, rng.random(n) < 0.5
        ours = pd.concat([answers(mine[seed], seed=seed) for seed in range(3)])
        changes = mine.sum(0) - 3 * theirs.astype(int)
        totals = [abs(np.dot(signs, changes)) for signs in product([-1, 1], repeat=n)]
        expected = np.mean(np.array(totals) >= abs(changes.sum()))
        assert metrics.mcnemar(ours, over_seeds(theirs, 3)) == pytest.approx(expected)


def test_holm_keeps_the_order_and_never_lowers():
    rng = np.random.default_rng(1)
    for size in range(1, 9):
        raw = pd.Series(rng.random(size) ** 3)
        found = metrics.holm(raw)
        assert (raw <= found).all()
        assert (found <= np.minimum(1, size * raw) + 1e-12).all()
        assert found[raw.sort_values().index].is_monotonic_increasing
        assert found.min() == pytest.approx(min(1, size * raw.min()))
    assert metrics.holm(pd.Series([], dtype=float)).empty


def test_holm_counts_only_the_tests_that_were_made():
    found = metrics.holm(pd.Series([0.03, np.nan, 0.01], index=["a", "b", "c"]))
    assert found.to_dict() == pytest.approx({"a": 0.03, "b": np.nan, "c": 0.02}, nan_ok=True)


def test_mean_of_equal_estimates_narrows_with_the_root_of_their_number():
    one = Estimate(0.6, 0.5, 0.65, 100).columns("x")
    found = metrics.mean(pd.DataFrame([one] * 4), "x")
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.6, 0.55, 0.625, 4))
    alone = metrics.mean(pd.DataFrame([one, metrics.NOTHING.columns("x")]), "x")
    assert (alone.value, alone.low, alone.high, alone.n) == pytest.approx((0.6, 0.5, 0.65, 1))
    assert metrics.mean(pd.DataFrame([metrics.NOTHING.columns("x")]), "x") is metrics.NOTHING


def test_chance_and_majority_levels():
    three = answers([1, 1, 1], option_logits=(0.0, 0.0, 0.0))
    assert metrics.chance(three) == pytest.approx(1 / 3)
    assert metrics.chance(pd.concat([three, answers([1, 1, 1])])) == pytest.approx(
        (1 / 3 + 1 / 2) / 2
    )
    # labels 0, 1, 0; a second seed on the first item changes nothing
    assert metrics.majority(
        pd.concat([three, metrics.frame([record(1, seed=5)])])
    ) == pytest.approx(2 / 3)


def test_above_chance_needs_more_than_luck_and_more_than_repeats():
    assert metrics.is_above_chance(answers([1] * 40))
    assert not metrics.is_above_chance(answers([1, 0] * 20))
    assert not metrics.is_above_chance(answers([0] * 20))
    assert not metrics.is_above_chance(over_seeds([1, 1, 0], 40))


def test_macro_f1_is_one_when_all_is_right_and_like_accuracy_when_balanced():
    rng = np.random.default_rng(0)
    assert metrics.macro_f1(answers([1] * 12), rng).value == 1
    # two classes, each with the same hits and misses
    assert metrics.macro_f1(answers([1, 1, 0, 0] * 5), rng).value == pytest.approx(0.5)


def test_macro_f1_of_a_constant_answer_is_below_its_accuracy():
    constant = answers([1] * 20, prediction=0)
    found = metrics.macro_f1(constant, np.random.default_rng(0))
    assert found.value == pytest.approx(1 / 3)
    assert found.low <= found.value <= found.high < metrics.accuracy(constant).value


def test_macro_f1_agrees_with_its_definition_and_repeats_with_its_generator():
    rng = np.random.default_rng(2)
    pairs = rng.integers(0, 3, (50, 2))
    logits = (0.0, 0.0, 0.0)
    some = metrics.frame(
        record(i, label=int(a), prediction=int(b), option_logits=logits)
        for i, (a, b) in enumerate(pairs)
    )
    found = metrics.macro_f1(some, np.random.default_rng(4))
    scores = []
    for kind in range(3):
        hits = sum(a == b == kind for a, b in pairs)
        scores.append(
            2 * hits / (sum(a == kind for a, _ in pairs) + sum(b == kind for _, b in pairs))
        )
    assert found.value == pytest.approx(np.mean(scores))
    assert found == metrics.macro_f1(some, np.random.default_rng(4))


def test_confusion_counts_every_record_once_and_hits_on_the_diagonal():
    some = answers([1, 0, 1, 1, 0])
    counts = metrics.confusion(some)
    assert counts.sum() == len(some)
    assert np.trace(counts) == 3


@pytest.mark.parametrize("measure", [metrics.accuracy, metrics.is_above_chance])
def test_no_records_are_no_estimate(measure):
    with pytest.raises(ValueError, match="no records"):
        measure(metrics.frame([]))
