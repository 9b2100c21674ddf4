"""Tasks: labelled examples, and the template that turns one into a prompt."""

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Example:
    """One labelled test or training item.

    `fields` are the texts that fill the template, by name; `choices` the answers to choose from,
    where every item brings its own (else empty); `label` is an index into the task's options.

    Example:
        >>> from icrouting import Example
        >>> example = Example(fields={"text": "a joy to watch"}, choices=(), label=1)
        >>> example.fields["text"]
        'a joy to watch'
    """

    fields: Mapping[str, str]
    choices: tuple[str, ...]
    label: int

    def __post_init__(self):
        # A word would be read as one choice a letter.
        if isinstance(self.choices, str):
            raise TypeError(f"choices must be a tuple of texts, got {self.choices!r}")


@dataclass(frozen=True)
class TaskSpec:
    r"""How a task reads: everything but its rows (paper, table 6).

    Attributes:
        name: unique name.
        group: "in-domain", "near" or "far", as the paper groups its tasks.
        template: prompt text with `{field}` slots; `{choices}` becomes one "A. text" line per
            choice and `{letters}` becomes "A/B/...". The label follows after one space.
        options: the answer words in label order; empty means letters, one per choice.
        words: replacements of field values, `{field: {value: text}}`, done before the template is
            filled.

    Example:
        >>> from icrouting import TaskSpec
        >>> spec = TaskSpec("tickets", "far", "Ticket: {text}\nTeam:", ("Access", "Hardware"))
        >>> spec.slots
        ('text',)
    """

    name: str
    group: str
    template: str
    options: tuple[str, ...] = ()
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        # A word would be read as one option a letter.
        if isinstance(self.options, str):
            raise TypeError(f"options must be a tuple of texts, got {self.options!r}")

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the row fields that the template needs."""
        slots = []
        for _, name, _, _ in string.Formatter().parse(self.template):
            # Choices and letters are made of the choices, which are no field of a row.
            if name and name not in slots and name not in ("choices", "letters"):
                slots.append(name)
        return tuple(slots)

    @property
    def shows_choices(self) -> bool:
        """Whether the template shows the choices that each row brings."""
        names = {name for _, name, _, _ in string.Formatter().parse(self.template)}
        return not names.isdisjoint({"choices", "letters"})


@dataclass(frozen=True)
class Task:
    r"""A task's spec, how it reads, and its rows.

    Methods learn and draw demonstrations from `train`, choose on `validation` and are measured on
    `test`. `n_dropped` counts training rows left out because they repeat one another or a held-back
    row; `dropped_example` is one of them and the row that it repeats.

    Example:
        >>> from icrouting import Example, Task, TaskSpec
        >>> spec = TaskSpec("tickets", "far", "Ticket: {text}\nTeam:", ("Access", "Hardware"))
        >>> lost = Example({"text": "I lost my password"}, choices=(), label=0)
        >>> dark = Example({"text": "The screen is dark"}, choices=(), label=1)
        >>> task = Task(spec, train=(lost, dark), test=(dark,))
        >>> task.prompt(dark)
        'Ticket: The screen is dark\nTeam:'
        >>> task.answer(dark)
        'Hardware'
    """

    spec: TaskSpec
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    validation: tuple[Example, ...] = ()
    n_dropped: int = 0
    dropped_example: tuple[Example, Example] | None = None

    @classmethod
    def from_rows(
        cls,
        rows: Any,
        template: str,
        options: Sequence[str] = (),
        *,
        label: str = "label",
        name: str = "my task",
        group: str = "near",
        test: Any = None,
        split: float = 0.3,
        seed: int = 0,
        labels: Literal["index", "text"] | None = None,
        words: Mapping[str, Mapping[str, str]] | None = None,
    ) -> "Task":
        r"""Returns a task made of rows as they are: a table in memory, or a file of one.

        The rows to test on are drawn from `rows`, or are those of `test`. Of the others, those that
        repeat one another or a row to test on are left out, and a fifth becomes the validation
        slice, as in every task.

        Args:
            rows: a list of dicts, a pandas data frame, a `datasets.Dataset`, or the path of a file,
                which is read as CSV, TSV or parquet if it is called so, else as JSONL.
            template: prompt text with `{column}` slots; the label follows after one space. A brace
                that is no slot's is written twice.
            options: the answer words; empty where each row brings its `choices`.
            label: the column that holds the labels, each one of the options or its index.
            name: of the task.
            group: "in-domain", "near" or "far": the section of a report's table to stand in.
            test: rows to test on, of any kind that `rows` may be; None to draw them from `rows`.
            split: the share of each label's rows to test on, where `test` is None; a label of two
                rows or more has one on either side.
            seed: of that draw.
            labels: what a label that is a number stands for, an option's "index" or its "text";
                None where the numbers say so themselves.
            words: replacements of columns' values, `{column: {value: text}}`.

        Raises:
            ValueError: a column is missing, a row does not fit (its place is named), or there are
                too few rows or labels to learn from.

        Example:
            >>> from icrouting import Task
            >>> tickets = [
            ...     {"text": "I lost my password", "team": "Access"},
            ...     {"text": "The screen is dark", "team": "Hardware"},
            ...     {"text": "Please unlock my account", "team": "Access"},
            ...     {"text": "The mouse is gone", "team": "Hardware"},
            ... ]
            >>> teams = ["Access", "Hardware"]
            >>> task = Task.from_rows(tickets, "Ticket: {text}\nTeam:", teams, label="team")
            >>> len(task.train), len(task.test)
            (2, 2)
            >>> task.prompt(task.test[0])
            'Ticket: I lost my password\nTeam:'
        """
        # By its name, since the room that reads rows makes tasks of them: it imports this one.
        load = import_module("icrouting.tasks.load")
        return load.task_from_rows(
            rows,
            template,
            options,
            label=label,
            name=name,
            group=group,
            test=test,
            split=split,
            seed=seed,
            labels=labels,
            words=words or {},
        )

    @property
    def name(self) -> str:
        """The spec's name."""
        return self.spec.name

    @cached_property
    def train_labels(self) -> np.ndarray:
        """The labels of the training rows."""
        return np.array([example.label for example in self.train])

    def options(self, example: Example) -> tuple[str, ...]:
        """The answers an example chooses from, in label order."""
        return self.spec.options or tuple(string.ascii_uppercase[: len(example.choices)])

    def prompt(self, example: Example) -> str:
        """The zero-shot prompt of an example, ending right before the space and the answer."""
        values = {}
        for name, text in example.fields.items():
            words = self.spec.words.get(name, {})
            values[name] = words.get(text, text)
        # Only an example with choices of its own has letters.
        letters = string.ascii_uppercase[: len(example.choices)]
        lines = []
        for letter, choice in zip(letters, example.choices, strict=True):
            lines.append(f"{letter}. {choice}")
        return self.spec.template.format(
            **values, choices="\n".join(lines), letters="/".join(letters)
        )

    def answer(self, example: Example) -> str:
        """The right option of an example."""
        return self.options(example)[example.label]


