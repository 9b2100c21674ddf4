"""Rows: labelled examples from files or from memory; what does not fit is named by its place."""

import csv
import io
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from icrouting.tasks import columns, frames
from icrouting.tasks.columns import Line
from icrouting.tasks.task import Example, TaskSpec

# What a label that is a number stands for: an option by its place, or the option of that text.
Labels = Literal["index", "text"]
# What may stand between the cells of a table, and how messages call it.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class _NoOption(ValueError):
    """A label that is none of the options."""


def parse_row(
    row: object, spec: TaskSpec, labels: Labels | None = None, label: str = "label"
) -> Example:
    """Returns the example in one row of data.

    Args:
        row: maps to the template's fields, the label (an index or one of the task's options), and
            `choices` where the options are letters (a list, or one text with "|" between them).
        spec: says which fields there are.
        labels: what a label that is a number stands for; None where the number must say so itself.
        label: the field that holds the label.

    Raises:
        ValueError: a field is missing or does not fit, or a label may be two options.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    _check_fields(row, spec, needed_fields(spec, label))
    fields, choices = _texts(row, spec)
    names = spec.options or tuple(string.ascii_uppercase[: len(choices)])
    try:
        index = _label(row[label], names, labels)
    except ValueError as error:
        raise type(error)(f"field {label!r} {error}") from error
    return Example(fields, choices, index)


def unlabelled(row: object, spec: TaskSpec) -> Example:
    """Returns the example in one row without a label; its label is 0, and means nothing.

    Raises:
        ValueError: a field of the template, or the choices, are missing or do not fit.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a dict of columns, got {row!r:.100}")
    _check_fields(row, spec, unlabelled_fields(spec))
    fields, choices = _texts(row, spec)
    for text in (*fields.values(), *choices):
        # Bytes that were no UTF-8 stand in a text as halves of pairs, which no tokenizer takes.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"this row is not UTF-8 text: {text!r:.60}")
    return Example(fields, choices, label=0)


def _check_fields(row: Mapping[str, object], spec: TaskSpec, needed: Sequence[str]) -> None:
    """ValueError where a row lacks a field."""
    missing = [name for name in needed if name not in row]
    if missing:
        raise ValueError(
            f"task {spec.name!r} needs the fields {list(needed)}, missing here: {missing}; "
            f"this row has {list(row)}"
        )


def _texts(row: Mapping[str, object], spec: TaskSpec) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns the template's fields and the choices of a row that has them."""
    fields = {}
    for name in spec.slots:
        text = row[name]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"field {name!r} must be a text that is not empty, got {text!r}")
        fields[name] = text
    choices = () if spec.options else parse_choices(row["choices"])
    n_options = len(spec.options or choices)
    # The answers to choices are letters, of which there are 26.
    if n_options < 2 or len(choices) > 26:
        raise ValueError(
            f"an example needs 2 options or more, and 26 letters at most; got {n_options}"
        )
    return fields, choices


def needed_fields(spec: TaskSpec, label: str) -> list[str]:
    """Returns the names of the fields that a row of a task has to have."""
    needed = [*spec.slots, label]
    if not spec.options:
        needed.append("choices")
    return needed


def unlabelled_fields(spec: TaskSpec) -> list[str]:
    """Returns the names of the fields that a row without a label has to have."""
    return list(spec.slots) if spec.options else [*spec.slots, "choices"]


def parse_choices(value: object) -> tuple[str, ...]:
    """Returns the choices of a row, which a CSV can only give as one text."""
    if isinstance(value, str):
        return tuple(choice.strip() for choice in value.split("|"))
    is_sequence = isinstance(value, list | tuple)
    if not is_sequence or not all(isinstance(choice, str) for choice in value):
        raise ValueError(f"field 'choices' must be a list of texts, got {value!r}")
    return tuple(value)


