"""Prompts: a query with or without demonstrations, and the seeded, balanced choice of those."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from icrouting.tasks.task import Example, Task


@dataclass(frozen=True)
class Prompt:
    """What a model reads: `context + query`, ending right before the space and the answer.

    `context` holds demonstrations, each followed by a newline, and is empty for zero-shot; `query` is the zero-shot
    prompt. They are kept apart because many prompts share one context, which then needs computing only once.
    """

    context: str
    query: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.context + self.query


def demonstration(task: Task, example: Example) -> str:
    """Returns an example with its answer and a newline, as it stands in a few-shot context."""
    return f"{task.prompt(example)} {task.answer(example)}\n"


def balanced_demos(
    task: Task, per_class: int, rng: np.random.Generator, exclude: Sequence[int] = ()
) -> list[Example]:
    """Returns `per_class` training examples of every class, shuffled (paper, section 2).

    A class with fewer examples gives all it has; multiple-choice tasks are balanced over the letters. Training examples
    whose indices are in `exclude` (the queries themselves) are not drawn.
    """
    order = rng.permutation(len(task.train))
    labels, allowed = task.train_labels[order], ~np.isin(order, exclude)
    classes = labels[np.sort(np.unique(labels, return_index=True)[1])]
    chosen = np.concatenate(
        [order[:0], *(order[(labels == label) & allowed][:per_class] for label in classes)]
    )
    if not len(chosen):
        raise ValueError(
            f"task {task.name!r} has no training example left for {per_class} demonstrations a class"
        )
    return [task.train[i] for i in rng.permutation(chosen)]


def few_shot(task: Task, example: Example, demos: Sequence[tuple[Task, Example]]) -> Prompt:
    """Returns an example's prompt behind demonstrations, which may be of other tasks."""
    return Prompt("".join(demonstration(of, demo) for of, demo in demos), task.prompt(example))


def episodes(
    task: Task, n_episodes: int, per_class: int, rng: np.random.Generator
) -> Iterator[tuple[list[Example], Example]]:
    """Yields balanced demonstrations and a training query that is none of them; a query returns when all had a turn."""
    order = rng.permutation(len(task.train)).tolist() or [
        0
    ]  # without any, `balanced_demos` says so
    for index in islice(cycle(order), n_episodes):
        yield balanced_demos(task, per_class, rng, exclude=[index]), task.train[index]


def extraction_prompts(
    task: Task, n_prompts: int, per_class: int, rng: np.random.Generator, per_context: int = 1
) -> Iterator[Prompt]:
    """Yields few-shot prompts of training queries behind balanced demonstrations (section 2).

    Every query has demonstrations of its own; Differs: with `per_context` above 1, that many share theirs.
    """
    queries = rng.permutation(len(task.train))[:n_prompts].tolist()
    for start in range(0, len(queries), per_context):
        group = queries[start : start + per_context]
        demos = [(task, demo) for demo in balanced_demos(task, per_class, rng, exclude=group)]
        yield from (few_shot(task, task.train[index], demos) for index in group)
