"""Frames: rows that are in memory, as a list, a data frame or a dataset, and parquet files."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class HasPandas(Protocol):
    """What can be had as a data frame: a `datasets.Dataset`, or a frame of another library."""

    def to_pandas(self) -> Any:
        """Returns the rows as a data frame."""
        ...


def memory_lines(rows: Any, needed: Sequence[str], name: str) -> list[tuple[str, object]]:
    """Returns the rows of a list of dicts, a data frame or a dataset, each after its place.

    Args:
        rows: a data frame, what can be had as one, or what yields a dict for each row.
        needed: the columns that will be read.
        name: what messages call the rows, so that a place reads "rows[3]".

    Raises:
        ValueError: these are no rows, or two columns have one needed name.
    """
    if isinstance(rows, HasPandas):
        rows = rows.to_pandas()
    # Pandas takes a third of a second: who has a frame has imported it.
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        headings = [str(heading) for heading in rows.columns]
        check_headings(headings, needed, name)
        rows = rows.set_axis(headings, axis=1).to_dict("records")
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        # A dataset with its splits is such a mapping.
        shape = f" of {list(rows)}" if isinstance(rows, Mapping) else ""
        raise ValueError(
            f"{name} must be a list of dicts, a data frame, a dataset or a file's path, "
            f"got {type(rows).__name__}{shape}"
        )
    lines: list[tuple[str, object]] = []
    for number, row in enumerate(rows):
        place = f"{name}[{number}]"
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: expected a dict of columns, got {row!r:.100}")
        lines.append((place, {str(column): plain(value) for column, value in row.items()}))
    return lines


def parquet_lines(path: Path, needed: Sequence[str]) -> list[tuple[str, object]]:
    """Returns the rows of a parquet file, each after its place, where the first row is 1.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no parquet file, or what reads one is not installed.
    """
    # Here and not above: pandas takes a third of a second.
    import pandas

    try:
        frame = pandas.read_parquet(path)
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    except ValueError as error:
        first_line = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a parquet file: {first_line}") from error
    rows = memory_lines(frame, needed, str(path))
    return [(f"{path}:{number}", row) for number, (_, row) in enumerate(rows, start=1)]


def parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a parquet file, of which a few are in memory at a time.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no parquet file, or what reads one is not installed.
    """
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from error


def check_headings(headings: Sequence[str], needed: Sequence[str], name: str) -> None:
    """Raises ValueError where two columns have one needed name."""
    twice = [column for column in needed if headings.count(column) > 1]
    if twice:
        raise ValueError(
            f"{name}: more than one column is called {twice[0]!r}, rename the other; "
            f"the columns are {list(headings)}"
        )


def plain(value: object) -> object:
    """Returns a value as JSON has it: a whole number is an integer, an array a list."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    # What pandas has for a cell without a value; neither is equal to anything, nor to itself.
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    # A frame's column of integers in which one is missing is of floats.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
