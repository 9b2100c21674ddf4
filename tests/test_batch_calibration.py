"""The methods `batch-calibration` and `icr-safe`: priors from training prompts without labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import fitted
import tiny
from fitted import fit_method, small_fit
from icrouting.decoder.scoring import score_options
from icrouting.icr import InContextRouter
from icrouting.methods import Settings, make
from icrouting.methods.batch_calibration import BatchCalibration
from icrouting.methods.saved import load_method, save_method
from icrouting.routing import calibration
from icrouting.routing.calibration import BatchCalibration as Prior
from icrouting.tasks.task import Example, Task, TaskSpec

TASK = tiny.task("toy", n_train=60, n_test=20)
OPTIONS = list(TASK.spec.options)
ROWS = [dict(row.fields) for row in TASK.test]
TEXTS = [TASK.prompt(row) for row in TASK.test]


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def icr(model, tokenizer):
    config = small_fit(n_prompts=8, n_queries=60)
    return InContextRouter.fit(model, tokenizer, [TASK], config)


def made(name, model, tokenizer, task=TASK, **settings):
    (method,) = make([name], Settings(**settings))
    return fit_method(method, model, tokenizer, [])


def relabelled(task):
    """The same rows with other labels."""
    train = tuple(replace(row, label=1 - row.label) for row in task.train)
    return replace(task, train=train)


def test_scores_come_without_the_prior_of_the_training_prompts(model, tokenizer):
    train = score_options(model, tokenizer, [TASK.prompt(row) for row in TASK.train], OPTIONS)
    expected = Prior.of(train, OPTIONS).adjusted(
        score_options(model, tokenizer, TEXTS, OPTIONS), OPTIONS
    )
    with made("batch-calibration", model, tokenizer).attached(model, tokenizer, TASK) as method:
        torch.testing.assert_close(method.score(TEXTS, OPTIONS), expected, atol=1e-4, rtol=0)


def test_no_label_is_read(model, tokenizer):
    answers = []
    for task in (TASK, relabelled(TASK)):
        with made("batch-calibration", model, tokenizer).attached(model, tokenizer, task) as method:
            answers.append(method.score(TEXTS, OPTIONS))
    torch.testing.assert_close(*answers, atol=1e-6, rtol=0)


def test_it_is_saved_and_loaded(model, tokenizer, tmp_path):
    method = made("batch-calibration", model, tokenizer).on(TASK)
    save_method(method, tmp_path)
    with method.attached(model, tokenizer, TASK) as attached:
        expected = attached.predict(ROWS)
    with load_method(tmp_path, model, tokenizer).attached(model, tokenizer, TASK) as attached:
        assert attached.predict(ROWS) == expected


def test_other_options_are_refused(model, tokenizer):
    with (
        made("batch-calibration", model, tokenizer).attached(model, tokenizer, TASK) as method,
        pytest.raises(ValueError, match="the prior is of the options"),
    ):
        method.score(TEXTS, ["good", "bad"])


def test_each_number_of_choices_has_a_prior_of_its_own(model, tokenizer):
    spec = TaskSpec("choices", "far", "Question: {text}\n{choices}\nAnswer:", label_scoring="sum")
    words = ("red", "blue", "green", "black")
    rows = []
    for place in range(24):
        n_choices = 4 if place < 2 else 2 + place % 2
        rows.append(Example({"text": f"number {place}"}, words[:n_choices], 0))
    task = Task(spec, tuple(rows), tuple(rows))
    method = fit_method(BatchCalibration(Settings()), model, tokenizer, [task])
    options = [task.options(row) for row in rows]
    prompts = [task.prompt(row) for row in rows]
    plain = score_options(model, tokenizer, prompts, options, label_scoring="sum")
    adjusted = method.adjusted(task, rows, plain)
    for n_choices in (2, 3):
        places = [place for place, row in enumerate(rows) if len(row.choices) == n_choices]
        chosen = plain[places, :n_choices]
        expected = Prior.of(chosen, "ABC"[:n_choices]).adjusted(chosen, "ABC"[:n_choices])
        torch.testing.assert_close(adjusted[places, :n_choices], expected, atol=1e-4, rtol=0)
    # Two prompts of four choices say nothing.
    assert torch.equal(adjusted[:2], plain[:2])


def test_there_is_no_prior_for_all_tasks():
    with pytest.raises(ValueError, match="leave '-once' away"):
        make(["batch-calibration-once"], Settings())


def test_what_the_gate_leaves_alone_is_calibrated_and_the_rest_is_routed(
    icr, model, tokenizer, tmp_path
):
    icr.save_pretrained(tmp_path / "known")
    fitted.strict(icr).save_pretrained(tmp_path / "strict")
    with icr.attached(model, tokenizer) as routed:
        routing = routed.routing(TEXTS).routing_vector.flatten(1).any(1)
        routed_scores = routed.score(TEXTS, OPTIONS)
    safe = made("icr-safe", model, tokenizer, router=str(tmp_path / "known"))
    with safe.attached(model, tokenizer, TASK) as method:
        scores = method.score(TEXTS, OPTIONS)
        assert routing.any()
        torch.testing.assert_close(scores[routing], routed_scores[routing], atol=1e-4, rtol=0)
    strict = made("icr-safe", model, tokenizer, router=str(tmp_path / "strict"))
    bare = made("batch-calibration", model, tokenizer)
    with bare.attached(model, tokenizer, TASK) as method:
        calibrated = method.score(TEXTS, OPTIONS)
    with strict.attached(model, tokenizer, TASK) as method:
        torch.testing.assert_close(method.score(TEXTS, OPTIONS), calibrated, atol=1e-4, rtol=0)


def test_where_too_few_are_left_alone_scores_stay(icr, model, tokenizer, tmp_path):
    icr.save_pretrained(tmp_path)
    method = made("icr-safe", model, tokenizer, router=str(tmp_path)).on(TASK)
    method.scores = method.scores[:0]
    with icr.attached(model, tokenizer) as routed:
        expected = routed.score(TEXTS, OPTIONS)
    with method.attached(model, tokenizer, TASK) as attached:
        torch.testing.assert_close(attached.score(TEXTS, OPTIONS), expected, atol=1e-4, rtol=0)


def test_a_router_without_a_gate_is_refused(icr, model, tokenizer, tmp_path):
    replace(icr, gate=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a router with a gate"):
        made("icr-safe", model, tokenizer, router=str(tmp_path)).on(TASK)


def test_draws_are_bounded_and_those_of_the_seed():
    from icrouting.methods import batch_calibration as room

    rows = room.drawn_rows(TASK, np.random.default_rng(1))
    assert rows == room.drawn_rows(TASK, np.random.default_rng(1))
    assert len({id(row) for row in rows}) == len(rows) <= room.N_PROMPTS


@pytest.mark.parametrize("name", ["batch-calibration", "icr-safe"])
def test_a_prior_is_estimated_once_however_often_it_is_taken_away(
    icr, model, tokenizer, tmp_path, monkeypatch, name
):
    fitted.strict(icr).save_pretrained(tmp_path)
    method = made(name, model, tokenizer, router=str(tmp_path))
    estimates = []
    usual = calibration.log_prior
    monkeypatch.setattr(
        calibration, "log_prior", lambda *given: estimates.append(1) or usual(*given)
    )
    with method.attached(model, tokenizer, TASK) as attached:
        first = attached.score(TEXTS[:1], OPTIONS)
        assert torch.equal(attached.score(TEXTS[:1], OPTIONS), first)
        attached.score(TEXTS[1:3], OPTIONS)
    assert len(estimates) == 1
