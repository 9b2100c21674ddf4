"""Rows: one labelled example from a JSON object or a CSV line, with file and line named where it does not fit."""

import csv
import io
import json
import string
from collections.abc import Iterator
from pathlib import Path

from icrouting.tasks.task import Example, TaskSpec


def parse_row(row: object, spec: TaskSpec) -> Example:
    """Returns the example in one row of data.

    The row maps to the template's fields, `label` (an index or one of the task's options), and `choices` where the
    options are letters (a list, or one text with the choices between "|").
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    needed = [*spec.slots, "label", *([] if spec.options else ["choices"])]
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"task {spec.name!r} needs the fields {needed}, missing here: {missing}")
    for name in spec.slots:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"field {name!r} must be a text that is not empty, got {row[name]!r}")
    choices = () if spec.options else row["choices"]
    if isinstance(choices, str):
        choices = tuple(choice.strip() for choice in choices.split("|"))
    if not isinstance(choices, list | tuple) or not all(
        isinstance(choice, str) for choice in choices
    ):
        raise ValueError(f"field 'choices' must be a list of texts, got {choices!r}")
    n_options = len(spec.options or choices)
    if n_options < 2 or len(choices) > 26:
        raise ValueError(
            f"an example needs 2 options or more, and 26 letters at most; got {n_options}"
        )
    return Example(
        {name: row[name] for name in spec.slots},
        tuple(choices),
        _label(row["label"], spec, n_options),
    )


def _label(label: object, spec: TaskSpec, n_options: int) -> int:
    names = spec.options or tuple(string.ascii_uppercase[:n_options])
    if isinstance(label, str) and label in names:
        label = names.index(label)
    elif (
        isinstance(label, str) and label.isdecimal() and not any(name.isdecimal() for name in names)
    ):
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < n_options:
        words = ", ".join(names)
        raise ValueError(
            f"field 'label' must be an integer in 0..{n_options - 1} or one of {words}, got {label!r}"
        )
    return label


def read_rows(path: Path, spec: TaskSpec) -> tuple[Example, ...]:
    """Returns the examples of a JSONL file, or of a CSV file with a heading; errors name file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"task {spec.name!r}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"task {spec.name!r}: {path} is not UTF-8 text ({error.reason})"
        ) from error
    examples = []
    for number, row in _csv_lines(text, path) if path.suffix == ".csv" else _json_lines(text, path):
        try:
            examples.append(parse_row(row, spec))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if not examples:
        raise ValueError(f"task {spec.name!r}: {path} holds no example")
    return tuple(examples)


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, object]]:
    # JSON allows unescaped line separators of Unicode inside a text, so only newlines end a row.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error.msg}") from error


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                said = "more cells than the heading has: put a text with commas in quotes"
                raise ValueError(f"{path}:{reader.line_num}: {said}")
            yield reader.line_num, {key: value for key, value in row.items() if value is not None}
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV after line {reader.line_num}: {error}") from error
