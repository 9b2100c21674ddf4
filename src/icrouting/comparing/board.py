"""Board: what every method of a comparison came to, a line each, in order of cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import pandas as pd

from icrouting.comparing.ladder import FEW_SHOT, limit_of
from icrouting.comparing.recommendation import Recommendation, recommend
from icrouting.evaluation import records
from icrouting.evaluation.costs import fit_costs
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.records import BASELINE
from icrouting.report import metrics
from icrouting.report.metrics import Estimate
from icrouting.report.run import Run, read_run
from icrouting.report.wording import label
from icrouting.runtime.pages import points
from icrouting.tasks.task import Task


@dataclass(frozen=True)
class Measured:
    """A method's line.

    Attributes:
        method: its name.
        accuracy: on the held-back rows.
        gain: the paired difference to the baseline; None for the baseline itself.
        p_value: of that, by McNemar's test, corrected over the methods; None likewise.
        labelled: labelled rows that it looked at.
        fit_seconds: what its fit took; None where there is none, or it is not known.
        milliseconds: of a prompt, as it answered.
        ratio: its time over the baseline's, in turns, with its context kept; None where it was not
            timed.
        n_cached: numbers that it keeps beside the model.
        limit: what it cannot do, as the end of a sentence that begins with "it".
    """

    method: str
    accuracy: Estimate
    gain: Estimate | None
    p_value: float | None
    labelled: int
    fit_seconds: float | None
    milliseconds: float
    ratio: float | None
    n_cached: int
    limit: str


@dataclass(frozen=True)
class Board:
    """A comparison's table and what is recommended by it.

    Attributes:
        task: name of the task.
        lines: the methods that answered every row, in order of cost.
        missed: the seconds that methods were expected to take which time was lacking for.
        refused: why methods do not fit the task.
        recommendation: which to use.
        n_train: rows that all learned from.
        n_validation: rows that all chose on.
        majority: the accuracy of always giving the most frequent label of the held-back rows.
    """

    task: str
    lines: tuple[Measured, ...]
    missed: dict[str, float]
    refused: dict[str, str]
    recommendation: Recommendation
    n_train: int
    n_validation: int
    majority: float

    def line(self, method: str) -> Measured:
        """Returns the line of a method that answered."""
        (line,) = [line for line in self.lines if line.method == method]
        return line


def board_of(
    folder: RunFolder,
    task: Task,
    names: Sequence[str],
    *,
    missed: Mapping[str, float],
    refused: Mapping[str, str],
    fit_seconds: Mapping[str, float | None],
    n_demos: int,
    encoder: str,
) -> Board:
    """Returns the board of a run's folder.

    Args:
        folder: the run's, complete.
        task: what was compared on.
        names: the methods in order of cost, the baseline first.
        missed: by method that was not run, the seconds that it was expected to take.
        refused: by method that does not fit, why.
        fit_seconds: what fits took that the run's files do not tell.
        n_demos: the demonstrations of a few-shot prompt.
        encoder: what the router reads, as `FitConfig.encoder` names it.
    """
    lines = metrics.frame(records.read(folder.records))
    frames = _whole(lines, [name for name in names if name not in refused])
    baseline = frames[BASELINE]
    outcomes = {name: _in_order(frame).right.to_numpy() == 1.0 for name, frame in frames.items()}
    recommendation = recommend(outcomes, _in_order(baseline).label.to_numpy())
    run = read_run(folder)
    fits = {fit.method: fit for fit in run.fits}
    n_cached = run.n_cached()
    measured = []
    for name, frame in frames.items():
        fit = fits.get(name)
        # Few-shot prompts show rows and fit nothing.
        labelled = n_demos if name == FEW_SHOT else 0
        seconds = fit_seconds.get(name)
        line = Measured(
            method=name,
            accuracy=metrics.accuracy(frame),
            gain=None if name == BASELINE else metrics.difference(frame, baseline),
            p_value=recommendation.p_values.get(name),
            labelled=round(fit.labelled) if fit else labelled,
            fit_seconds=fit.seconds if fit and seconds is None else seconds,
            milliseconds=1000 * median(frame.seconds),
            ratio=_ratio(run, name),
            n_cached=n_cached.get(name, 0),
            limit=limit_of(name, encoder),
        )
        measured.append(line)
    return Board(
        task=task.name,
        lines=tuple(measured),
        missed=dict(missed),
        refused=dict(refused),
        recommendation=recommendation,
        n_train=len(task.train),
        n_validation=len(task.validation),
        majority=metrics.majority(baseline),
    )


def progress_line(folder: RunFolder, method: str, fit_seconds: float | None) -> str:
    """Returns how one method did so far: accuracy, interval, seconds of its fit, time a prompt.

    Args:
        folder: the run's.
        method: its name.
        fit_seconds: what its fit took where the run's files do not tell.
    """
    lines = metrics.frame(records.read(folder.records))
    frame = lines.loc[lines.method == method]
    seconds = fit_seconds
    for cost in fit_costs(folder.fits, [method]):
        seconds = cost["seconds"]
    fit = "" if seconds is None else f"fit {seconds:.1f} s, "
    milliseconds = 1000 * median(frame.seconds)
    share = accuracy_text(metrics.accuracy(frame))
    return f"{label(method)}: {share} right, {fit}{milliseconds:.0f} ms a prompt"


def accuracy_text(accuracy: Estimate) -> str:
    """Returns an accuracy with its interval: "72.2 % (56.0 to 84.2)"."""
    return f"{points(accuracy.value)} % ({points(accuracy.low)} to {points(accuracy.high)})"


def _whole(lines: pd.DataFrame, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The records of the methods that answered what the baseline did, in order of cost."""
    items = set(lines.loc[lines.method == BASELINE, "item"])
    frames = {}
    for name in names:
        frame = lines.loc[lines.method == name]
        if set(frame.item) == items:
            frames[name] = frame
    return frames


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Records by their rows' places, so that those of two methods stand side by side."""
    return frame.iloc[np.argsort(frame["index"].to_numpy(), kind="stable")]


def _ratio(run: Run, method: str) -> float | None:
    """A method's time over the baseline's; with its context kept, where that was timed."""
    if method == BASELINE:
        return 1.0
    ratios = {}
    for row in run.timing.ratios if run.timing else ():
        # Timed with its context kept, a method has a further row, which comes later and counts.
        ratios[row.method.removesuffix(", context kept")] = row.ratio
    return ratios.get(method)
