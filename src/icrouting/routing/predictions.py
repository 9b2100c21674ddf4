"""Predictions: what a model answers to rows without labels, one for each row, whatever it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten

import torch
from torch import Tensor

from icrouting.decoder.batches import tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import counted_tokens, have_finite_scores, score
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.rows import unlabelled
from icrouting.tasks.task import Example, LabelScoring, Task

ROUTED = "routed"
LEFT_ALONE = "left alone"
CALIBRATED = "calibrated"
ANSWERED = "answered"
TOO_LONG = "too long"
MALFORMED = "malformed"
NOT_FINITE = "not finite"
# Of a reason: a row may hold a book.
MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Prediction:
    """The answer to one row; `pandas.DataFrame(predictions)` makes a table of many.

    Attributes:
        label: the option with the highest score; None where there is no answer.
        probability: the label's share of the softmax over the options' scores; None without a
            label.
        status: how it was answered: "routed" or "left alone" by a router's gate, "calibrated" where
            what was left alone had its task's prior taken away, "answered" by any other method.
            Or why it was not: "too long" for the model's context, "not finite" scores
            or, with the reason behind a colon, "malformed".
        probabilities: that of each option; empty without a label.
    """

    label: str | None
    probability: float | None
    status: str
    probabilities: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        if self.label is None:
            return f"Prediction({self.status})"
        return f"Prediction({self.label!r}, {self.probability:.3f}, {self.status})"


@dataclass(frozen=True)
class Asked:
    """A row that can be asked.

    Attributes:
        place: its place among the rows.
        example: the row.
        prompt: what the model reads.
        options: what it chooses from.
        tokens: the prompt's.
    """

    place: int
    example: Example
    prompt: Prompt
    options: tuple[str, ...]
    tokens: list[int]


# From the rows that could be asked and the model's scores: those that count, and how each row was
# answered. Called behind the passes.
Settle = Callable[[Task, Sequence[Asked], Tensor], tuple[Tensor, Sequence[str]]]


def predicted(
    decoder: Decoder,
    task: Task,
    rows: Sequence[object],
    *,
    prompt: Callable[[Task, Example], Prompt],
    settled: Settle,
) -> list[Prediction]:
    """Returns a prediction for each row, in their order.

    A row that cannot be answered says why in its status.

    Args:
        decoder: the model, under the influence of whatever answers.
        task: how rows become prompts; its own rows are of no account.
        rows: dicts of columns.
        prompt: makes the prompt of a row.
        settled: makes of the model's scores those that count, and says how rows were answered.
    """
    asked, predictions = _askable(decoder, task, rows, prompt)
    asked, plain_scores, refused = _scored(decoder, asked, task.spec.label_scoring)
    predictions |= refused
    if asked:
        scores, statuses = settled(task, asked, plain_scores)
        options = [row.options for row in asked]
        is_finite = have_finite_scores(scores, plain_scores, options).tolist()
        for row, row_scores, fine, how in zip(asked, scores, is_finite, statuses, strict=True):
            predictions[row.place] = _of_scores(row.options, row_scores, how, fine)
    return [predictions[place] for place in range(len(rows))]


def _malformed(error: ValueError) -> Prediction:
    # A status is one line, whatever the row had in it.
    reason = shorten(str(error), MOST_CHARACTERS)
    return Prediction(None, None, f"{MALFORMED}: {reason}")


def _of_scores(options: Sequence[str], scores: Tensor, status: str, is_finite: bool) -> Prediction:
    """Returns the prediction that some scores make; those beyond a row's options fill it up."""
    if not is_finite:
        return Prediction(None, None, NOT_FINITE)
    shares = scores[: len(options)].double().softmax(0)
    best = int(shares.argmax())
    probabilities = dict(zip(options, shares.tolist(), strict=True))
    return Prediction(options[best], float(shares[best]), status, probabilities)


def _askable(
    decoder: Decoder,
    task: Task,
    rows: Sequence[object],
    prompt: Callable[[Task, Example], Prompt],
) -> tuple[list[Asked], dict[int, Prediction]]:
    """Returns the rows that make a prompt, and the others by their place."""
    examples = {}
    prompts = {}
    refused = {}
    for place, row in enumerate(rows):
        try:
            example = unlabelled(row, task.spec)
            prompts[place] = prompt(task, example)
            examples[place] = example
        except ValueError as error:
            refused[place] = _malformed(error)
    token_lists = tokenize(decoder.tokenizer, [each.text for each in prompts.values()])
    asked = []
    for place, tokens in zip(prompts, token_lists, strict=True):
        example = examples[place]
        asked.append(Asked(place, example, prompts[place], task.options(example), tokens))
    return asked, refused


def _scored(
    decoder: Decoder, asked: list[Asked], label_scoring: LabelScoring
) -> tuple[list[Asked], Tensor, dict[int, Prediction]]:
    """Returns the rows that can be scored, their scores, and the others by their place.

    Raises:
        ValueError: they cannot be scored, and it is not for what stands in any row.
    """
    try:
        return asked, _scores(decoder, asked, label_scoring), {}
    except ValueError:
        # Which row it is of, the message does not say.
        refused = _unanswerable(decoder, asked, label_scoring)
        # It is not the rows then.
        if not refused:
            raise
    answerable = [row for row in asked if row.place not in refused]
    return answerable, _scores(decoder, answerable, label_scoring), refused


def _unanswerable(
    decoder: Decoder, asked: Sequence[Asked], label_scoring: LabelScoring
) -> dict[int, Prediction]:
    """Returns the rows behind whose prompts no option can stand, or has room in the context."""
    refused = {}
    for row in asked:
        try:
            answers = counted_tokens(
                decoder.tokenizer, row.prompt.query, row.options, label_scoring, row.prompt.joint
            )
        except ValueError as error:
            refused[row.place] = _malformed(error)
            continue
        try:
            decoder.check_room(row.tokens, answers)
        except ValueError:
            refused[row.place] = Prediction(None, None, TOO_LONG)
    return refused


def _scores(decoder: Decoder, asked: Sequence[Asked], label_scoring: LabelScoring) -> Tensor:
    if not asked:
        return torch.zeros(0, 0)
    prompts = [row.prompt for row in asked]
    options = [row.options for row in asked]
    return score(decoder, prompts, options, label_scoring=label_scoring, finite_only=False)
