"""Tuning: what peft puts into a frozen model, trained on labelled rows."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.labels import Parting, partings
from icrouting.decoder.scoring import counted_tokens
from icrouting.methods.descent import descend, in_batches
from icrouting.runtime.progress import track
from icrouting.tasks.task import Example, Task

T = TypeVar("T")
# Returns the logits at rows' last position, of what it reads of each row.
LogitsOf = Callable[[list[T]], Float[Tensor, "batch vocab"]]
# What that reads of a row, and the token with which the row's answer begins or goes on.
AnsweredRow = tuple[T, int]

BATCH_SIZE = 4
HELD_BATCH_SIZE = 16
WARM_UP = 0.05
PATIENCE = 3


def answered(
    decoder: Decoder, pairs: Sequence[tuple[Task, Example]]
) -> list[AnsweredRow[list[int]]]:
    """Returns each row's zero-shot prompt as tokens, with the token that the answer begins with.

    Where a task scores whole labels, and the answer parts from other options further on, there is
    one more for every such place: the prompt and the answer up to there, with the token behind.
    """
    texts = [task.prompt(example) for task, example in pairs]
    token_lists = decoder.tokenize(texts)
    rows = []
    for tokens, places in zip(token_lists, answer_partings(decoder, pairs), strict=True):
        for parting in places:
            rows.append(([*tokens, *parting.beginning], parting.token))
    return rows


def answer_partings(decoder: Decoder, pairs: Sequence[tuple[Task, Example]]) -> list[list[Parting]]:
    """Returns where each row's answer parts from the other options behind its prompt."""
    parted = []
    for task, example in pairs:
        tokens = counted_tokens(
            decoder.tokenizer,
            task.prompt(example),
            task.options(example),
            task.spec.label_scoring,
            task.joint,
        )
        parted.append(partings(tokens, example.label))
    return parted


def tune(
    parameters: Sequence[nn.Parameter],
    rows: Sequence[AnsweredRow[T]],
    held: Sequence[AnsweredRow[T]],
    logits_of: LogitsOf[T],
    *,
    lr: float,
    n_epochs: int,
    rng: np.random.Generator,
) -> None:
    """Trains parameters in place on the cross-entropy of the answers.

    That is taken over the vocabulary. AdamW without weight decay, batches of 4, 5 % of linear
    warm-up to `lr` and linear decay. If rows are held back, training ends before `n_epochs` once
    the loss on them has not fallen for three, and the parameters are those of its least value.

    Args:
        parameters: What is trained.
        rows: The training rows.
        held: The rows that are held back; there may be none.
        logits_of: Reads rows, with gradients on in training alone.
        lr: The highest learning rate.
        n_epochs: The most passes over the rows.
        rng: Draws the rows' order, anew for every epoch.
    """
    n_steps = n_epochs * math.ceil(len(rows) / BATCH_SIZE)
    n_warm_up = max(1, round(WARM_UP * n_steps))
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, n_warm_up, n_steps)
    least_loss = math.inf
    best_values: list[Tensor] = []
    n_epochs_waited = 0

    def loss_of(batch_rows: Sequence[int]) -> Tensor:
        return _mean_loss(logits_of, [rows[i] for i in batch_rows])

    for _ in track(range(n_epochs), "tuning", [1] * n_epochs, "epochs"):
        order = rng.permutation(len(rows)).tolist()
        descend(optimizer, in_batches(order, BATCH_SIZE), loss_of, schedule)
        if not held:
            continue
        held_loss = _held_loss(logits_of, held)
        if held_loss < least_loss:
            # Clones, since training goes on in place.
            least_loss = held_loss
            best_values = [parameter.detach().clone() for parameter in parameters]
            n_epochs_waited = 0
        else:
            n_epochs_waited += 1
            if n_epochs_waited == PATIENCE:
                break
    # There are none where no rows are held back, or where no loss was a number.
    if best_values:
        for parameter, value in zip(parameters, best_values, strict=True):
            parameter.data.copy_(value)


@torch.no_grad()
def _held_loss(logits_of: LogitsOf[T], held: Sequence[AnsweredRow[T]]) -> float:
    total = 0.0
    for batch in in_batches(held, HELD_BATCH_SIZE):
        loss = _mean_loss(logits_of, batch).item()
        # The last batch may be smaller, and counts for less.
        total += loss * len(batch)
    return total / len(held)


def _mean_loss(logits_of: LogitsOf[T], rows: Sequence[AnsweredRow[T]]) -> Float[Tensor, ""]:
    logits = logits_of([row for row, _ in rows])
    answers = [answer for _, answer in rows]
    target = torch.tensor(answers, device=logits.device)
    return nn.functional.cross_entropy(logits, target)
