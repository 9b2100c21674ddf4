"""Records: one prediction a line, appended to a JSONL file that survives a kill."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict

from icrouting.runtime.storage import read_lines

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One prediction of one method on one test item.

    `seed` is that of demonstrations and fits (all seeds ask the same items), `index` the item's position in the task's
    test split; `label` and `prediction` are the right option and the one with the highest of `option_logits`, which
    are those at the next position; `n_tokens` counts the prompt's, demonstrations included; `seconds` is wall time of
    this item's share of its batch.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    method: str
    task: str
    seed: int
    index: int
    label: int
    prediction: int
    option_logits: tuple[float, ...]
    n_tokens: int
    seconds: float

    def __post_init__(self):
        for name, option in (("label", self.label), ("prediction", self.prediction)):
            if not 0 <= option < len(self.option_logits):
                raise ValueError(
                    f"{name} must be in 0..{len(self.option_logits) - 1}, got {option}"
                )

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What makes a record unique: method, task, seed and index."""
        return self.method, self.task, self.seed, self.index


def append(path: Path, records: Iterable[Record]) -> None:
    """Appends records, one JSON object a line, and syncs once.

    A line that a kill cut short is removed first. The file is made where there is none.
    """
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            log.info(
                "%s: removed a last line that was cut short after %d bytes",
                path,
                len(content) - end,
            )
        file.truncate(end)
        file.write(b"".join(json.dumps(asdict(record)).encode() + b"\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def part(path: Path, process: int) -> Path:
    """Returns the file that one of several processes appends to, beside the first one's."""
    return path.with_suffix(f".{process}{path.suffix}") if process else path


def _parts(path: Path) -> list[Path]:
    """The other processes' files; what else lies beside them, such as a user's copy, is left alone."""
    found = path.parent.glob(f"{path.stem}.*{path.suffix}")
    return sorted(file for file in found if file.stem.removeprefix(f"{path.stem}.").isdigit())


def gather(path: Path) -> None:
    """Moves what other processes left in files of their own into the first one's."""
    done = {record.key for record in read_lines(path, Record)}
    for file in _parts(path):  # a kill between the two steps leaves repeats, which are left out
        append(path, [record for record in read_lines(file, Record) if record.key not in done])
        file.unlink()


def read(path: Path) -> list[Record]:
    """Returns the records of a file and of its parts, in their order; none where there is no file yet.

    A last line that a kill cut short is dropped. Of several records with one key the first counts.
    """
    files = [path, *_parts(path)]
    records, unique = [record for file in files for record in read_lines(file, Record)], {}
    for record in records:
        unique.setdefault(record.key, record)
    if n_repeated := len(records) - len(unique):
        log.info("%s: left out %d repeated records", path, n_repeated)
    return list(unique.values())


BASELINE = "zero-shot"
