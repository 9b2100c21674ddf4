"""Domain-context calibration: equal to slow ways, and blind to labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.decoder.scoring import option_ids
from icrouting.methods import Settings, make
from icrouting.methods.calibration import Calibration
from icrouting.methods.domain_calibration import N_TEXTS

TASK = tiny.task("toy", n_test=6)


def fitted(tokenizer, seed=0):
    (method,) = make(["domain-calibration"], Settings())
    return fit_method(method, tiny.model("llama"), tokenizer, [], seed)


def with_text(task, text):
    rows = [replace(row, fields=dict.fromkeys(row.fields, text)) for row in task.train]
    return replace(task, train=tuple(rows))


@pytest.mark.parametrize("label_scoring", ["first", "sum", "mean"])
def test_it_takes_away_the_log_of_the_mean_probabilities_on_random_words(tokenizer, label_scoring):
    """Against one prompt at a time; the tiny task's options are one token each."""
    task = replace(TASK, spec=replace(TASK.spec, label_scoring=label_scoring))
    method = fitted(tokenizer)
    blanks = method._blanks(task, task.test[0])
    shares = []
    for blank in blanks:
        prompt = task.prompt(blank)
        ids = option_ids(tokenizer, prompt, task.spec.options)
        with torch.no_grad():
            logits = method.model(**tokenizer(prompt, return_tensors="pt")).logits
        shares.append(logits[0, -1, ids].softmax(-1))
    prior = torch.stack(shares).mean(0).log()
    scores = torch.randn(len(task.test), len(task.spec.options))
    adjusted = method.adjusted(task, task.test, scores)
    assert len(shares) == N_TEXTS
    assert torch.allclose(adjusted.log_softmax(1), (scores - prior).log_softmax(1), atol=1e-4)


def test_texts_are_the_task_s_words_in_its_mean_length(tokenizer):
    blanks = fitted(tokenizer)._blanks(TASK, TASK.test[0])
    texts = [row.fields["text"].split() for row in TASK.train]
    words = {word for text in texts for word in text}
    drawn = [blank.fields["text"].split() for blank in blanks]
    assert {len(text) for text in drawn} == {round(np.mean([len(text) for text in texts]))}
    assert {word for text in drawn for word in text} <= words
    assert len({tuple(text) for text in drawn}) > 1


def test_with_one_word_it_is_contextual_calibration_with_that_word_repeated(tokenizer, monkeypatch):
    task = with_text(TASK, "film film film")
    monkeypatch.setattr("icrouting.methods.calibration.CONTENT_FREE", ("film film film",))
    contextual = fit_method(Calibration(Settings()), tiny.model("llama"), tokenizer, [])
    scores = torch.randn(len(task.test), len(task.spec.options))
    expected = contextual.adjusted(task, task.test, scores)
    found = fitted(tokenizer).adjusted(task, task.test, scores)
    assert torch.allclose(found, expected, atol=1e-5)


def test_no_label_is_read(tokenizer):
    other = replace(TASK, train=tuple(replace(row, label=0) for row in TASK.train))
    scores = torch.randn(len(TASK.test), len(TASK.spec.options))
    found = [fitted(tokenizer).adjusted(task, TASK.test, scores) for task in (TASK, other)]
    assert torch.equal(*found)


def test_a_seed_draws_its_own_words(tokenizer):
    blanks = [fitted(tokenizer, seed)._blanks(TASK, TASK.test[0]) for seed in (0, 0, 1)]
    assert blanks[0] == blanks[1] != blanks[2]


def test_tasks_alike_but_for_their_training_rows_have_priors_of_their_own(tokenizer):
    method = fitted(tokenizer)
    scores = torch.zeros(len(TASK.test), len(TASK.spec.options))
    other = with_text(TASK, "film")
    found = [method.adjusted(task, TASK.test, scores) for task in (TASK, other)]
    assert not torch.allclose(*found)


def test_a_task_without_training_rows_is_refused_in_a_sentence(tokenizer):
    task = replace(TASK, train=())
    scores = torch.zeros(len(task.test), len(task.spec.options))
    with pytest.raises(ValueError, match="draws words from the training rows of 'toy'"):
        fitted(tokenizer).adjusted(task, task.test, scores)


@pytest.mark.parametrize("name", ["calibration", "domain-calibration"])
def test_options_further_apart_than_probabilities_reach_are_divided_too(
    tokenizer, monkeypatch, name
):
    """As summed log-probabilities of long labels may be: no score becomes infinite."""
    (method,) = make([name], Settings())
    fit_method(method, tiny.model("llama"), tokenizer, [TASK])
    far = torch.tensor([0.0, -300.0])
    monkeypatch.setattr(
        "icrouting.methods.calibration.score",
        lambda decoder, prompts, options, **_: far.expand(len(prompts), 2).clone(),
    )
    scores = torch.randn(len(TASK.test), 2)
    adjusted = method.adjusted(TASK, TASK.test, scores)
    torch.testing.assert_close(adjusted, scores - far, atol=1e-3, rtol=0)
