"""Prompts: a query with or without demonstrations, and the seeded, balanced choice of those."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icrouting.tasks import Example, Task


@dataclass(frozen=True)
class Prompt:
    """What a model reads: `context + query`, ending right before the space and the answer.

    The two are kept apart because many prompts share one context, which then needs computing only once.

    Attributes:
        context: demonstrations, each followed by a newline; empty for zero-shot.
        query: the zero-shot prompt of the example in question.
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


def balanced_demos(task: Task, per_class: int, rng: np.random.Generator, exclude: int | None = None) -> list[Example]:
    """Returns `per_class` training examples of every class, shuffled (paper, section 2).

    A class with fewer examples gives all it has; multiple-choice tasks are balanced over the letters.

    Args:
        task: the task to draw from.
        per_class: demonstrations per class.
        rng: source of the draw.
        exclude: index of a training example that must not be drawn (the query itself).
    """
    order = rng.permutation(len(task.train))
    taken: dict[int, list[Example]] = {}
    for index in order:
        example = task.train[index]
        chosen = taken.setdefault(example.label, [])
        if index != exclude and len(chosen) < per_class:
            chosen.append(example)
    demos = [example for chosen in taken.values() for example in chosen]
    if not demos:
        raise ValueError(f"task {task.name!r} has no training example left for {per_class} demonstrations a class")
    return [demos[i] for i in rng.permutation(len(demos))]


def few_shot(task: Task, example: Example, demos: Sequence[tuple[Task, Example]]) -> Prompt:
    """Returns an example's prompt behind demonstrations, which may be of other tasks."""
    return Prompt("".join(demonstration(of, demo) for of, demo in demos), task.prompt(example))


def extraction_prompts(task: Task, n_prompts: int, per_class: int, rng: np.random.Generator) -> list[str]:
    """Returns few-shot prompts of training queries, each with its own balanced demonstrations (section 2)."""
    n_prompts = min(n_prompts, len(task.train))
    texts = []
    for index in rng.permutation(len(task.train))[:n_prompts]:
        demos = balanced_demos(task, per_class, rng, exclude=int(index))
        texts.append(few_shot(task, task.train[index], [(task, demo) for demo in demos]).text)
    return texts
