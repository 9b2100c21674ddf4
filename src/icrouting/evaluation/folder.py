"""The folder of a run: what its files are called, and how its configuration is read and written."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from icrouting.runtime.storage import load_json, save_json

TRAINING = "training.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What a run found beside its records, as config.json has it.

    Attributes:
        refused: method, task and reason of each pair that does not go together.
        skipped: method, task and number of the items that were left out, as their scores are not
            finite.
        ratios: each method's time over that of `baseline`, see `timing.time_ratios`; empty if none
            was measured.
        baseline: the method that the others are timed against.
        costs: what the methods' fits took, see `costs.fit_costs`.
    """

    refused: list[list[str]]
    skipped: list[list[Any]]
    ratios: list[dict[str, Any]]
    baseline: str
    costs: list[dict[str, Any]]

    def entries(self) -> dict[str, Any]:
        """Returns the entries of config.json."""
        # Where nothing was timed, config.json keeps what an earlier run timed.
        timing = {"timing": {"baseline": self.baseline, "ratios": self.ratios}}
        measured = timing if self.ratios else {}
        return {"refused": self.refused, "skipped": self.skipped, **measured, "fits": self.costs}


@dataclass(frozen=True)
class RunFolder:
    """A run on disk; its files need not be there yet."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """What was run, and what came of it beside the records."""
        return self.path / "config.json"

    @property
    def records(self) -> Path:
        """The predictions, one a line; other processes' lie beside it."""
        return self.path / "records.jsonl"

    @property
    def fits(self) -> Path:
        """The folder of what methods learned."""
        return self.path / "fits"

    @property
    def tried(self) -> Path:
        """The settings that fits tried."""
        return self.path / "tried.csv"

    @property
    def routing(self) -> Path:
        """What the router did on each task."""
        return self.path / "routing.json"

    @property
    def training(self) -> Path:
        """The router's training curve, one step a line."""
        return self.path / TRAINING

    def routing_of(self, name: str) -> Path:
        """What the router did that has a name of its own."""
        return self.path / f"routing-{quote(name, safe='')}.json"

    def training_of(self, name: str) -> Path:
        """The training curve of the router that has a name of its own."""
        return self.path / f"training-{quote(name, safe='')}.jsonl"

    @property
    def summary(self) -> Path:
        """The report as figures."""
        return self.path / "summary.json"

    @property
    def csv(self) -> Path:
        """The report's table as figures."""
        return self.path / "report.csv"

    @property
    def markdown(self) -> Path:
        """The report as text."""
        return self.path / "report.md"

    @property
    def html(self) -> Path:
        """The report as a page."""
        return self.path / "report.html"

    def is_bare(self) -> bool:
        """Whether nothing lies here but a configuration: no answer, no fit, nobody's file."""
        for file in self.path.iterdir():
            is_empty = not any(file.iterdir()) if file.is_dir() else file.stat().st_size == 0
            if file != self.config and not is_empty and not file.name.startswith("lock."):
                return False
        return True

    def read_config(self) -> dict[str, Any]:
        """Returns the content of config.json; ValueError where there is none."""
        if not self.config.exists():
            raise ValueError(f"{self} is no run folder: it holds no {self.config.name}")
        return load_json(self.config)

    def write_config(self, content: dict[str, Any]) -> None:
        """Replaces config.json."""
        save_json(self.config, content)

    def add(self, outcome: Outcome) -> None:
        """Adds to config.json what a run found."""
        self.write_config({**self.read_config(), **outcome.entries()})

    def take_training(self, fit_folder: Path, name: str | None = None) -> None:
        """Copies the training curve that the fit of a router (`name`: its own) left, if it did."""
        curve = fit_folder / TRAINING
        if curve.exists():
            shutil.copyfile(curve, self.training if name is None else self.training_of(name))
