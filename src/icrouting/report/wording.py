"""Conclusion: the sentence at the head of a report, losses included."""

from icrouting.evaluation.records import BASELINE
from icrouting.report.metrics import Estimate
from icrouting.report.summary import Summary
from icrouting.runtime.pages import points


def conclusion(summary: Summary) -> str:
    """Returns in plain English what the figures say of the method in question against the others."""
    method = summary.headline
    opening = "So far (the run is not complete), " if summary.unfinished else ""
    if method is None:
        return f"{opening}there is no gain to report: only {summary.methods[0].name} has been run.".capitalize()
    parts = [_group_clause(summary, method, group) for group in ("source", "unseen")]
    sentences = [
        f"{opening}{label(method)} scores {', and '.join(part for part in parts if part)}."
    ]
    return " ".join([*sentences, *_collapse_sentence(summary, method), *_rival_sentence(summary)])


def label(method: str) -> str:
    """The name that readers see."""
    return method.upper() if method == "icr" else method


def span(estimate: Estimate) -> str:
    """An interval in words: "95 % interval 5.1 to 13.0"."""
    return f"95 % interval {points(estimate.low)} to {points(estimate.high)}"


def verdict(gain: Estimate) -> str:
    """A paired mean difference in words, with its interval."""
    doubt = "; not distinguishable from no change" if gain.low <= 0 <= gain.high else ""
    size = points(abs(gain.value))
    side = (
        f"{size} points {'above' if gain.value > 0 else 'below'}" if size != "0.0" else "level with"
    )
    return f"{side} {BASELINE} ({span(gain)}{doubt})"


def _group_clause(summary: Summary, method: str, group: str) -> str:
    """Mean accuracy over a group and the gain on it; empty where the method has no records there."""
    mean = summary.line("mean", group, method)
    if mean is None:
        return ""
    done, of = mean.accuracy_n, len(summary.groups[group])
    which = (
        f"the {done} {group} task{'s' if done > 1 else ''}"
        if done == of
        else f"{done} of the {of} {group} tasks"
    )
    gain = Estimate(mean.gain, mean.gain_low, mean.gain_high, int(mean.gain_n))
    against = f", {verdict(gain)}" if gain.n else f" (no {BASELINE} records to compare with)"
    return f"{points(mean.accuracy)} {'on average over' if done > 1 else 'on'} {which}{against}"


def _collapse_sentence(summary: Summary, method: str) -> list[str]:
    cells = summary.cells(method).dropna(subset="gain")
    lost = cells[cells.gain < 0]
    if lost.empty:
        return [f"It is below {BASELINE} on none of {_tasks(len(cells))}."] if len(cells) else []
    surely = ", ".join(lost.index[lost.direction < 0])
    ending = (
        f"significantly on {surely} (Holm-corrected)" if surely else "on none of them significantly"
    )
    return [
        f"It is below {BASELINE} on {len(lost)} of {_tasks(len(cells))} ({', '.join(lost.index)}), {ending}."
    ]


def _rival_sentence(summary: Summary) -> list[str]:
    """The methods with a higher accuracy on what both have answered."""
    ahead = [
        f"{label(method)} by {points(lead.value)} points ({span(lead)}, {_tasks(lead.n)})"
        for method, lead in summary.rivals.items()
        if round(lead.value, 3) > 0
    ]
    return [f"Ahead of it: {', '.join(ahead)}."] if ahead else []


def _tasks(n_tasks: int) -> str:
    return f"{n_tasks} task{'s' if n_tasks != 1 else ''}"
