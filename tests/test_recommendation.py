"""The recommendation rule on simulated answers."""

import numpy as np
import pandas as pd
import pytest

from icrouting.comparing.recommendation import recommend, rows_to_show
from icrouting.report import metrics

NAMES = ("zero-shot", "calibration", "few-shot", "probe-encoder", "probe-hidden", "task-vectors")
MORE = ("i2cl", "icr", "prefix-tuning", "lora-block-more")


def answers(rng, n_rows, accuracies, likeness=0.5):
    """Whether methods are right on rows, as alike as rows that are easy or hard make them.

    On a share `likeness` of the rows all are right or wrong together, by one draw.
    """
    shared = rng.random(n_rows)
    is_shared = rng.random(n_rows) < likeness
    outcomes = {}
    for name, accuracy in accuracies.items():
        draw = np.where(is_shared, shared, rng.random(n_rows))
        outcomes[name] = draw < accuracy
    return outcomes


def labels_of(n_rows):
    return np.arange(n_rows) % 4


def share_of(n_draws, n_rows, accuracies, is_met, likeness=0.5):
    """The share of simulated comparisons whose recommendation meets a condition."""
    rng = np.random.default_rng(0)
    n_met = 0
    for _ in range(n_draws):
        outcomes = answers(rng, n_rows, accuracies, likeness)
        n_met += is_met(recommend(outcomes, labels_of(n_rows)))
    return n_met / n_draws


@pytest.mark.slow
@pytest.mark.parametrize(("n_rows", "accuracy"), [(36, 0.33), (80, 0.6), (300, 0.85)])
def test_where_all_are_alike_zero_shot_is_recommended_19_times_in_20(n_rows, accuracy):
    accuracies = dict.fromkeys((*NAMES, *MORE), accuracy)
    share = share_of(200, n_rows, accuracies, lambda found: found.method == "zero-shot", 0.3)
    assert share >= 0.95


@pytest.mark.slow
def test_fifteen_points_on_200_rows_are_found_in_most_comparisons():
    accuracies = dict.fromkeys((*NAMES, *MORE), 0.6) | {"icr": 0.75}
    share = share_of(100, 200, accuracies, lambda found: found.method == "icr")
    assert share > 0.7


@pytest.mark.slow
def test_of_two_equal_good_ones_the_cheaper_is_taken():
    accuracies = {"zero-shot": 0.4, "few-shot": 0.42, "probe-hidden": 0.85, "lora-head": 0.85}
    share = share_of(100, 100, accuracies, lambda found: found.method == "probe-hidden")
    assert share >= 0.95


def test_a_better_one_is_worth_its_cost_where_that_is_shown():
    accuracies = {"zero-shot": 0.3, "few-shot": 0.6, "prefix-tuning": 0.95}
    share = share_of(50, 200, accuracies, lambda found: found.method == "prefix-tuning")
    assert share >= 0.95


@pytest.mark.slow
def test_none_is_recommended_whose_interval_holds_a_loss():
    rng = np.random.default_rng(1)
    for _ in range(150):
        accuracies = {name: rng.uniform(0.3, 0.9) for name in NAMES}
        n_rows = int(rng.integers(5, 60))
        found = recommend(answers(rng, n_rows, accuracies), labels_of(n_rows))
        assert found.method == "zero-shot" or (
            found.gain.low > 0 and found.p_values[found.method] < 0.05
        )
        assert found.is_shown == (found.method != "zero-shot")


def test_methods_with_the_same_answers_tie_and_the_first_is_taken():
    rng = np.random.default_rng(2)
    right = rng.random(60) < 0.9
    wrong = rng.random(60) < 0.2
    found = recommend({"a": wrong, "b": right, "c": right, "d": right}, labels_of(60))
    assert (found.method, found.best) == ("b", "b")
    assert found.lead.value == 0


def test_rows_of_one_label_show_nothing():
    outcomes = {"zero-shot": np.zeros(50, bool), "probe-hidden": np.ones(50, bool)}
    found = recommend(outcomes, np.zeros(50, int))
    assert found.has_one_label
    assert (found.method, found.is_shown) == ("zero-shot", False)
    assert recommend(outcomes, labels_of(50)).method == "probe-hidden"


def test_alone_the_baseline_is_recommended():
    found = recommend({"zero-shot": np.ones(9, bool)}, labels_of(9))
    assert (found.method, found.n_tried, found.rows_to_show) == ("zero-shot", 0, None)


@pytest.mark.slow
def test_the_rows_that_are_said_to_show_a_gain_do_four_times_in_five():
    gain = 0.1
    # Each is right by itself: 0.55 * 0.55 of the answers that zero-shot has wrong, and so on.
    moved = 0.55 * 0.55 + 0.45 * 0.45
    n_rows = rows_to_show(gain, moved, 1)
    accuracies = {"zero-shot": 0.45, "icr": 0.55}
    share = share_of(400, n_rows, accuracies, lambda found: found.is_shown, likeness=0)
    assert 0.74 < share < 0.86


def test_fewer_rows_show_larger_gains_alone():
    rng = np.random.default_rng(3)
    accuracies = {"zero-shot": 0.5, "icr": 0.6}
    few, many = (recommend(answers(rng, n, accuracies), labels_of(n)) for n in (40, 400))
    assert few.gain_to_show > many.gain_to_show


def test_the_test_is_mcnemars_of_the_report_and_the_interval_its_too():
    rng = np.random.default_rng(4)
    outcomes = answers(rng, 70, {"zero-shot": 0.4, "icr": 0.7})
    frames = []
    for right in outcomes.values():
        items = [("tickets", index) for index in range(70)]
        frame = pd.DataFrame({"item": items, "pair": items, "seed": 0, "right": right * 1.0})
        frames.append(frame)
    baseline, routed = frames
    found = recommend(outcomes, labels_of(70))
    assert found.p_values["icr"] == pytest.approx(metrics.mcnemar(routed, baseline))
    assert found.gain == metrics.difference(routed, baseline)


def test_answers_on_other_rows_are_refused():
    with pytest.raises(ValueError, match="the same 3 rows"):
        recommend({"a": np.ones(3, bool), "b": np.ones(2, bool)}, labels_of(3))
    with pytest.raises(ValueError, match="on some rows"):
        recommend({}, labels_of(0))
