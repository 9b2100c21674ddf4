"""Learned task vectors in closed form."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import tiny
from fitted import SMALL, fit_method
from icrouting.decoder.scoring import score_options
from icrouting.methods import Settings
from icrouting.methods.ridge_vectors import RidgeVectors, ridge

TASK = tiny.task("toy", n_train=40, n_test=6)
TEXTS = [TASK.prompt(row) for row in TASK.test]
OPTIONS = list(TASK.spec.options)


def states(n=30, width=5):
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, width, generator=rng) + 3
    return inputs, inputs @ torch.randn(width, width, generator=rng) + 1


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_the_map_is_the_ridge_regression_of_the_moves(penalty):
    inputs, outputs = states()
    weight, bias = ridge(inputs, outputs, penalty)
    centred = inputs - inputs.mean(0)
    strength = penalty * float(centred.square().sum()) / inputs.shape[1]
    slow = Ridge(alpha=strength).fit(inputs.numpy(), (outputs - inputs).numpy())
    expected = inputs.numpy() + slow.predict(inputs.numpy())
    np.testing.assert_allclose((inputs @ weight + bias).numpy(), expected, atol=1e-4)


def test_states_that_do_not_move_are_left_as_they_are():
    inputs, _ = states()
    weight, bias = ridge(inputs, inputs, 1.0)
    assert torch.allclose(weight, torch.eye(5), atol=1e-6)
    assert bias.abs().max() < 1e-5


def test_a_penalty_without_end_leaves_the_mean_move():
    inputs, outputs = states()
    weight, bias = ridge(inputs, outputs, 1e9)
    assert torch.allclose(weight, torch.eye(5), atol=1e-4)
    assert torch.allclose(bias, (outputs - inputs).mean(0), atol=1e-3)


def test_the_identity_changes_no_answer_and_another_map_does(tokenizer):
    model = tiny.model("llama")
    plain = score_options(model, tokenizer, TEXTS, OPTIONS)
    method = fit_method(RidgeVectors(Settings(**SMALL)), model, tokenizer, [TASK])
    with method.attached(model, tokenizer, TASK) as attached:
        assert not torch.allclose(attached.score(TEXTS, OPTIONS), plain, atol=1e-4)
    width = len(method.bias)
    method.weight = torch.eye(width)
    method.bias = torch.zeros(width)
    with method.attached(model, tokenizer, TASK) as attached:
        assert torch.allclose(attached.score(TEXTS, OPTIONS), plain, atol=1e-5)
    assert torch.equal(score_options(model, tokenizer, TEXTS, OPTIONS), plain)
