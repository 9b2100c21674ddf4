"""Appended files: they grow by whole pieces, and a kill at any point leaves what can be gone on.

What is in the file and how far it is good stands in a small file beside it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from icrouting.runtime.checks import differences, read
from icrouting.runtime.storage import load_json, save_json

STATE_ENDING = ".state.json"


@dataclass(frozen=True)
class Progress:
    """How far an appended file has come.

    Attributes:
        about: what the file is made of, and how; another file's differs.
        n_rows: rows that stand in it.
        n_bytes: its length up to their end; what is behind was cut by a kill.
        counts: of rows, by what is counted and its values.
        is_finished: whether no row is to come.
    """

    about: dict[str, str]
    n_rows: int = 0
    n_bytes: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    is_finished: bool = False


class AppendedFile:
    """A file to which whole pieces are appended, each with the rows that it holds.

    Args:
        file: the file; its state lies beside it, as "NAME.state.json".
        about: what it is made of, and how, each as a phrase.

    Raises:
        ValueError: the file is there and is not one of these, or it is made of something else.
    """

    def __init__(self, file: Path, about: Mapping[str, str]):
        self.file = file
        self.state_file = file.with_name(file.name + STATE_ENDING)
        self.progress = Progress(dict(about))
        if self.state_file.exists():
            self.progress = read(Progress, load_json(self.state_file))
            self.check(about)
        elif file.exists():
            raise ValueError(
                f"{file} is there already, and no {self.state_file.name} beside it says what it "
                "is made of: choose another --out, or delete it"
            )

    def check(self, about: Mapping[str, str]) -> None:
        """Checks what the file is made of, as far as it was noted; ValueError says what differs."""
        noted = {name: text for name, text in about.items() if name in self.progress.about}
        phrases = differences(self.progress.about, noted, shown=str)
        if phrases:
            raise ValueError(
                f"{self.file} belongs to something else ({', '.join(phrases)}): choose another "
                f"--out, or delete it and {self.state_file.name}"
            )

    @contextmanager
    def opened(self, about: Mapping[str, str]) -> Iterator[None]:
        """Inside, the file is this process's alone, and ends behind its last whole piece.

        Args:
            about: what is noted beside what was known when the file was looked for.

        Raises:
            ValueError: another process writes to it, or it is shorter than its state says.
            OSError: it cannot be written.
        """
        self.check(about)
        lock = FileLock(self.file.with_name(self.file.name + ".lock"))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process is writing to {self.file}: wait for it") from error
        try:
            self.file.touch()
            size = self.file.stat().st_size
            if size < self.progress.n_bytes:
                raise ValueError(
                    f"{self.file} was changed: it has {size} bytes, and {self.progress.n_bytes} "
                    f"were written; delete it and {self.state_file.name}"
                )
            self._cut()
            self._save({"about": {**self.progress.about, **about}})
            yield
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def append(self, piece: bytes, n_rows: int, counts: dict[str, dict[str, int]]) -> None:
        """Appends a piece, and notes that it is there.

        Args:
            piece: what is appended.
            n_rows: rows in it.
            counts: of all rows, those before among them.

        Raises:
            OSError: it cannot be written; the file is then as it was before.
        """
        try:
            with self.file.open("ab", buffering=0) as stream:
                _write_all(stream.fileno(), piece)
            progress = self.progress
            self._save(
                {
                    "n_rows": progress.n_rows + n_rows,
                    "n_bytes": progress.n_bytes + len(piece),
                    "counts": counts,
                }
            )
        except OSError as error:
            # What is behind the last whole piece would be cut by the next run too.
            with suppress(OSError):
                self._cut()
            raise OSError(
                f"cannot write {self.file} ({error.strerror or error}): make room; it keeps "
                f"{self.progress.n_rows:,} rows, and the same command goes on from there"
            ) from error

    def finish(self) -> None:
        """Notes that no row is to come."""
        self._save({"is_finished": True})

    def _cut(self) -> None:
        os.truncate(self.file, self.progress.n_bytes)

    def _save(self, changes: dict[str, Any]) -> None:
        """Notes how far the file has come; on disk first."""
        progress = Progress(**{**asdict(self.progress), **changes})
        save_json(self.state_file, asdict(progress))
        self.progress = progress


def _write_all(descriptor: int, piece: bytes) -> None:
    """Writes a piece, of which the system may take a part at a time."""
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
