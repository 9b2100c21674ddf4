"""A run of analyses: each part's tables as CSV, kept until the router or the settings change."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

import icrouting
from icrouting.analysing.parts import ANALYSES, Part
from icrouting.analysing.pictures import Picture
from icrouting.analysing.study import Study
from icrouting.runtime.storage import load_json, save_json, save_text
from icrouting.tasks.task import rows_digest, template_digest

STATE = "analysis.json"


@dataclass(frozen=True, eq=False)
class Finding:
    """A part that was computed, now or earlier.

    Attributes:
        name: of the part.
        part: the analysis.
        tables: what it gave, by name.
        was_kept: whether an earlier run computed it.
    """

    name: str
    part: Part
    tables: dict[str, pd.DataFrame]
    was_kept: bool

    @cached_property
    def pictures(self) -> list[Picture]:
        """What its tables look like."""
        return self.part.pictures(self.tables)


@dataclass(frozen=True)
class AnalysisFolder:
    """Where a run keeps its tables, and what each of them was made of."""

    path: Path

    @property
    def page(self) -> Path:
        """The page."""
        return self.path / "analysis.html"

    @property
    def state(self) -> Path:
        """What each part was made of, and the names of its tables."""
        return self.path / STATE

    def table(self, part: str, name: str) -> Path:
        """Returns the file of a table."""
        return self.path / f"{part}-{name}.csv"

    def kept(self) -> dict[str, dict[str, Any]]:
        """Returns by part what it was made of and its tables' names; ValueError if damaged."""
        if not self.state.exists():
            return {}
        parts = load_json(self.state).get("parts")
        if not isinstance(parts, dict):
            raise ValueError(f"{self.state} is damaged: delete it, and all parts are made anew")
        return parts

    def read(self, part: str, names: list[str]) -> dict[str, pd.DataFrame] | None:
        """Returns the tables of a part; None where a file is gone."""
        tables = {}
        for name in names:
            file = self.table(part, name)
            if not file.exists():
                return None
            # A task may be called "nan": nothing but an empty field is none.
            tables[name] = pd.read_csv(file, keep_default_na=False, na_values=[""])
        return tables

    def write(self, part: str, made_of: dict[str, Any], tables: dict[str, pd.DataFrame]) -> None:
        """Writes the tables of a part, and then what they were made of."""
        for name, table in tables.items():
            save_text(self.table(part, name), table.to_csv(index=False))
        kept = self.kept()
        kept[part] = {"made_of": made_of, "tables": list(tables)}
        save_json(self.state, {"parts": kept})


def made_of(study: Study, name: str, fingerprint: str) -> dict[str, Any]:
    """Returns what a part's numbers depend on; with another one they are computed anew."""
    tasks = list(study.tasks.values())
    common = {
        "version": icrouting.__version__,
        "router": study.icr.digest(),
        "model": fingerprint,
        "dtype": str(study.decoder.base.dtype),
        "tasks": study.task_names,
        "rows": rows_digest(tasks),
        "chat_template": template_digest(tasks),
        "n_test": study.config.n_test,
        "seed": study.config.seed,
    }
    for setting in ANALYSES[name].settings:
        common[setting] = getattr(study.config, setting)
    return common


def analyse(study: Study, folder: AnalysisFolder) -> Iterator[Finding]:
    """Yields the parts that are asked for, as each is there; its tables are on disk by then."""
    folder.path.mkdir(parents=True, exist_ok=True)
    fingerprint = study.decoder.fingerprint
    chosen = study.config.chosen
    if any(ANALYSES[name].shows_demos for name in chosen):
        # Before any pass: a few-shot prompt that does not fit is said at once.
        _ = study.contexts
    for name in chosen:
        check = ANALYSES[name].check
        if check is not None:
            check(study)
    for name in chosen:
        yield found(study, folder, name, fingerprint)


def found(study: Study, folder: AnalysisFolder, name: str, fingerprint: str) -> Finding:
    """Returns a part, read where it is kept, or computed and written."""
    part = ANALYSES[name]
    now = made_of(study, name, fingerprint)
    entry = folder.kept().get(name)
    if entry is not None and entry.get("made_of") == now:
        tables = folder.read(name, entry["tables"])
        if tables is not None:
            return Finding(name, part, tables, was_kept=True)
    computed = part.tables(study)
    folder.write(name, now, computed)
    # As they are read later on, so that the page is the same.
    tables = folder.read(name, list(computed))
    assert tables is not None, "the tables were just written"
    return Finding(name, part, tables, was_kept=False)
