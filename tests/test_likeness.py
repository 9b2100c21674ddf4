"""Likeness: rows unlike those of a prior are told of, and rows like them are not."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import fitted
import tiny
from fitted import small_fit
from icrouting.icr import InContextRouter
from icrouting.routing import likeness as room
from icrouting.routing.calibration import BatchCalibration
from icrouting.routing.likeness import Likeness, UnlikePrompts, are_unlike
from icrouting.routing.predictions import Prediction
from icrouting.routing.shipped import TaskCalibration
from icrouting.tasks.task import TaskSpec

SPEC = TaskSpec("mine", "far", "Note: {text}\nMood:", ("good", "bad", "so"))
SCORES = torch.from_numpy(np.random.default_rng(5).normal(size=(300, 3)) * 2).float()
KNOWN = TaskCalibration.of(SPEC, SCORES[:100], [SPEC.options] * 100, "batch")


def predictions_of(scores, status="calibrated", options=SPEC.options):
    """What a router predicts of these scores."""
    adjusted, _ = KNOWN.adjusted(scores, [options] * len(scores), "")
    predictions = []
    for row in adjusted.double().softmax(1):
        shares = dict(zip(options, row.tolist(), strict=True))
        predictions.append(Prediction(options[int(row.argmax())], float(row.max()), status, shares))
    return predictions


def sentence_of(*groups):
    likeness = Likeness([KNOWN])
    for predictions in groups:
        likeness.add(predictions)
    return likeness.sentence()


FAR = SCORES[100:200] + torch.tensor([3.0, 0.0, 0.0])


def test_rows_like_those_of_the_prior_are_not_told_of():
    assert sentence_of(predictions_of(SCORES[100:])) == ""


def test_rows_unlike_them_are_told_of():
    assert "answered otherwise" in sentence_of(predictions_of(FAR))


def test_of_few_rows_nothing_is_said():
    assert sentence_of(predictions_of(FAR[:29])) == ""
    assert sentence_of(predictions_of(FAR[:29]), predictions_of(FAR[29:31]))


def test_rows_that_were_not_calibrated_do_not_count():
    assert sentence_of(predictions_of(FAR, "routed")) == ""
    assert sentence_of([Prediction(None, None, "too long")] * 40) == ""


def test_a_sorted_file_is_judged_as_a_whole():
    ordered = SCORES[100:][SCORES[100:, 0].argsort()]
    windows = [predictions_of(each) for each in ordered.split(50)]
    assert sentence_of(windows[0])
    assert sentence_of(*windows) == ""


def test_a_gap_that_is_more_than_chance_and_small_is_not_told_of():
    rng = np.random.default_rng(0)
    many = torch.from_numpy(rng.normal(size=(20_000, 3))).float()
    prior = BatchCalibration.of(many[:10_000], SPEC.options, "batch")
    near = many[10_000:] + torch.tensor([0.2, 0.0, 0.0])
    assert prior.chance_of(near) < 1e-9
    assert not are_unlike(prior, near)


def test_of_a_long_file_rows_of_all_of_it_are_drawn(monkeypatch):
    monkeypatch.setattr(room, "MOST", 40)
    likeness = Likeness([KNOWN])
    numbered = torch.stack([torch.arange(300.0) / 100, torch.zeros(300), torch.zeros(300)], 1)
    likeness.add(predictions_of(numbered))
    rows = torch.stack(likeness._drawn[SPEC.options])
    assert len(rows) == 40
    places = (rows[:, 0] - rows[:, 1]).mul(100).round()
    assert len(set(places.tolist())) == 40
    assert 110 < places.mean() < 190


def test_routed_predictions_warn_of_rows_unlike_those_of_the_prior(tokenizer):
    task = tiny.task("toy", n_train=60, n_test=40)
    model = tiny.model("llama")
    config = small_fit(n_prompts=8, n_queries=60)
    icr = fitted.strict(InContextRouter.fit(model, tokenizer, [task], config))
    rows = [dict(row.fields) for row in task.test]
    others = [{"text": f"{'!' * 30} {n} ? {n}"} for n in range(40)]
    spec = replace(SPEC, options=("good", "bad"))
    with icr.attached(model, tokenizer) as routed:
        calibration, _ = routed.calibrate_task(rows, spec)
    with icr.with_calibration(calibration).attached(model, tokenizer) as routed:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnlikePrompts)
            routed.predict(rows, spec)
        with pytest.warns(UnlikePrompts, match="answered otherwise"):
            routed.predict(others, spec)
