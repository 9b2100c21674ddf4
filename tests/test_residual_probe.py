"""The residual probe: what labels add to what the model says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import tiny
from fitted import fit_method
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import score
from icrouting.methods import Settings, make
from icrouting.methods.residual_probe import GRID, ProbeResidual, residual_fit

TASK = tiny.task("toy", n_test=30)
GENERATOR = np.random.default_rng(0)
FEATURES = GENERATOR.normal(size=(24, 40))
OFFSETS = GENERATOR.normal(size=(24, 3))
LABELS = np.arange(24) % 3


def loss_of(weight, bias, C, features=FEATURES, offsets=OFFSETS, labels=LABELS):
    """The written-out loss."""
    logits = torch.from_numpy(offsets) + torch.from_numpy(features) @ weight.mT + bias
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    return loss + weight.square().sum() / (2 * C) + bias.square().sum() / 2


@pytest.mark.parametrize("n_rows", [6, 24])
@pytest.mark.parametrize("C", [0.1, 1.0, 10.0])
def test_a_fit_is_where_the_loss_has_no_slope(C, n_rows):
    rows = FEATURES[:n_rows], OFFSETS[:n_rows], LABELS[:n_rows]
    weight, bias = (torch.from_numpy(part) for part in residual_fit(*rows, C))
    weight.requires_grad_()
    bias.requires_grad_()
    loss_of(weight, bias, C, *rows).backward()
    assert weight.grad.abs().max() < 1e-5
    assert bias.grad.abs().max() < 1e-5


def test_where_the_model_says_nothing_a_fit_is_scikit_learns():
    # scikit-learn does not hold the bias, so a column of ones stands for it.
    columns = np.column_stack([FEATURES, np.ones(24)])
    slow = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    slow.fit(columns, LABELS)
    weight, bias = residual_fit(FEATURES, np.zeros((24, 3)), LABELS, 1.0)
    assert np.allclose(np.column_stack([weight, bias]), slow.coef_, atol=1e-4)


def test_no_size_adds_nothing():
    weight, bias = residual_fit(FEATURES, OFFSETS, LABELS, 0.0)
    assert not weight.any()
    assert not bias.any()


def test_an_option_that_a_row_lacks_stays_ruled_out_and_moves_nothing():
    offsets = OFFSETS.copy()
    offsets[LABELS == 0, 2] = -np.inf
    weight, _ = residual_fit(FEATURES, offsets, LABELS, 1.0)
    assert np.isfinite(weight).all()
    # As if the option were so unlikely there that it makes no difference.
    offsets[LABELS == 0, 2] = -1e3
    assert np.allclose(weight, residual_fit(FEATURES, offsets, LABELS, 1.0)[0], atol=1e-6)


@pytest.fixture(scope="module")
def fitted(tokenizer):
    return fit_method(ProbeResidual(Settings()), tiny.model("llama"), tokenizer, [TASK])


def plain_scores(method, task=TASK):
    prompts = [task.prompt(row) for row in task.test]
    return score(method.decoder, prompts, [task.options(row) for row in task.test])


def without_a_correction(method, calibrated):
    method = replace_tensors(method, weight=torch.zeros_like(method.weight))
    return replace_tensors(
        method, bias=torch.zeros_like(method.bias), calibrated=torch.tensor([float(calibrated)])
    )


def replace_tensors(method, **tensors):
    changed = ProbeResidual(method.settings)
    changed.take(
        replace(method.in_force(), tensors={**method.tensors(), **tensors}),
        method.decoder,
        method.sources,
    )
    return changed


def test_without_a_correction_it_is_the_model_itself(fitted):
    scores = plain_scores(fitted)
    answered = without_a_correction(fitted, False).adjusted(TASK, TASK.test, scores)
    assert torch.allclose(answered, scores.log_softmax(1))


def test_without_a_correction_and_with_the_prior_it_is_batch_calibration(fitted, tokenizer):
    (calibration,) = make(["batch-calibration"], Settings())
    calibration = fit_method(calibration, fitted.model, tokenizer, [TASK]).on(TASK)
    # The same prompts, whatever was drawn.
    calibration.restore({"scores": fitted.scores})
    scores = plain_scores(fitted)
    answered = without_a_correction(fitted, True).adjusted(TASK, TASK.test, scores)
    expected = calibration.adjusted(TASK, TASK.test, scores)
    assert torch.allclose(answered, expected.log_softmax(1), atol=1e-5)


def test_the_correction_is_of_the_two_states_at_the_last_token(fitted):
    scores = plain_scores(fitted)
    bare = without_a_correction(fitted, bool(fitted.calibrated)).adjusted(TASK, TASK.test, scores)
    added = fitted.adjusted(TASK, TASK.test, scores) - bare
    for place, row in enumerate(TASK.test[:4]):
        ids = fitted.tokenizer(TASK.prompt(row), return_tensors="pt")
        with torch.no_grad():
            states = fitted.model(**ids, output_hidden_states=True).hidden_states
        n_layers = len(states) - 1
        entering = states[n_layers // 3 * 2][0, -1]
        # The last one is normed, as the vocabulary head reads it.
        read = torch.cat([entering, states[-1][0, -1]]).float()
        slow = fitted.weight @ read + fitted.bias
        assert torch.allclose(added[place], slow, atol=1e-3)


def test_it_learns_a_task_that_the_model_cannot_do(tokenizer):
    task = tiny.task("toy", n_train=160, n_test=30)
    method = fit_method(ProbeResidual(Settings()), tiny.model("llama"), tokenizer, [task])
    labels = torch.tensor([row.label for row in task.test])
    scores = plain_scores(method, task)
    right = (method.adjusted(task, task.test, scores).argmax(1) == labels).float().mean()
    alone = (scores.argmax(1) == labels).float().mean()
    assert right > alone + 0.2


def test_the_setting_of_the_least_left_out_loss_is_taken(fitted):
    assert len(fitted.tried) == len(GRID)
    best = min(fitted.tried, key=lambda setting: setting["loss"])
    assert best["calibrated"] == bool(fitted.calibrated)
    assert (best["C"] == 0) == (not fitted.weight.any())


def test_where_labels_contradict_each_other_nothing_is_added(tokenizer):
    """Every prompt stands there once with each label, so a correction is worse on rows left out."""
    twins = [replace(row, label=1 - row.label) for row in TASK.train]
    task = replace(TASK, train=(*TASK.train, *twins), validation=())
    method = fit_method(ProbeResidual(Settings()), tiny.model("llama"), tokenizer, [task])
    assert not method.weight.any()


def test_one_row_a_class_is_enough(tokenizer):
    train = [next(row for row in TASK.train if row.label == label) for label in (0, 1)]
    task = replace(TASK, train=tuple(train), validation=())
    method = fit_method(ProbeResidual(Settings()), tiny.model("llama"), tokenizer, [task])
    assert method.n_labelled == 2
    assert torch.isfinite(method.adjusted(TASK, TASK.test, plain_scores(method))).all()


def test_no_labelled_row_is_refused(tokenizer):
    task = replace(TASK, train=(), validation=())
    with pytest.raises(ValueError, match="probe-residual learns from labelled rows"):
        fit_method(ProbeResidual(Settings()), tiny.model("llama"), tokenizer, [task])


def test_scores_come_back_from_the_tensors(fitted):
    scores = plain_scores(fitted)
    again = ProbeResidual(fitted.settings)
    again.take(fitted.in_force(), Decoder.of(fitted.model, fitted.tokenizer), fitted.sources)
    assert torch.equal(
        again.adjusted(TASK, TASK.test, scores), fitted.adjusted(TASK, TASK.test, scores)
    )
