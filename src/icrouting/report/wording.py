"""Wording: the sentences at the head of a report, losses included."""

import pandas as pd

from icrouting.evaluation.records import BASELINE
from icrouting.report.metrics import Estimate
from icrouting.report.summary import Summary
from icrouting.runtime.pages import counted, points


def conclusion(summary: Summary) -> str:
    """Returns in plain English what the figures say of the headline method against the others."""
    method = summary.headline
    opening = "So far (the run is not complete), " if summary.unfinished else ""
    if method is None:
        baseline = summary.methods[0].name
        sentence = f"{opening}there is no gain to report: only {baseline} has been run."
        return sentence.capitalize()
    clauses = [_group_clause(summary, method, group) for group in ("source", "unseen")]
    scores = ", and ".join(clause for clause in clauses if clause)
    sentences = [
        f"{opening}{label(method)} scores {scores}.",
        _collapse_sentence(summary, method),
        _rival_sentence(summary),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def label(method: str) -> str:
    """Returns the name that readers see."""
    return method.upper() if method == "icr" else method


def span(estimate: Estimate) -> str:
    """Returns an interval in words: "95 % interval 5.1 to 13.0"."""
    return f"95 % interval {points(estimate.low)} to {points(estimate.high)}"


def verdict(gain: Estimate) -> str:
    """Returns a paired mean difference in words, with its interval."""
    size = points(abs(gain.value))
    side = "above" if gain.value > 0 else "below"
    # What rounds to nothing is on neither side.
    distance = "level with" if size == "0.0" else f"{size} points {side}"
    # An interval that holds 0 is said to, so that noise is not read as a gain.
    doubt = "; not distinguishable from no change" if gain.low <= 0 <= gain.high else ""
    return f"{distance} {BASELINE} ({span(gain)}{doubt})"


def _group_clause(summary: Summary, method: str, group: str) -> str:
    """Mean accuracy over a group and the gain on it; empty where the method has no records."""
    mean = summary.line("mean", group, method)
    if mean is None:
        return ""
    n_scored = int(mean.accuracy_n)
    n_tasks = len(summary.groups[group])
    if n_scored == n_tasks:
        tasks = f"the {counted(n_scored, f'{group} task')}"
    else:
        tasks = f"{n_scored} of the {counted(n_tasks, f'{group} task')}"
    over = "on average over" if n_scored > 1 else "on"
    gain = Estimate(mean.gain, mean.gain_low, mean.gain_high, int(mean.gain_n))
    against = f", {verdict(gain)}" if gain.n else f" (no {BASELINE} records to compare with)"
    return f"{points(mean.accuracy)} {over} {tasks}{against}"


def _collapse_sentence(summary: Summary, method: str) -> str:
    """The tasks that the method is worse on than the baseline; empty where none can be compared."""
    compared = summary.cells(method).dropna(subset="gain")
    if compared.empty:
        return ""
    losses = compared[compared.gain < 0]
    if len(compared) == 1:
        return _lone_collapse_sentence(losses)
    n_compared = counted(len(compared), "task")
    if losses.empty:
        return f"It is below {BASELINE} on none of {n_compared}."
    significant = ", ".join(losses.index[losses.direction < 0])
    ending = "on none of them significantly" if len(losses) > 1 else "not significantly"
    if significant:
        ending = f"significantly on {significant} (Holm-corrected)"
    names = ", ".join(losses.index)
    return f"It is below {BASELINE} on {len(losses)} of {n_compared} ({names}), {ending}."


def _lone_collapse_sentence(losses: pd.DataFrame) -> str:
    """Whether the method is worse than the baseline on the only task that can be compared."""
    if losses.empty:
        return f"It is not below {BASELINE} on this task."
    (name,) = losses.index
    degree = "significantly" if losses.direction.item() < 0 else "not significantly"
    return f"It is below {BASELINE} on {name}, {degree}."


def _rival_sentence(summary: Summary) -> str:
    """The methods with a higher accuracy on what both have answered; empty where there are none."""
    leads = []
    for method, lead in summary.rivals.items():
        # A lead that would read 0.0 is none.
        if round(lead.value, 3) > 0:
            doubt = "; not distinguishable from no lead" if lead.low <= 0 else ""
            behind = f"{span(lead)}, {counted(lead.n, 'task')}{doubt}"
            leads.append(f"{label(method)} by {points(lead.value)} points ({behind})")
    return f"Ahead of it: {', '.join(leads)}." if leads else ""
