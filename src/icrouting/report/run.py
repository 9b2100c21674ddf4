"""A run as its report needs it: the content of config.json, read once and held against types."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from icrouting.evaluation.folder import RunFolder
from icrouting.runtime.checks import read


@dataclass(frozen=True)
class RunTask:
    """A task of a run; `role` is "source" or "unseen", `options` are not kept by old runs."""

    name: str
    group: str
    role: str
    n_options: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class TimeRatio:
    """A method's time over the baseline's, and the numbers that it keeps beside the model."""

    method: str
    ratio: float
    low: float
    high: float
    note: str
    n_cached: int = 0


@dataclass(frozen=True)
class Timing:
    """What was measured in turns."""

    baseline: str
    ratios: tuple[TimeRatio, ...]


@dataclass(frozen=True)
class FitCost:
    """What a method's fits took, the mean over them; no `seconds` of one before the run."""

    method: str
    fits: int
    labelled: float
    trained: float
    forwards: float
    backwards: float
    seconds: float | None


@dataclass(frozen=True)
class Run:
    """What was run, and what came of it beside the records.

    Attributes:
        command: the command line.
        commit: the commit of the code.
        created: when it was begun.
        model: name of the base model.
        dtype: the weights'; None where an old run does not say.
        router: digest of the router; None without one.
        seeds: of demonstrations and fits.
        n_test: test items a task, at most.
        methods: their names.
        tasks: the tasks.
        notes: what was cut short.
        refused: method, task and reason of each pair that does not go together.
        skipped: method, task and number of the items that it was not measured on, as its scores
            are not finite there.
        timing: what was measured in turns; None if nothing was.
        fits: what fits took; empty where nothing is fitted.
        as_written: all of config.json, in its order, for the list of what else there is.
        routers: what identifies each router that has a name of its own, by that name.
    """

    command: str
    commit: str
    created: str
    model: str
    dtype: str | None
    router: str | None
    seeds: list[int]
    n_test: int
    methods: list[str]
    tasks: list[RunTask]
    notes: list[str]
    refused: list[tuple[str, str, str]]
    skipped: list[tuple[str, str, int]]
    timing: Timing | None
    fits: list[FitCost]
    as_written: Mapping[str, Any]
    routers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Run":
        """Returns what a run's config.json says; ValueError if a report could not be made of it."""
        # What runs of earlier versions did not write, and unfinished ones have yet to.
        absent = {"dtype": None, "router": None, "notes": [], "refused": [], "skipped": []}
        absent["routers"] = {}
        known = {name: content[name] for name in cls.__annotations__ if name in content}
        run = read(cls, {**absent, "timing": None, "fits": [], **known, "as_written": {}})
        return replace(run, as_written=content)

    def n_cached(self) -> dict[str, int]:
        """Returns by method the numbers that it keeps beside the model, a kept context included."""
        ratios = self.timing.ratios if self.timing else ()
        # Timed with its context kept, a method has a further row, which comes later and counts.
        return {ratio.method.removesuffix(", context kept"): ratio.n_cached for ratio in ratios}


def read_run(folder: RunFolder) -> Run:
    """Returns the run in a folder; ValueError if there is none, or it is damaged."""
    content = folder.read_config()
    try:
        return Run.of(content)
    except ValueError as error:
        raise ValueError(f"{folder.config} is damaged: {error}") from error