def _label(label: object, names: Sequence[str], labels: Labels | None) -> int:
    """Returns the index of a label, which may be an index or an option, and either as a text."""
    by_index = _by_index(label, names)
    by_text = _by_text(label, names)
    if labels == "text":
        by_index = None
    if labels == "index" and isinstance(label, int):
        by_text = None
    if by_index is not None and by_text is not None and by_index != by_text:
        raise ValueError(_two_readings(label, by_index, by_text, names))
    index = by_text if by_index is None else by_index
    if index is None and columns.is_empty(label):
        raise _NoOption("is empty: give the row a label, or leave the row out")
    if index is None:
        integer = "" if labels == "text" else f"an integer in 0..{len(names) - 1} or "
        options = columns.listed(names)
        raise _NoOption(f"must be {integer}one of {options}, got {label!r}")
    return index


def _by_index(label: object, names: Sequence[str]) -> int | None:
    """Returns a label as an index; None where it is none."""
    number = label
    # Where options are numbers themselves, a number in quotes is an option and no index.
    if isinstance(label, str) and label.isdecimal():
        have_numbers = any(name.isdecimal() for name in names)
        number = None if have_numbers else int(label)
    # In Python true and false are integers too.
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(names):
        return number
    return None


def _by_text(label: object, names: Sequence[str]) -> int | None:
    """Returns the index of the option that a label spells; None where it spells none."""
    for index, name in enumerate(names):
        is_number = isinstance(label, int) and not isinstance(label, bool)
        if name == label or (is_number and _is_number(name, label)):
            return index
    return None


def _is_number(name: str, number: object) -> bool:
    """Returns whether an option is a number, however it is written: "1", "01" and "1.0" are 1."""
    try:
        return float(name) == number
    except ValueError:
        return False


def _two_readings(label: object, by_index: int, by_text: int, names: Sequence[str]) -> str:
    """Says what is unclear about a label that is an index and another option's text."""
    return (
        f"is {label}, which may be the index of the option {names[by_index]!r} or "
        f'the option {names[by_text]!r} itself: write labels = "index" or labels = "text" in the '
        "task file (in Python an argument), or in JSONL put options in quotes"
    )


def _meaning_of_numbers(
    lines: Sequence[Line], names: Sequence[str], label_field: str
) -> Labels | None:
    """Returns what the numbers among the labels of some rows stand for, the same for all.

    None where it makes no difference.

    Raises:
        ValueError: all may be either; or some can only be an index, others only an option.
    """
    unclear: list[tuple[str, str]] = []
    indices: list[tuple[str, object]] = []
    texts: list[tuple[str, object]] = []
    for place, row in lines:
        label = row.get(label_field) if isinstance(row, dict) else None
        by_index = _by_index(label, names)
        by_text = _by_text(label, names)
        if not isinstance(label, int) or by_index == by_text:
            continue
        if by_text is None:
            indices.append((place, label))
        elif by_index is None:
            texts.append((place, label))
        else:
            unclear.append((place, _two_readings(label, by_index, by_text, names)))
    if indices and texts:
        place, index = indices[0]
        text_place, text = texts[0]
        raise ValueError(
            f"{place}: field {label_field!r} is {index}, which is an index and no option, but in "
            f"{text_place} it is {text}, an option and no index: give all as one of the two"
        )
    if unclear and not indices and not texts:
        place, message = unclear[0]
        raise ValueError(f"{place}: field {label_field!r} {message}")
    if texts:
        return "text"
    return "index" if indices else None


def parse_rows(
    lines: Sequence[Line], spec: TaskSpec, labels: Labels | None = None, label: str = "label"
) -> tuple[Example, ...]:
    """Returns the examples of rows from one source.

    Args:
        lines: the rows, each after its place.
        spec: how the task reads.
        labels: what a label that is a number stands for; None where the numbers say so: all may be
            indices, or all options, but not either.
        label: the field that holds the label.

    Raises:
        ValueError: a row does not fit; its place is named.
    """
    # Where rows bring their choices, options are letters, which no number spells.
    if labels is None and spec.options:
        labels = _meaning_of_numbers(lines, spec.options, label)
    lines = columns.with_texts(lines, spec.slots)
    examples = []
    unknown: list[object] = []
    first_unknown = ""
    for place, row in lines:
        try:
            examples.append(parse_row(row, spec, labels, label))
        except _NoOption as error:
            # Read on: whoever mends a label wants to know of all of them.
            assert isinstance(row, dict), "a row with a label has fields"
            unknown.append(row[label])
            first_unknown = first_unknown or f"{place}: {error}"
        except ValueError as error:
            raise ValueError(first_unknown or f"{place}: {error}") from error
    if unknown:
        counted = columns.unknown_labels(unknown, spec.options, len(lines))
        raise ValueError(f"{first_unknown}; {counted}")
    return tuple(examples)


