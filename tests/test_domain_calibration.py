"""Domain-context calibration: the prior over random words of the task's own rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.decoder.scoring import score_options
from icrouting.methods import Settings
from icrouting.methods.domain_calibration import N_TEXTS, DomainCalibration, drawn_text

TASK = tiny.task("toy", n_train=40, n_test=6)
OPTIONS = list(TASK.spec.options)
TEXTS = [TASK.prompt(row) for row in TASK.test]


def fitted(model, tokenizer, seed=0):
    return fit_method(DomainCalibration(Settings()), model, tokenizer, [], seed)


def test_scores_come_without_what_random_words_are_answered(tokenizer):
    model = tiny.model("llama")
    method = fitted(model, tokenizer)
    blanks = method.blanks(TASK, TASK.test[0])
    assert len(blanks) == N_TEXTS
    prior = 0
    for blank in blanks:
        prior += score_options(model, tokenizer, [TASK.prompt(blank)], OPTIONS).softmax(1)[0]
    plain = score_options(model, tokenizer, TEXTS, OPTIONS)
    expected = plain - (prior / N_TEXTS).log()
    adjusted = method.adjusted(TASK, TASK.test, plain)
    torch.testing.assert_close(adjusted, expected, atol=1e-4, rtol=1e-4)


def test_words_are_the_task_s_own_as_many_as_a_row_has_on_average(tokenizer):
    rng = np.random.default_rng(0)
    assert drawn_text(["same"] * 5, rng) == "same"
    assert drawn_text(["one two three", "one two three four five"], rng).count(" ") == 3
    assert drawn_text(["", ""], rng) == ""
    words = {word for row in TASK.train for word in row.fields["text"].split()}
    blanks = fitted(tiny.model("llama"), tokenizer).blanks(TASK, TASK.test[0])
    assert {word for blank in blanks for word in blank.fields["text"].split()} <= words


def test_no_label_is_read(tokenizer):
    model = tiny.model("llama")
    plain = score_options(model, tokenizer, TEXTS, OPTIONS)
    answers = []
    for shift in (0, 1):
        rows = tuple(replace(row, label=(row.label + shift) % 2) for row in TASK.train)
        task = replace(TASK, train=rows)
        answers.append(fitted(model, tokenizer).adjusted(task, TASK.test, plain))
    assert torch.equal(*answers)


def test_without_training_rows_it_says_so(tokenizer):
    method = fitted(tiny.model("llama"), tokenizer)
    with pytest.raises(ValueError, match="draws words from a task's training rows, and 'toy' has"):
        method.blanks(replace(TASK, train=()), TASK.test[0])
