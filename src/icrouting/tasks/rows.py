"""Rows: labelled examples from JSON or CSV; what does not fit is named by file and line."""

import csv
import io
import json
import string
from collections.abc import Iterator
from pathlib import Path

from icrouting.tasks.task import Example, TaskSpec


def parse_row(row: object, spec: TaskSpec) -> Example:
    """Returns the example in one row of data.

    Args:
        row: maps to the template's fields, `label` (an index or one of the task's options), and
            `choices` where the options are letters (a list, or one text with "|" between them).
        spec: says which fields there are.

    Raises:
        ValueError: a field is missing or does not fit.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    needed = [*spec.slots, "label"]
    if not spec.options:
        needed.append("choices")
    missing = [name for name in needed if name not in row]
    if missing:
        raise ValueError(f"task {spec.name!r} needs the fields {needed}, missing here: {missing}")
    fields = {}
    for name in spec.slots:
        text = row[name]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"field {name!r} must be a text that is not empty, got {text!r}")
        fields[name] = text
    choices = () if spec.options else _choices(row["choices"])
    n_options = len(spec.options or choices)
    # The answers to choices are letters, of which there are 26.
    if n_options < 2 or len(choices) > 26:
        raise ValueError(
            f"an example needs 2 options or more, and 26 letters at most; got {n_options}"
        )
    return Example(fields, choices, _label(row["label"], spec, n_options))


def _choices(value: object) -> tuple[str, ...]:
    """Returns the choices of a row, which a CSV can only give as one text."""
    if isinstance(value, str):
        return tuple(choice.strip() for choice in value.split("|"))
    is_sequence = isinstance(value, list | tuple)
    if not is_sequence or not all(isinstance(choice, str) for choice in value):
        raise ValueError(f"field 'choices' must be a list of texts, got {value!r}")
    return tuple(value)


def _label(label: object, spec: TaskSpec, n_options: int) -> int:
    """Returns the index of a label, which may be an index or an option, and either as a text."""
    names = spec.options or tuple(string.ascii_uppercase[:n_options])
    index = label
    if isinstance(label, str):
        # Where options are numbers themselves, a number in quotes is an option and no index.
        have_numbers = any(name.isdecimal() for name in names)
        if label in names:
            index = names.index(label)
        elif label.isdecimal() and not have_numbers:
            index = int(label)
    # In Python true and false are integers too.
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < n_options:
        return index
    raise ValueError(
        f"field 'label' must be an integer in 0..{n_options - 1} "
        f"or one of {', '.join(names)}, got {index!r}"
    )


def read_rows(path: Path, spec: TaskSpec) -> tuple[Example, ...]:
    """Returns the examples of a JSONL file, or of a CSV file with a heading.

    Raises:
        ValueError: the file cannot be read, holds no example, or has a line that does not fit.
    """
    try:
        # Some editors put a byte order mark before UTF-8.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"task {spec.name!r}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"task {spec.name!r}: {path} is not UTF-8 text ({error.reason})"
        ) from error
    lines = _csv_lines(text, path) if path.suffix == ".csv" else _json_lines(text, path)
    examples = []
    for number, row in lines:
        try:
            examples.append(parse_row(row, spec))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if not examples:
        raise ValueError(f"task {spec.name!r}: {path} holds no example")
    return tuple(examples)


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, object]]:
    """Yields line numbers and what JSON says there; empty lines say nothing."""
    # JSON allows unescaped line separators of Unicode inside a text, so only newlines end a row.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error.msg}") from error
        yield number, row


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, object]]:
    """Yields line numbers and the rows there, without the cells that a row lacks at its end."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            # Under this key the reader puts what is too much.
            if None in row:
                raise ValueError(
                    f"{path}:{reader.line_num}: more cells than the heading has: "
                    "put a text with commas in quotes"
                )
            cells = {name: cell for name, cell in row.items() if cell is not None}
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV after line {reader.line_num}: {error}") from error
