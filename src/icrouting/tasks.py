"""Tasks: labelled examples, the template that turns one into a prompt, and the readers of JSONL folders."""

import difflib
import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One labelled test or training item.

    `fields` are the texts that fill the template, by name; `choices` the answers to choose from, where every item
    brings its own (else empty); `label` is an index into the task's options.
    """

    fields: Mapping[str, str]
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class TaskSpec:
    r"""How a task reads: everything but its rows (paper, table 6).

    Attributes:
        name: unique name.
        group: "in-domain", "near" or "far", as the paper groups its tasks.
        template: prompt text with `{field}` slots; `{choices}` becomes one "A. text" line per choice and
            `{letters}` becomes "A/B/...". The label follows after one space.
        options: the answer words in label order; empty means letters, one per choice.
        words: replacements of field values, `{field: {value: text}}`, done before the template is filled.
    """

    name: str
    group: str
    template: str
    options: tuple[str, ...] = ()
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the row fields that the template needs."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        return tuple(name for name in dict.fromkeys(names) if name not in ("choices", "letters"))


@dataclass(frozen=True)
class Task:
    """A task's spec, how it reads, and its rows.

    Methods learn and draw demonstrations from `train`, choose on `validation` and are measured on `test`. `n_dropped`
    counts training rows left out because they repeat one another or a held-back row.
    """

    spec: TaskSpec
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    validation: tuple[Example, ...] = ()
    n_dropped: int = 0

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
        values = {name: self.spec.words.get(name, {}).get(text, text) for name, text in example.fields.items()}
        letters = string.ascii_uppercase[: len(example.choices)]
        lines = [f"{letter}. {choice}" for letter, choice in zip(letters, example.choices, strict=True)]
        return self.spec.template.format(**values, choices="\n".join(lines), letters="/".join(letters))

    def answer(self, example: Example) -> str:
        """The right option of an example."""
        return self.options(example)[example.label]


def rows_digest(tasks: Sequence[Task]) -> str:
    """Returns 16 hex digits that identify the rows and templates of tasks."""
    rows = "".join(repr((task.spec, task.train, task.validation, task.test)) for task in tasks)
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def known(kind: str, name: str, among: Mapping[str, T]) -> T:
    """Returns what a name stands for; ValueError with near matches, or all that is known, if it stands for nothing."""
    if name in among:
        return among[name]
    near = difflib.get_close_matches(name, among, n=3)
    said = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(among))}"
    raise ValueError(f"unknown {kind} {name!r}: {said}")


def load_task(name: str | TaskSpec, data: str | Path) -> Task:
    """Returns a task with its rows, a validation slice carved from the training rows.

    Args:
        name: a task of the catalogue, a `.toml` task file, or a spec of your own.
        data: for all but a task file: a folder that holds `<name>/train.jsonl` and `<name>/test.jsonl`, "hub",
            "hub:<folder>" for a folder with copies of the hub's datasets, or "pinned:staicc" for the sets that
            come with a pinned wheel.

    Raises:
        ValueError: unknown name, missing folder, or a row that does not fit (file and line are named).
    """
    from icrouting import catalogue, hub, rows, splits, staicc, taskfile

    if str(name).endswith(".toml"):
        return taskfile.read_task_file(Path(str(name)))
    spec = name if isinstance(name, TaskSpec) else known("task", name, catalogue.SPECS)
    kind, _, place = str(data).partition(":")
    if str(data) == "pinned:staicc":
        return staicc.read_task(spec)
    if kind == "pinned":
        raise ValueError(f"unknown pinned data {data!r}: expected 'pinned:staicc' or a folder")
    if kind == "hub":
        return hub.read_task(spec, Path(place) if place else None)
    folder = Path(data) / spec.name
    if not folder.is_dir():
        raise ValueError(f"task {spec.name!r}: expected a folder {folder} with train.jsonl and test.jsonl")
    train, test = (rows.read_rows(folder / f"{split}.jsonl", spec) for split in ("train", "test"))
    others = catalogue.APART_FROM.get(spec.name, ()) if spec in catalogue.SPECS.values() else ()
    files = [(Path(data) / other / "test.jsonl", catalogue.SPECS[other]) for other in others]
    held = [row for file, other in files if file.exists() for row in rows.read_rows(file, other)]
    return splits.make_task(spec, train, test, held)
