"""Streams: the rows of a table as they stand, one after the other, whether they fit or not."""

import csv
import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icrouting.tasks import columns, frames
from icrouting.tasks.rows import DELIMITERS, unlabelled_fields
from icrouting.tasks.task import TaskSpec

KINDS = (".csv", ".tsv", ".jsonl")
# A cell may hold a book; csv stops at 131,072 characters by itself.
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        place: "rows.csv:3".
        cells: its columns as they stand; empty where the line could not be read.
        problem: what is wrong with the line itself; empty where it could be read.
    """

    place: str
    cells: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """A CSV, TSV, JSONL or parquet file whose rows are read one after the other.

    Attributes:
        path: the file; its name's ending says what it is, and what is none of the others is
            JSONL.
        needed: the columns that will be read.
    """

    path: Path
    needed: tuple[str, ...]

    @property
    def is_table(self) -> bool:
        """Whether it has a heading, and cells with something between them."""
        return self.path.suffix.lower() in (".csv", ".tsv")

    def survey(self) -> tuple[int, list[str]]:
        """Returns the number of rows and the names of all columns, from one reading.

        Raises:
            ValueError: it cannot be read, has no row, or a needed column is missing or stands there
                twice.
        """
        headings = self._heading() if self.is_table else []
        # A dict, for the order in which they come.
        names = dict.fromkeys(headings)
        n_rows = 0
        for row in self.rows():
            n_rows += 1
            names |= dict.fromkeys(row.cells)
        if not n_rows:
            raise ValueError(f"{self.path} holds no row")
        missing = [name for name in self.needed if name not in names]
        if missing:
            raise ValueError(
                f"{self.path} needs the columns {list(self.needed)}, missing: {missing}; "
                f"its columns are {list(names)}"
            )
        return n_rows, list(names)

    def _heading(self) -> list[str]:
        """Returns a table's headings; ValueError where two columns have one name."""
        with self._opened() as file:
            headings = next(csv.reader(file, delimiter=self.delimiter()), [])
        frames.check_headings(headings, headings, str(self.path))
        return headings

    def delimiter(self) -> str:
        """Returns what stands between cells: in a CSV that which sets a needed column apart."""
        if self.path.suffix.lower() == ".tsv":
            return "\t"
        with self._opened() as file:
            line = file.readline()
        for delimiter in DELIMITERS:
            headings = next(csv.reader(io.StringIO(line, newline=""), delimiter=delimiter), [])
            if any(name in headings for name in self.needed):
                return delimiter
        return ","

    def rows(self) -> Iterator[Row]:
        """Yields the rows; one that cannot be read says why."""
        try:
            if self.is_table:
                yield from self._table_rows()
            elif self.path.suffix.lower() == ".parquet":
                yield from self._parquet_rows()
            else:
                yield from self._json_rows()
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error.strerror or error}") from error

    def asked(self, row: Row) -> dict[str, Any]:
        """Returns a row's cells with its numbers as the texts that a fit makes of them."""
        # Of JSON a fit takes a number as it is written.
        if self.path.suffix.lower() != ".parquet":
            return _with_texts(row.cells, self.needed)
        return _with_texts(_plain(row.cells), self.needed)

    def digest(self) -> str:
        """Returns the sha256 of the file, which is read once for it."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _opened(self) -> io.TextIOWrapper:
        try:
            # Bytes that are no UTF-8 come through as they are, and go out again so.
            return self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _json_rows(self) -> Iterator[Row]:
        with self._opened() as file:
            # Only newlines end a row: JSON allows other separators inside a text.
            for number, line in enumerate(_lines(file), start=1):
                if not line.strip():
                    continue
                place = f"{self.path.name}:{number}"
                try:
                    cells = json.loads(line)
                except ValueError as error:
                    yield Row(place, {}, f"not a JSON object: {error}")
                    continue
                if isinstance(cells, dict):
                    yield Row(place, cells)
                else:
                    yield Row(place, {}, f"not a JSON object but a {type(cells).__name__}")

    def _parquet_rows(self) -> Iterator[Row]:
        for number, cells in enumerate(frames.parquet_records(self.path), start=1):
            yield Row(f"{self.path.name}:{number}", cells)

    def _table_rows(self) -> Iterator[Row]:
        csv.field_size_limit(_LONGEST_CELL)
        with self._opened() as file:
            lines = _Lines(file)
            reader = csv.reader(lines, strict=True, delimiter=self.delimiter())
            try:
                headings = next(reader, [])
            except csv.Error as error:
                raise ValueError(f"{self.path}: its heading is not CSV: {error}") from error
            while True:
                lines.begin_row()
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    lines.give_back_all_but_first()
                    yield Row(f"{self.path.name}:{lines.n_read}", {}, f"not CSV: {error}")
                    continue
                # An empty line is no row.
                if values:
                    yield _row_of(f"{self.path.name}:{lines.n_read}", headings, values)


class _Lines:
    """The lines of a table, of which those that a row took wrongly can be read again.

    A quote that nothing closes takes all lines up to the next one, or to the file's end.
    """

    def __init__(self, file: Iterator[str]):
        self._file = file
        self._returned: deque[str] = deque()
        self._of_row: list[str] = []
        self.n_read = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._file)
        self._of_row.append(line)
        self.n_read += 1
        return line

    def begin_row(self) -> None:
        """Says that the lines to come are another row's."""
        self._of_row = []

    def give_back_all_but_first(self) -> None:
        """Has the lines of this row be read again, but for its first."""
        rest = self._of_row[1:]
        self._returned.extendleft(reversed(rest))
        self.n_read -= len(rest)


def _row_of(place: str, headings: Sequence[str], values: Sequence[str]) -> Row:
    """Returns a table's row; it may have fewer cells than the heading, but not more."""
    cells = dict(zip(headings, values, strict=False))
    if len(values) > len(headings):
        return Row(place, cells, f"{len(values)} cells, the heading has {len(headings)}")
    return Row(place, cells)


def _plain(cells: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: frames.plain(value) for name, value in cells.items()}


def _with_texts(cells: Mapping[Any, Any], names: Sequence[str]) -> dict[Any, Any]:
    """Returns cells in which the numbers of some columns are texts."""
    texts = {name: columns.number_as_text(cells[name]) for name in names if name in cells}
    return {**cells, **texts}


def _lines(file: io.TextIOWrapper) -> Iterator[str]:
    """Yields the lines of a file that was opened without translating newlines."""
    # Without translation a lone carriage return ends a line, which JSON allows between values.
    kept = ""
    for piece in file:
        kept += piece
        if piece.endswith("\n"):
            yield kept
            kept = ""
    if kept:
        yield kept


def rows_of(rows: Any, spec: TaskSpec) -> list[object]:
    """Returns the rows to be predicted, of whatever kind; what does not fit stays as it is.

    Args:
        rows: a list of dicts, a data frame, what can be had as one, or a file's path.
        spec: how rows become prompts.

    Raises:
        ValueError: these are no rows, or a file that cannot be read.
    """
    needed = tuple(unlabelled_fields(spec))
    if isinstance(rows, str | Path):
        path = Path(rows)
        table = Table(path, needed)
        table.survey()
        return [row.problem or table.asked(row) for row in table.rows()]
    entries = rows
    if not isinstance(rows, Sequence):
        entries = [row for _, row in frames.memory_lines(rows, needed, "rows")]
    return [
        _with_texts(_plain(row), needed) if isinstance(row, Mapping) else row for row in entries
    ]
