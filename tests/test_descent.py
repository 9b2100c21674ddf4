"""The one training loop: against a plain one, and when it draws its batches."""

import torch

from icrouting.methods.descent import descend, in_batches

TARGETS = torch.tensor([3.0, -2.0, 7.0, 1.0, 5.0])


def loss_of(weight):
    def mean_square(rows):
        return (weight - TARGETS[rows]).square().mean()

    return mean_square


def test_batches_hold_every_row_once_in_order():
    assert in_batches([4, 2, 0, 3, 1], 2) == [[4, 2], [0, 3], [1]]
    assert in_batches((), 2) == []


@torch.no_grad()
def test_steps_are_clipped_and_follow_the_schedule():
    """Plain gradient descent, written out; gradients are off where the loop is called."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    batches = in_batches([4, 2, 0, 3, 1], 2)
    losses = descend(optimizer, batches, loss_of(weight), schedule, clip=1.5)
    value = torch.zeros(1)
    gradients = []
    for step, (rows, loss) in enumerate(zip(batches, losses, strict=True)):
        assert not loss.requires_grad
        assert torch.allclose(loss, (value - TARGETS[rows]).square().mean())
        gradients.append(2 * (value - TARGETS[rows]).mean())
        value = value - 0.5 / (1 + step) * gradients[-1].clamp(-1.5, 1.5)
    assert torch.allclose(weight, value, atol=1e-5)
    assert max(abs(float(gradient)) for gradient in gradients) > 1.5, "the clip was at work"


def test_a_batch_is_drawn_after_the_step_before_it():
    """So that orders and dropout may come from one stream of random numbers."""
    weight = torch.zeros(1, requires_grad=True)
    seen = []

    def batches():
        for rows in ([0], [1], [2]):
            seen.append(weight.item())
            yield rows

    descend(torch.optim.SGD([weight], lr=0.1), batches(), loss_of(weight))
    assert len(set(seen)) == 3
