"""Tuning: parameters that peft puts into a frozen model, trained on the answers' tokens of labelled rows."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids
from icrouting.runtime.progress import track
from icrouting.tasks.task import Example, Task

T = TypeVar("T")
BATCH_SIZE, HELD_BATCH_SIZE, WARM_UP, PATIENCE = 4, 16, 0.05, 3


def answered(
    decoder: Decoder,
    pairs: Sequence[tuple[Task, Example]],
) -> list[tuple[list[int], int]]:
    """Returns every row's zero-shot prompt as tokens, with the token that its right option begins with."""
    texts = [task.prompt(row) for task, row in pairs]
    token_lists = decoder.tokenize(texts) if texts else []
    asked = zip(texts, pairs, strict=True)
    ids = [
        option_ids(decoder.tokenizer, text, task.options(row))[row.label]
        for text, (task, row) in asked
    ]
    return list(zip(token_lists, ids, strict=True))


def tune(
    parameters: Sequence[nn.Parameter],
    rows: Sequence[tuple[T, int]],
    held: Sequence[tuple[T, int]],
    logits_of: Callable[[list[T]], Float[Tensor, "batch vocab"]],
    *,
    lr: float,
    n_epochs: int,
    rng: np.random.Generator,
) -> None:
    """Trains parameters in place on the cross-entropy of the answers over the vocabulary.

    AdamW without weight decay, batches of 4, 5 % of linear warm-up to `lr` and linear decay. A row is what `logits_of`
    reads of it, and its answer; that gives the logits at rows' last position, with gradients in training alone. If
    rows are `held` back, training ends before `n_epochs` once the loss on them has not fallen for three, and the
    parameters are those of its least value.
    """
    n_steps = n_epochs * math.ceil(len(rows) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, round(WARM_UP * n_steps)), n_steps)
    least, best, waited = math.inf, [], 0
    for _ in track(range(n_epochs), "tuning", [1] * n_epochs, "epochs"):
        order = rng.permutation(len(rows)).tolist()
        for start in range(0, len(order), BATCH_SIZE):
            with torch.enable_grad():
                loss = _mean_loss(logits_of, [rows[i] for i in order[start : start + BATCH_SIZE]])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
        if held and (now := _held_loss(logits_of, held)) < least:
            least, best, waited = now, [parameter.detach().clone() for parameter in parameters], 0
        elif held and (waited := waited + 1) == PATIENCE:
            break
    for parameter, value in zip(parameters, best, strict=False):  # none where nothing is held back
        parameter.data.copy_(value)


@torch.no_grad()
def _held_loss(logits_of: Callable[[list[T]], Tensor], held: Sequence[tuple[T, int]]) -> float:
    groups = [
        held[start : start + HELD_BATCH_SIZE] for start in range(0, len(held), HELD_BATCH_SIZE)
    ]
    return sum(_mean_loss(logits_of, group).item() * len(group) for group in groups) / len(held)


def _mean_loss(
    logits_of: Callable[[list[T]], Tensor], rows: Sequence[tuple[T, int]]
) -> Float[Tensor, ""]:
    logits = logits_of([row for row, _ in rows])
    return nn.functional.cross_entropy(
        logits, torch.tensor([answer for _, answer in rows], device=logits.device)
    )
