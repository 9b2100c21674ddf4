"""Prompts: a query with or without demonstrations, and the seeded, balanced choice of those."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from icrouting.runtime.showing import in_short
from icrouting.tasks.task import Example, Task


@dataclass(frozen=True)
class Prompt:
    """What a model reads: `context + query`, ending right before the joint and the answer.

    `context` holds demonstrations, each followed by a newline, and is empty for zero-shot; `query`
    is the zero-shot prompt. They are kept apart because many prompts share one context, which then
    needs computing only once. `joint` stands between the prompt and an answer: a space, or nothing
    in most chats (`Task.joint`).
    """

    context: str
    query: str
    joint: str = " "

    def __repr__(self) -> str:
        context = f"{len(self.context):,} characters of context, " if self.context else ""
        return f"Prompt({context}{in_short(self.query)!r})"

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.context + self.query


def demonstration(task: Task, example: Example) -> str:
    """Returns an example with its answer and a newline, as it stands in a few-shot context.

    In a chat it is a conversation of its own, as the template ends it.
    """
    if task.spec.chat:
        return task.chat.demonstration(task.question(example), task.answer(example))
    return f"{answered(task, example)}\n"


def answered(task: Task, example: Example) -> str:
    """Returns an example's prompt with its answer, which ends the text."""
    return f"{task.prompt(example)}{task.joint}{task.answer(example)}"


def zero_shot(task: Task, example: Example) -> Prompt:
    """Returns an example's prompt alone."""
    return Prompt("", task.prompt(example), task.joint)


def balanced_demos(
    task: Task, per_class: int, rng: np.random.Generator, exclude: Sequence[int] = ()
) -> list[Example]:
    """Returns `per_class` training examples of every class, shuffled (paper, section 2).

    A class with fewer examples gives all it has; multiple-choice tasks are balanced over letters.

    Args:
        task: gives the training examples.
        per_class: examples of each class.
        rng: draws and shuffles them.
        exclude: indices of training examples that are not drawn (the queries themselves).

    Raises:
        ValueError: no training example is left.
    """
    order = rng.permutation(len(task.train))
    labels = task.train_labels[order]
    allowed = ~np.isin(order, exclude)
    # Classes in the order in which the permutation meets them, which the last shuffle starts from.
    first_places = np.unique(labels, return_index=True)[1]
    classes = labels[np.sort(first_places)]
    chosen: list[int] = []
    for label in classes:
        chosen += order[(labels == label) & allowed][:per_class].tolist()
    if not chosen:
        raise ValueError(
            f"task {task.name!r} has no training example left "
            f"for {per_class} demonstrations a class"
        )
    return [task.train[index] for index in rng.permutation(chosen)]


def few_shot(task: Task, example: Example, demos: Sequence[tuple[Task, Example]]) -> Prompt:
    """Returns an example's prompt behind demonstrations, which may be of other tasks."""
    turns = [(demo_task.question(demo), demo_task.answer(demo)) for demo_task, demo in demos]
    return behind(task, example, turns)


def behind(task: Task, example: Example, turns: Sequence[tuple[str, str]]) -> Prompt:
    """Returns an example's prompt behind questions, each with the answer that is shown for it.

    In a chat they are earlier turns of the user and the assistant.
    """
    question = task.question(example)
    if task.spec.chat:
        context, query = task.chat.behind(turns, question)
        return Prompt(context, query, task.joint)
    lines = [f"{shown_question} {answer}\n" for shown_question, answer in turns]
    return Prompt("".join(lines), question)


def episodes(
    task: Task, n_episodes: int, per_class: int, rng: np.random.Generator
) -> Iterator[tuple[list[Example], Example]]:
    """Yields balanced demonstrations and a training query that is none of them.

    A query returns when all had a turn.
    """
    # Where there is no row at all, `balanced_demos` says so on the first turn.
    order = rng.permutation(len(task.train)).tolist() or [0]
    for index in islice(cycle(order), n_episodes):
        demos = balanced_demos(task, per_class, rng, exclude=[index])
        yield demos, task.train[index]


def extraction_prompts(
    task: Task, n_prompts: int, per_class: int, rng: np.random.Generator, per_context: int = 1
) -> Iterator[Prompt]:
    """Yields few-shot prompts of training queries behind balanced demonstrations (section 2).

    Every query has demonstrations of its own. Differs: with `per_context` above 1, that many share
    theirs.
    """
    for sharing, demos in shared_episodes(task, n_prompts, per_class, rng, per_context):
        for place in sharing:
            yield few_shot(task, task.train[place], [(task, demo) for demo in demos])


def shared_episodes(
    task: Task, n_queries: int, per_class: int, rng: np.random.Generator, per_context: int
) -> Iterator[tuple[list[int], list[Example]]]:
    """Yields the places of training queries, with the balanced demonstrations that they share."""
    places = rng.permutation(len(task.train))[:n_queries].tolist()
    for start in range(0, len(places), per_context):
        # None of those that share a context may stand in it with its answer.
        sharing = places[start : start + per_context]
        demos = balanced_demos(task, per_class, rng, exclude=sharing)
        yield sharing, demos