def read_rows(
    path: Path, spec: TaskSpec, labels: Labels | None = None, label: str = "label"
) -> tuple[Example, ...]:
    """Returns the examples of a file: JSONL, parquet, or CSV or TSV with a heading.

    Args:
        path: the file; what is called .csv, .tsv or .parquet is read as such.
        spec: how the task reads.
        labels: what a label that is a number stands for; None where the file's numbers say so:
            all may be indices, or all options, but not either.
        label: the column that holds the label.

    Raises:
        ValueError: the file cannot be read, holds no example, or has a line that does not fit.
    """
    lines = file_lines(path, spec, label)
    examples = parse_rows(lines, spec, labels, label)
    if not examples:
        raise ValueError(f"task {spec.name!r}: {path} holds no example")
    return examples


def file_lines(path: Path, spec: TaskSpec, label: str = "label") -> list[Line]:
    """Returns the rows of a file as they stand there, each after its place.

    Args:
        path: the file, as in `read_rows`.
        spec: how the task reads.
        label: the column that holds the label.

    Raises:
        ValueError: the file cannot be read.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return frames.parquet_lines(path, needed_fields(spec, label))
        # Some editors put a byte order mark before UTF-8.
        text = path.read_text(encoding="utf-8-sig")
        if kind in (".csv", ".tsv"):
            with _cells_as_long_as(text):
                return list(_table_lines(text, path, spec, label))
        return list(_json_lines(text, path))
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"task {spec.name!r}: cannot read {path}: {reason}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"task {spec.name!r}: {path} is not UTF-8 text ({error.reason}): save it as UTF-8"
        ) from error


def _json_lines(text: str, path: Path) -> Iterator[Line]:
    """Yields lines' places and what JSON says there; empty lines say nothing."""
    # JSON allows unescaped line separators of Unicode inside a text, so only newlines end a row.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not a JSON object: {error.msg}; "
                "a table is read from a file that is called .csv or .tsv"
            ) from error
        yield f"{path}:{number}", row


@contextmanager
def _cells_as_long_as(text: str) -> Iterator[None]:
    """Inside, a cell may be as long as a text; else the reader takes 131,072 characters."""
    limit = csv.field_size_limit()
    # More than this a C long need not hold.
    csv.field_size_limit(min(max(limit, len(text)), 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _table_lines(text: str, path: Path, spec: TaskSpec, label: str) -> Iterator[Line]:
    """Yields lines' places and the rows there, without the cells that a row lacks at its end."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text, label)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        frames.check_headings(reader.fieldnames or (), needed_fields(spec, label), str(path))
        for row in reader:
            # Under this key the reader puts what is too much.
            if None in row:
                raise ValueError(
                    f"{path}:{reader.line_num}: more cells than the heading has: "
                    f"put a text with {DELIMITERS[delimiter]} in quotes"
                )
            cells: dict[str, str | int] = {}
            for name, cell in row.items():
                if cell is not None:
                    cells[name] = _label_cell(cell) if name == label else cell
            yield f"{path}:{reader.line_num}", cells
    except csv.Error as error:
        kind = path.suffix.lower().removeprefix(".").upper()
        raise ValueError(f"{path}: not {kind} after line {reader.line_num}: {error}") from error


def _delimiter(text: str, label: str) -> str:
    """Returns what stands between a CSV's cells: that which sets the label's in its heading.

    Where none does, that which makes most headings, so that these can be named.
    """
    n_headings = {}
    for delimiter in DELIMITERS:
        heading = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        if label in heading:
            return delimiter
        n_headings[delimiter] = len(heading)
    return max(n_headings, key=n_headings.__getitem__)


def _label_cell(cell: str) -> str | int:
    """Returns a label's cell as a JSON of the same rows has it: one of digits is a number."""
    is_number = cell.removeprefix("-").isdecimal() and str(int(cell)) == cell
    return int(cell) if is_number else cell
