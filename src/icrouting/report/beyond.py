"""Beyond calibration: what methods add to the prior that can be taken away for nothing."""

from math import isnan
from typing import Any

from icrouting.evaluation.records import BASELINE
from icrouting.report import metrics, wording
from icrouting.report.summary import Summary
from icrouting.runtime.pages import points

TITLE = "Beyond calibration: accuracy, %, and gains in points"
LEGEND = (
    "After batch calibration: from every method's answers to a task the options' mean scores over "
    f"its items are taken away, which needs no label. Gains are over {BASELINE} calibrated alike, "
    "with their 95 % intervals. It assumes that the options are about equally frequent, and does "
    "harm where they are not."
)
NONE = "\N{EN DASH}"
# Means over further groups would make the table too wide to read.
_GROUPS = ("source", "unseen", "all")


def lines(summary: Summary, calibrated: Summary) -> list[list[str]]:
    """Returns a line a method, under a heading: each mean before and after, and the gain beyond.

    Args:
        summary: the figures of the answers as they are.
        calibrated: those of the same answers without the options' priors.
    """
    groups = _groups(summary)
    table = [["method", *(f"mean {group}: before, after, gain beyond" for group in groups)]]
    for method in summary.methods:
        texts = [_text(summary, calibrated, group, method.name) for group in groups]
        table.append([wording.label(method.name), *texts])
    return table


def _groups(summary: Summary) -> list[str]:
    """The groups to show, without those of the same tasks as an earlier one."""
    shown: dict[tuple[str, ...], str] = {}
    for group in _GROUPS:
        if group in summary.groups:
            shown.setdefault(summary.groups[group], group)
    return list(shown.values())


def _text(summary: Summary, calibrated: Summary, group: str, method: str) -> str:
    """A method's mean as it is and calibrated, and its gain over the calibrated baseline."""
    before = summary.line("mean", group, method)
    after = calibrated.line("mean", group, method)
    if before is None or after is None:
        return NONE
    n_tasks = len(summary.groups[group])
    text = f"{_accuracy(before, n_tasks)} → {_accuracy(after, n_tasks)}"
    if isnan(after.gain):
        return text
    ends = (points(end, is_signed=True) for end in (after.gain_low, after.gain_high))
    return f"{text}, {points(after.gain, is_signed=True)} ({' to '.join(ends)})"


def _accuracy(mean: Any, n_tasks: int) -> str:
    text = points(mean.accuracy)
    # A mean over fewer tasks is no comparison with one over all.
    if mean.accuracy_n < n_tasks:
        text += f" ({mean.accuracy_n} of {n_tasks} tasks)"
    return text


def conclusion(calibrated: Summary) -> str:
    """Returns in plain English what the headline method adds to calibration.

    Empty where there is nothing to compare.
    """
    clauses = []
    for group in ("source", "unseen"):
        clause = _clause(calibrated, group)
        if clause:
            clauses.append(clause)
    if not clauses:
        return ""
    name = wording.label(str(calibrated.headline))
    return f"With both calibrated by their batch, {name} is {', and '.join(clauses)}."


def _clause(calibrated: Summary, group: str) -> str:
    """The headline's gain beyond calibration over a group of tasks."""
    if calibrated.headline is None:
        return ""
    mean = calibrated.line("mean", group, calibrated.headline)
    if mean is None or not mean.gain_n:
        return ""
    gain = metrics.Estimate(mean.gain, mean.gain_low, mean.gain_high, int(mean.gain_n))
    return f"{wording.verdict(gain)} on the {group} tasks"
