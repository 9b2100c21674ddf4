"""Records: one prediction a line, appended to a JSONL file that survives a kill."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One prediction of one method on one test item.

    Attributes:
        method: the method's name.
        task: the task's name.
        seed: the run's seed (it draws the test items and the demonstrations).
        index: the item's position in the task's test split.
        label: index of the right option.
        prediction: index of the option with the highest logit.
        option_logits: one logit per option, at the next position.
        n_tokens: prompt tokens, demonstrations included.
        seconds: wall time of this item's share of its batch.
    """

    method: str
    task: str
    seed: int
    index: int
    label: int
    prediction: int
    option_logits: tuple[float, ...]
    n_tokens: int
    seconds: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What makes a record unique: method, task, seed and index."""
        return self.method, self.task, self.seed, self.index


_JSON_TYPES: dict[str, Any] = {
    **{field.name: field.type for field in fields(Record)},
    **{"option_logits": list, "seconds": int | float},
}


def append(path: Path, records: Iterable[Record]) -> None:
    """Appends records, one JSON object a line, and syncs once.

    A line that a kill cut short is removed first. The file is made where there is none.
    """
    with open(path, "a+b") as file:
        file.truncate(_end_of_lines(path))
        file.write(b"".join(json.dumps(asdict(record)).encode() + b"\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """Returns the records of a file, in its order; none where there is no file yet.

    A last line that a kill cut short is dropped. Of several records with one key the first counts.
    """
    unique: dict[tuple[str, str, int, int], Record] = {}
    n_duplicates = 0
    for number, row in read_lines(path):
        try:
            record = _parse(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        n_duplicates += record.key in unique
        unique.setdefault(record.key, record)
    if n_duplicates:
        log.info("%s: left out %d repeated records", path, n_duplicates)
    return list(unique.values())


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Returns the JSON objects of a JSONL file with their line numbers, from 1.

    A last line without its newline was cut by a kill and is dropped; no file reads as no lines.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        log.info("%s: dropped a last line that was cut short after %d bytes", path, len(rest))
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append((number, row))
    return rows


def _end_of_lines(path: Path) -> int:
    """Bytes up to and including the last newline."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        log.info("%s: removed a last line that was cut short after %d bytes", path, len(content) - end)
    return end


def _parse(row: dict[str, Any]) -> Record:
    """The record in a JSON object; ValueError on wrong names or types."""
    if set(row) != set(_JSON_TYPES):
        missing, unknown = sorted(set(_JSON_TYPES) - set(row)), sorted(set(row) - set(_JSON_TYPES))
        raise ValueError(f"a record has the fields {list(_JSON_TYPES)}; missing {missing}, unknown {unknown}")
    for name, kind in _JSON_TYPES.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"field {name!r} must be {kind}, got {row[name]!r}")
    if not all(isinstance(logit, int | float) for logit in row["option_logits"]):
        raise ValueError(f"field 'option_logits' must hold numbers, got {row['option_logits']!r}")
    logits = tuple(float(logit) for logit in row["option_logits"])
    for name in ("label", "prediction"):
        if not 0 <= row[name] < len(logits):
            raise ValueError(f"field {name!r} must be in 0..{len(logits) - 1}, got {row[name]}")
    return Record(**{**row, "option_logits": logits, "seconds": float(row["seconds"])})
