"""How long the texts are that a fit reads, from a sample of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from icrouting.config import FitConfig
from icrouting.fitting.drawing import drawn_prompts
from icrouting.fitting.rows import rows_to_learn_from
from icrouting.tasks.task import Task

# Gives the lengths of texts in tokens, which need not be whole where they are reckoned.
TokenCounts = Callable[[list[str]], list[float]]


@dataclass(frozen=True)
class Texts:
    """One task's prompts in one stage.

    Attributes:
        count: how many there are.
        tokens: the sum of their lengths.
        squares: the sum of their lengths squared.
        longest: the length of the longest one.
    """

    count: int
    tokens: int
    squares: int
    longest: int


def measured(
    texts: list[str], count: int, token_counts: TokenCounts, limit: int | None = None
) -> Texts:
    """Returns what `count` texts are together, of which some are a sample.

    Args:
        texts: the sample, whose mean length stands for all.
        count: number of all texts.
        token_counts: gives the lengths of texts.
        limit: tokens that are left of a longer text; None leaves all.
    """
    lengths = np.array(token_counts(texts))
    if limit is not None:
        lengths = np.minimum(lengths, limit)
    scale = count / len(texts)
    return Texts(
        count=count,
        tokens=round(lengths.sum() * scale),
        squares=round((lengths**2).sum() * scale),
        longest=math.ceil(lengths.max()),
    )


def none_fits(task: Task, context_length: int, config: FitConfig) -> ValueError:
    """Returns the error where no extraction prompt of a task fits a model's context."""
    advice = "leave the task out"
    if config.shown_per_class:
        advice = f"lower demos_per_class ({config.demos_per_class}), or {advice}"
    kind = "few-shot" if config.shown_per_class else "zero-shot"
    return ValueError(
        f"every {kind} prompt of task {task.name!r} is longer than the model's context of "
        f"{context_length} tokens: {advice}"
    )


def prompts_by_task(
    tasks: Sequence[Task],
    config: FitConfig,
    token_counts: TokenCounts,
    sample: int,
    context_length: int | None,
) -> dict[str, Texts]:
    """Returns every task's few-shot prompts; those read are the fit's first ones.

    Those that are longer than the model's context are left out, as in the fit.

    Raises:
        ValueError: all prompts of a task are.
    """
    # Which rows are nearest takes an encoder's pass over all of them: of a few any will do.
    if config.demo_selection == "nearest":
        config = replace(config, demo_selection="random")
    # As `extraction` draws them.
    rng = np.random.default_rng(config.seed)
    by_task = {}
    for task in tasks:
        n_prompts = min(config.n_prompts, len(task.train))
        prompts = drawn_prompts(task, config, rng, min(n_prompts, sample))
        texts = [prompt.text for prompt in prompts]
        fitting = texts
        if context_length is not None:
            lengths = token_counts(texts)
            places = range(len(texts))
            fitting = [texts[place] for place in places if lengths[place] <= context_length]
            if not fitting:
                raise none_fits(task, context_length, config)
        count = round(n_prompts * len(fitting) / len(texts))
        by_task[task.name] = measured(fitting, count, token_counts)
    return by_task


def queries_by_task(
    tasks: Sequence[Task],
    config: FitConfig,
    token_counts: TokenCounts,
    sample: int,
    context_length: int | None,
) -> dict[str, Texts]:
    """Returns every task's zero-shot queries; those read are the fit's first ones."""
    limit = min(config.max_tokens, context_length or config.max_tokens)
    # As `queries` draws them.
    rng = np.random.default_rng(config.seed + 1)
    by_task = {}
    for task in tasks:
        rows = rows_to_learn_from(task, tasks, config)
        n_queries = min(config.n_queries, len(rows))
        order = rng.permutation(len(rows))[: min(n_queries, sample)]
        texts = [task.prompt(rows[place]) for place in order]
        by_task[task.name] = measured(texts, n_queries, token_counts, limit)
    return by_task
