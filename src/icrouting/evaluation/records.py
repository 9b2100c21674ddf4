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

BASELINE = "zero-shot"  # the method that gains are measured against


@dataclass(frozen=True)
class Record:
    """One prediction of one method on one test item.

    Attributes:
        method: name of the method.
        task: name of the task.
        seed: that of demonstrations and fits; all seeds ask the same items.
        index: the item's position in the task's test split.
        label: the right option.
        prediction: the option with the highest of `option_logits`.
        option_logits: the options' logits at the next position or, where a task scores whole
            labels, the sums or means of their tokens' log-probabilities.
        n_tokens: the prompt's, demonstrations included.
        seconds: wall time of this item's share of its batch.
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
        last = len(self.option_logits) - 1
        for name, option in (("label", self.label), ("prediction", self.prediction)):
            if not 0 <= option <= last:
                raise ValueError(f"{name} must be in 0..{last}, got {option}")

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What makes a record unique: method, task, seed and index."""
        return self.method, self.task, self.seed, self.index


def append(path: Path, records: Iterable[Record]) -> None:
    """Appends records, one JSON object a line, and syncs once.

    A line that a kill cut short is removed first. The file is made where there is none.
    """
    with open(path, "a+b") as file:
        # Opened for appending, the file stands at its end.
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        n_cut = len(content) - end
        if n_cut:
            log.info("%s: removed a last line that was cut short after %d bytes", path, n_cut)
        file.truncate(end)
        for record in records:
            file.write(json.dumps(asdict(record)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def part(path: Path, process: int) -> Path:
    """Returns the file that one of several processes appends to, beside the first one's."""
    return path.with_suffix(f".{process}{path.suffix}") if process else path


def _parts(path: Path) -> list[Path]:
    """The other processes' files."""
    parts = []
    for file in path.parent.glob(f"{path.stem}.*{path.suffix}"):
        # What else lies there under such a name, a user's copy for one, is left alone.
        if file.stem.removeprefix(f"{path.stem}.").isdigit():
            parts.append(file)
    return sorted(parts)


def gather(path: Path) -> None:
    """Moves what other processes left in files of their own into the first one's."""
    known_keys = {record.key for record in read_lines(path, Record)}
    for file in _parts(path):
        # A kill between the two steps leaves the file beside what was moved from it.
        part_records = read_lines(file, Record)
        append(path, [record for record in part_records if record.key not in known_keys])
        file.unlink()


def read(path: Path) -> list[Record]:
    """Returns the records of a file and of its parts, in their order; none where no file is yet.

    A last line that a kill cut short is dropped. Of several records with one key the first counts.
    """
    records: list[Record] = []
    for file in (path, *_parts(path)):
        records += read_lines(file, Record)
    records_by_key: dict[tuple[str, str, int, int], Record] = {}
    for record in records:
        records_by_key.setdefault(record.key, record)
    n_repeated = len(records) - len(records_by_key)
    if n_repeated:
        log.info("%s: left out %d repeated records", path, n_repeated)
    return list(records_by_key.values())
