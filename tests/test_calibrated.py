"""Batch calibration of what a run recorded: laws, and what a report shows of it."""

import json
import math

import numpy as np
import pytest
from scipy.special import log_softmax

from fake_run import TASKS, fake_config, fake_records, fake_run, record
from icrouting.cli import main
from icrouting.evaluation import records
from icrouting.report import beyond, metrics, page
from icrouting.report.calibrated import calibrated, without_prior
from icrouting.report.summary import summarise
from icrouting.routing.priors import log_prior

WAYS = ("batch", "batch-probability")
SCORES = np.random.default_rng(3).normal(size=(40, 3)) * 2


def slowly(scores, way):
    """Batch calibration, a number at a time."""
    n_items, n_options = scores.shape
    log_probs = []
    for item in scores:
        total = sum(math.exp(score) for score in item)
        log_probs.append([score - math.log(total) for score in item])
    priors = []
    for option in range(n_options):
        column = [row[option] for row in log_probs]
        if way == "batch":
            priors.append(sum(column) / n_items)
        else:
            priors.append(math.log(sum(math.exp(value) for value in column) / n_items))
    return [[value - prior for value, prior in zip(row, priors, strict=True)] for row in log_probs]


def records_of(scores, labels, method="icr", task="mr"):
    """Records of two or more options with these logits."""
    return [
        record(
            index,
            method=method,
            task=task,
            label=int(label),
            prediction=int(item.argmax()),
            option_logits=tuple(item.tolist()),
        )
        for index, (item, label) in enumerate(zip(scores, labels, strict=True))
    ]


@pytest.mark.parametrize("way", WAYS)
def test_calibration_is_that_of_the_slow_way(way):
    np.testing.assert_allclose(without_prior(SCORES, way), slowly(SCORES, way), atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_a_prior_that_is_uniform_changes_no_answer(way):
    # Every option stands in every place alike, so that the mean is the same for all.
    scores = np.concatenate([np.roll(SCORES, shift, axis=1) for shift in range(3)])
    np.testing.assert_array_equal(without_prior(scores, way).argmax(1), scores.argmax(1))


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_items_within_an_option_never_changes(way):
    before = np.argsort(log_softmax(SCORES, axis=1), axis=0)
    np.testing.assert_array_equal(np.argsort(without_prior(SCORES, way), axis=0), before)


def test_a_constant_on_each_option_is_taken_away_whole():
    shifted = SCORES + np.array([0.0, 5.0, -2.0])
    np.testing.assert_array_equal(without_prior(shifted).argmax(1), without_prior(SCORES).argmax(1))


@pytest.mark.parametrize("way", WAYS)
def test_a_constant_on_each_item_changes_nothing(way):
    shifted = SCORES + np.linspace(-3, 3, len(SCORES))[:, None]
    np.testing.assert_allclose(without_prior(shifted, way), without_prior(SCORES, way), atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_an_option_that_is_ruled_out_stays_so_and_leaves_the_others_finite(way):
    scores = SCORES.copy()
    scores[:5, 2] = -np.inf
    scores[:, 1] = -np.inf
    result = without_prior(scores, way)
    assert np.isneginf(result[:5, 2]).all()
    assert np.isneginf(result[:, 1]).all()
    assert np.isfinite(result[:, 0]).all()


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (5, 1)])
def test_too_little_to_calibrate_by_is_refused(shape):
    with pytest.raises(ValueError, match=f"got {shape[0]} prompts of {shape[1]} options"):
        without_prior(np.zeros(shape))


def test_each_task_method_and_number_of_options_has_a_prior_of_its_own():
    labels = np.arange(40) % 3
    first = records_of(SCORES, labels)
    other = records_of(SCORES + np.array([9.0, 0.0, 0.0]), labels, method="few-shot")
    third = records_of(SCORES[:, :2], np.arange(40) % 2, task="cb")
    alone = []
    for part in (first, other, third):
        alone += calibrated(metrics.frame(part)).prediction.tolist()
    together = calibrated(metrics.frame([*first, *other, *third]))
    assert together.prediction.tolist() == alone


def test_answers_without_logits_have_no_calibrated_answer():
    without_logits = [record(i, option_logits=(math.nan, math.nan)) for i in range(9)]
    with_logits = records_of(SCORES[:, :2], np.arange(40) % 2, task="cb")
    assert set(calibrated(metrics.frame([*without_logits, *with_logits])).task) == {"cb"}
    run = fake_run(("icr",), tasks=[TASKS[1]])
    with pytest.raises(ValueError, match="nothing to calibrate"):
        summarise(without_logits, run, "batch")


def test_gains_beyond_calibration_are_over_the_calibrated_baseline():
    """A method that moves the prior alone has a gain, and none beyond calibration."""
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    knowing = rng.normal(size=(200, 2)) + 2 * np.eye(2)[labels]
    biased = knowing + np.array([4.0, 0.0])
    run_records = [
        *records_of(biased, labels, "zero-shot"),
        *records_of(knowing, labels, "icr"),
    ]
    run = fake_run(("zero-shot", "icr"), tasks=[TASKS[1]])
    raw = summarise(run_records, run).line("mean", "unseen", "icr")
    after = summarise(run_records, run, "batch").line("mean", "unseen", "icr")
    assert raw.gain_low > 0.2
    assert after.gain == 0
    made = page.report_of(run, run_records, "batch")
    assert "With both calibrated by their batch, ICR is level with zero-shot" in made.conclusion
    table = beyond.lines(made.summary, made.calibrated)
    assert table[0] == [
        "method",
        "mean unseen: before, after, gain beyond",
    ]
    assert table[1][0] == "zero-shot"
    assert "→" in table[1][1]
    assert "(" not in table[1][1]
    assert ", +0.0 (" in table[2][1]


@pytest.mark.slow
def test_the_report_shows_what_methods_add_to_calibration(tmp_path):
    accuracies = {(method, task["name"]): 0.5 for method in ("zero-shot", "icr") for task in TASKS}
    run_records = fake_records(accuracies)
    run = fake_run(("zero-shot", "icr"))
    plain = page.report_of(run, run_records)
    made = page.report_of(run, run_records, "batch-probability")
    for text in (page.markdown(made), page.figures_as_json(made)):
        assert "calibrated" in text
    assert "After batch" not in page.markdown(plain)
    folder = page.RunFolder(tmp_path)
    assert "<h3>Beyond calibration</h3>" in page.html(made, folder)
    assert "<h3>Beyond calibration</h3>" not in page.html(plain, folder)


def test_the_command_shows_the_second_table_and_keeps_it(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    accuracies = {(method, task["name"]): 0.5 for method in ("zero-shot", "icr") for task in TASKS}
    records.append(run / "records.jsonl", fake_records(accuracies))
    (run / "config.json").write_text(json.dumps(fake_config(("zero-shot", "icr"))))
    main.main(["report", str(run), "--calibrate", "batch"])
    assert "Beyond calibration" in capsys.readouterr().out
    assert "After batch calibration" in (run / "report.md").read_text()
    with pytest.raises(SystemExit):
        main.main(["report", str(run), "--calibrate", "batch", "--leads"])
    assert "--leads goes with none of" in capsys.readouterr().err


def test_options_further_apart_than_probabilities_reach_have_their_prior_too():
    scores = SCORES - [0.0, 1000.0, 0.0]
    far = log_prior(scores, "batch-probability")
    # What lies so far back takes nothing from the others.
    assert far[1] < -990
    both = [0, 2]
    expected = log_prior(SCORES[:, both], "batch-probability")
    np.testing.assert_allclose(far[both] - expected, (far[both] - expected)[0], atol=1e-9)
