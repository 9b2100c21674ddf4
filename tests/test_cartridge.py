"""Cartridges: a prefix that starts as demonstrations, and is taught by them."""

import numpy as np
import pytest
import torch

import tiny
from fitted import SMALL, fit_method
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import score_options
from icrouting.methods import Settings
from icrouting.methods.cartridge import Cartridge
from icrouting.methods.virtual_tokens import in_front
from icrouting.tasks.prompts import few_shot

TASK = tiny.task("toy", n_train=40, n_test=6)
TEXTS = [TASK.prompt(row) for row in TASK.test]
OPTIONS = list(TASK.spec.options)


def unfitted(family, tokenizer):
    method = Cartridge(Settings(**SMALL))
    method.decoder = Decoder.of(tiny.model(family), tokenizer)
    method.sources = [TASK]
    method.tried = []
    return method


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_before_any_step_it_is_the_demonstrations(family, tokenizer):
    method = unfitted(family, tokenizer)
    demos = method._demonstrations(np.random.default_rng(0))
    prompts = [few_shot(TASK, row, demos) for row in TASK.test]
    model = method.decoder.base
    expected = score_options(model, tokenizer, [prompt.text for prompt in prompts], OPTIONS)
    with torch.no_grad():
        start = method.start(method.decoder.tokenize([prompts[0].context])[0])
    plain = score_options(model, tokenizer, TEXTS, OPTIONS)
    with in_front(model, method.kind, start):
        scores = score_options(model, tokenizer, TEXTS, OPTIONS)
    assert not torch.allclose(plain, expected, atol=1e-3)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(score_options(model, tokenizer, TEXTS, OPTIONS), plain)


def test_it_is_as_long_as_its_demonstrations_and_answers(tokenizer):
    model = tiny.model("llama")
    method = fit_method(Cartridge(Settings(**SMALL)), model, tokenizer, [TASK])
    assert len(method.soft_prompt) == len(method.context_tokens)
    # Two demonstrations of each of two classes.
    assert method.n_labelled == 4 + method.n_validation
    with method.attached(model, tokenizer, TASK) as attached:
        assert attached.score(TEXTS, OPTIONS).isfinite().all()


def test_rows_that_are_shown_teach_nothing(tokenizer):
    method = unfitted("llama", tokenizer)
    demos = method._demonstrations(np.random.default_rng(0))
    shown = {id(row) for _, row in demos}
    taught = method._taught_rows(np.random.default_rng(1), demos)
    assert taught
    assert not shown & {id(row) for _, row in taught}
    # Where nothing else is there, they have to.
    few = [(TASK, row) for row in TASK.train]
    assert method._taught_rows(np.random.default_rng(1), few) == few
