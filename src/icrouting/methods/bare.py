"""Bare prompts: texts scored by a method that is asked about rows."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import score
from icrouting.decoder.texts import prompts_of
from icrouting.tasks.chat import Messages
from icrouting.tasks.task import Example, LabelScoring, Task, TaskSpec

Adjust = Callable[[Task, Sequence[Example], Tensor], Tensor]


def score_texts(
    decoder: Decoder,
    prompts: Sequence[str | Messages],
    options: Sequence[str] | Sequence[Sequence[str]],
    adjusted: Adjust,
    label_scoring: LabelScoring,
) -> Float[Tensor, "n_prompts n_options"]:
    """Returns the option scores that count after each prompt; -inf where it has fewer options.

    Args:
        decoder: the model, under the method's influence.
        prompts: zero-shot prompts, or conversations.
        options: the answers to choose from, for all prompts or a list each.
        adjusted: makes of the model's scores those that count, for rows of a task.
        label_scoring: how options of several tokens are scored.
    """
    whole_prompts = prompts_of(prompts, decoder.tokenizer)
    texts = [prompt.text for prompt in whole_prompts]
    plain_scores = score(decoder, whole_prompts, options, label_scoring=label_scoring)
    scores = torch.full_like(plain_scores, -torch.inf)
    rows_by_options: dict[tuple[str, ...], list[int]] = {}
    for row, row_options in enumerate(_by_prompt(options, len(texts))):
        rows_by_options.setdefault(row_options, []).append(row)
    # Each prompt is the one field of a row, of a task whose options are the prompt's.
    for row_options, rows in rows_by_options.items():
        spec = TaskSpec("prompts", "far", "{prompt}", row_options, label_scoring=label_scoring)
        task = Task(spec, (), ())
        examples = [Example({"prompt": texts[row]}, (), 0) for row in rows]
        n_options = len(row_options)
        scores[rows, :n_options] = adjusted(task, examples, plain_scores[rows, :n_options])
    return scores


def _by_prompt(
    options: Sequence[str] | Sequence[Sequence[str]], n_prompts: int
) -> list[tuple[str, ...]]:
    """Returns each prompt's options."""
    shared = [option for option in options if isinstance(option, str)]
    if shared:
        return [tuple(shared)] * n_prompts
    return [tuple(row_options) for row_options in options]
