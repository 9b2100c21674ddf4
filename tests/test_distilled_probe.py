"""The distilled probe: few-shot answers, learned for zero-shot length."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from scipy.special import log_softmax

import tiny
from fitted import fit_method
from icrouting.decoder.scoring import score
from icrouting.methods import Settings, distilled_probe
from icrouting.methods.distilled_probe import ProbeDistilled
from icrouting.methods.residual_probe import cross_entropy, residual_fit
from icrouting.tasks.prompts import few_shot

TASK = tiny.task("toy", n_train=60, n_test=30)
SETTINGS = Settings(demos_per_class=2)


def fit(tokenizer, task=TASK):
    return fit_method(ProbeDistilled(SETTINGS), tiny.model("llama"), tokenizer, [task])


@pytest.fixture(scope="module")
def lesson(tokenizer):
    method = fit(tokenizer)
    return method, method.lesson(TASK, np.random.default_rng(3))


def shown_rows(learned):
    """The rows that stood before every prompt of a lesson."""
    return [row for row in TASK.train if row not in learned.examples]


def test_it_learns_from_all_rows_but_its_demonstrations_and_counts_these_labels_alone(lesson):
    method, learned = lesson
    shown = shown_rows(learned)
    assert [row.label for row in shown].count(0) == 2
    assert len(shown) == learned.n_labelled == method.n_labelled == 4


def test_a_label_of_another_row_changes_nothing(lesson, monkeypatch):
    method, learned = lesson
    shown = shown_rows(learned)
    # The draw is by labels: it is held, to see whether anything else reads them.
    monkeypatch.setattr(distilled_probe, "balanced_demos", lambda task, n, rng: shown)
    kept = method.lesson(TASK, np.random.default_rng(3))
    others_wrong = [
        row if row in shown else replace(row, label=1 - row.label) for row in TASK.train
    ]
    wrong = method.lesson(replace(TASK, train=tuple(others_wrong)), np.random.default_rng(3))
    assert np.array_equal(kept.targets, wrong.targets)


def test_it_is_taught_what_few_shot_prompts_answer(lesson):
    method, learned = lesson
    assert np.allclose(learned.targets.sum(1), 1)
    # One of the orders of the demonstrations is the one that it had.
    shown = shown_rows(learned)
    row = learned.examples[0]
    answers = []
    for demos in permutations(shown):
        prompt = few_shot(TASK, row, [(TASK, demo) for demo in demos])
        answers.append(score(method.decoder, [prompt], [TASK.options(row)]).softmax(1)[0].numpy())
    assert np.isclose(answers, learned.targets[0], atol=1e-4).all(1).any()


def test_no_row_beside_the_demonstrations_is_refused(tokenizer):
    rows = [next(row for row in TASK.train if row.label == label) for label in (0, 1)]
    with pytest.raises(ValueError, match="probe-distilled learns from rows beside its 2 demon"):
        fit(tokenizer, replace(TASK, train=tuple(rows)))


def test_shares_of_one_label_are_that_label():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(20, 5)) / 2
    offsets = log_softmax(rng.normal(size=(20, 3)), axis=1)
    labels = rng.integers(3, size=20)
    from_labels = residual_fit(features, offsets, labels, 1.0)
    from_shares = residual_fit(features, offsets, np.eye(3)[labels], 1.0)
    for one, other in zip(from_labels, from_shares, strict=True):
        assert np.array_equal(one, other)
    assert cross_entropy(offsets, labels) == pytest.approx(
        cross_entropy(offsets, np.eye(3)[labels])
    )


def test_taught_by_the_model_s_own_answers_nothing_is_added():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(40, 5))
    offsets = log_softmax(rng.normal(size=(40, 3)), axis=1)
    weight, bias = residual_fit(features, offsets, np.exp(offsets), 100.0)
    assert np.allclose(weight, 0, atol=1e-5)
    assert np.allclose(bias, 0, atol=1e-5)
