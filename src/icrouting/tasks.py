"""Tasks: labelled examples, the template that turns one into a prompt, and the readers of JSONL folders."""

import difflib
import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One labelled test or training item.

    Attributes:
        fields: the texts that fill the template, by name.
        choices: the answers to choose from, where every item brings its own; else empty.
        label: index into the task's options.
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
    """A task's spec and its rows; methods learn from `train` only."""

    spec: TaskSpec
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def name(self) -> str:
        """The spec's name."""
        return self.spec.name

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
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(repr((task.spec, task.train, task.test)).encode())
    return digest.hexdigest()[:16]


def parse_row(row: object, spec: TaskSpec) -> Example:
    """Returns the example in one row of data.

    Args:
        row: a mapping with the template's fields, `label`, and `choices` where the options are letters.
        spec: the task that the row belongs to.

    Raises:
        ValueError: a field is missing or of the wrong type, or the label is out of range.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    needed = [*spec.slots, "label", *([] if spec.options else ["choices"])]
    missing = [name for name in needed if name not in row]
    if missing:
        raise ValueError(f"task {spec.name!r} needs the fields {needed}, missing here: {missing}")
    for name in spec.slots:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"field {name!r} must be a text that is not empty, got {row[name]!r}")
    choices = () if spec.options else row["choices"]
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"field 'choices' must be a list of texts, got {choices!r}")
    n_options = len(spec.options or choices)
    if n_options < 2 or len(choices) > 26:
        raise ValueError(f"an example needs 2 options or more, and 26 letters at most; got {n_options}")
    label = row["label"]
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < n_options:
        raise ValueError(f"field 'label' must be an integer in 0..{n_options - 1}, got {label!r}")
    return Example({name: row[name] for name in spec.slots}, tuple(choices), label)


def read_jsonl(path: Path, spec: TaskSpec) -> tuple[Example, ...]:
    """Returns the examples of one JSONL file; errors name the file and the line."""
    try:
        # JSON allows unescaped line separators of Unicode inside a text, so only newlines end a row.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"task {spec.name!r}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"task {spec.name!r}: {path} is not UTF-8 text ({error.reason})") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(parse_row(json.loads(line), spec))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error.msg}") from error
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if not examples:
        raise ValueError(f"task {spec.name!r}: {path} holds no example")
    return tuple(examples)


def near_matches(name: str, known: list[str]) -> str:
    """Returns the end of an error on an unknown name: near matches, or all that is known."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"


def load_task(name: str | TaskSpec, data: str | Path) -> Task:
    """Returns a task with its rows.

    Args:
        name: a task of the catalogue, or a spec of your own.
        data: a folder that holds `<name>/train.jsonl` and `<name>/test.jsonl`, or "pinned:staicc" for the
            sets that come with a pinned wheel.

    Raises:
        ValueError: unknown name, missing folder, or a row that does not fit (file and line are named).
    """
    from icrouting import catalogue, staicc

    spec = name if isinstance(name, TaskSpec) else catalogue.find(name)
    if str(data) == "pinned:staicc":
        return staicc.read_task(spec)
    if str(data).startswith("pinned:"):
        raise ValueError(f"unknown pinned data {data!r}: expected 'pinned:staicc' or a folder")
    folder = Path(data) / spec.name
    if not folder.is_dir():
        raise ValueError(f"task {spec.name!r}: expected a folder {folder} with train.jsonl and test.jsonl")
    return Task(spec, read_jsonl(folder / "train.jsonl", spec), read_jsonl(folder / "test.jsonl", spec))
