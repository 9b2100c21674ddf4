"""Descent: the one loop in which methods train what they put beside a model."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Row = TypeVar("Row")
Rows = TypeVar("Rows")


def in_batches(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Returns rows in batches of `size`, in their order; the last one may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def descend(
    optimizer: Optimizer,
    batches: Iterable[Rows],
    loss_of: Callable[[Rows], Float[Tensor, ""]],
    schedule: LRScheduler | None = None,
    clip: float | None = None,
) -> list[Float[Tensor, ""]]:
    """Takes one step of the optimiser a batch, and returns the batches' losses.

    A batch's loss is that before its step. What differs between methods comes from outside: where
    parameters stand in the model, what the loss is, and which rows come when. A method that stops
    early calls this once an epoch, with the same optimiser and schedule.

    Args:
        optimizer: Holds the parameters that are trained, in place.
        batches: What `loss_of` reads, one batch a step; each is drawn after the step before it.
        loss_of: Returns a batch's loss; it is called with gradients on.
        schedule: Moves the learning rate after every step; without one it stays.
        clip: The largest norm of all parameters' gradient together; without one it has no limit.
    """
    # The norm is that of all groups together, whatever their learning rates.
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    losses = []
    for batch in batches:
        # Whoever fits a method may have gradients off.
        with torch.enable_grad():
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        # Not as a number, which would make every step wait for the accelerator.
        losses.append(loss.detach())
    return losses
