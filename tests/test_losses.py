import math

import pytest
import torch

from icrouting.fitting import losses

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, 13, generator=GENERATOR) * 3


def test_entropy_is_that_of_the_probabilities():
    probabilities = LOGITS.softmax(-1)
    assert torch.allclose(
        losses.entropy(LOGITS), -(probabilities * probabilities.log()).sum(-1), atol=1e-5
    )
    assert losses.entropy(torch.zeros(1, 13)).item() == pytest.approx(math.log(13))


def test_option_loss_is_the_cross_entropy_of_the_renormalised_options():
    ids = torch.tensor([[1, 4, -1]] * 5)
    labels = torch.tensor([0, 1, 0, 1, 1])
    probabilities = LOGITS.softmax(-1)[:, [1, 4]]
    renormalised = probabilities / probabilities.sum(-1, keepdim=True)
    expected = -renormalised.gather(1, labels[:, None]).log().mean()
    assert torch.allclose(losses.option_loss(LOGITS, ids, labels), expected, atol=1e-5)


def test_confidence_loss_punishes_only_rows_that_got_less_certain():
    plain = losses.entropy(LOGITS)
    assert losses.confidence_loss(LOGITS, plain + 1) == 0
    shift = torch.tensor([1.0, -1.0, 0.0, -3.0, 2.0])
    expected = (1.0 + 3.0) / 5  # rows whose plain entropy lies 1 and 3 nats below
    assert losses.confidence_loss(LOGITS, plain + shift).item() == pytest.approx(expected, abs=1e-5)


def test_sparsity_weighs_deeper_layers_more():
    alpha = torch.zeros(2, 5, 3)
    alpha[:, 0] = -1
    shallow = losses.sparsity_loss(alpha, 3.0)
    deep = losses.sparsity_loss(alpha.flip(1), 3.0)
    assert shallow.item() == pytest.approx(1.0 / 5)
    assert deep.item() == pytest.approx(3.0 / 5)


def test_gate_loss_is_the_mean_gate():
    gates = torch.rand(2, 5, 7, generator=GENERATOR)
    assert losses.gate_loss(gates).item() == pytest.approx(gates.mean().item())