def spec_among(task: "str | Task | TaskSpec | None", specs: Sequence[TaskSpec]) -> TaskSpec:
    """Returns how a task reads, which may be named as one of some that are known.

    Args:
        task: a name, or the task itself; None takes the only one that is known.
        specs: those that are known.

    Raises:
        ValueError: there is none of that name, or none is named and there are several.
    """
    if isinstance(task, Task):
        return task.spec
    if isinstance(task, TaskSpec):
        return task
    specs_by_name = {spec.name: spec for spec in specs}
    names = ", ".join(specs_by_name)
    if not specs:
        raise ValueError(
            "it is not known here how rows become prompts, as an earlier version saved this: give "
            "the task or its spec"
        )
    if task is None and len(specs) > 1:
        raise ValueError(f"say which task's template makes prompts of the rows: one of {names}")
    if task is None:
        return specs[0]
    if task not in specs_by_name:
        raise ValueError(f"no task {task!r} is known here: expected one of {names}")
    return specs_by_name[task]


def rows_digest(tasks: Sequence[Task]) -> str:
    """Returns 16 hex digits that identify the rows and templates of tasks."""
    # Run folders and routers keep these digits: what is hashed, and its order, must stay.
    digest = hashlib.sha256()
    for task in tasks:
        content = (task.spec, task.train, task.validation, task.test)
        digest.update(repr(content).encode())
    return digest.hexdigest()[:16]
