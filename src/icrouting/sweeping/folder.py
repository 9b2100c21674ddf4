"""The folder of a sweep: where its fits, their stages, its run and its table lie."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote


@dataclass(frozen=True)
class SweepFolder:
    """A sweep on disk; its files need not be there yet."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def router(self, fit_name: str) -> Path:
        """The folder of one fit's router."""
        return self.path / "fits" / quote(fit_name, safe="= +,")

    @property
    def stages(self) -> Path:
        """What fits have in common: extractions, PIDs and trunks."""
        return self.path / "stages"

    @property
    def run(self) -> Path:
        """The run in which all settings are evaluated, with its report."""
        return self.path / "run"

    @property
    def markdown(self) -> Path:
        """The table as text."""
        return self.path / "sweep.md"

    @property
    def csv(self) -> Path:
        """The table as figures."""
        return self.path / "sweep.csv"

    @property
    def json(self) -> Path:
        """What was swept, and the table as figures."""
        return self.path / "sweep.json"

    @property
    def svg(self) -> Path:
        """The table as a picture."""
        return self.path / "sweep.svg"
