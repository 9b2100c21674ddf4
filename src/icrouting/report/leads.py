"""Leads: how far one method is ahead of another, item by item, across runs of the same items."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from icrouting.evaluation import records
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.records import BASELINE, Record
from icrouting.report import metrics
from icrouting.runtime.checks import known
from icrouting.runtime.pages import counted

# Where these differ, two records of one item do not answer the same question to the same model.
SAME_IN_ALL_RUNS = ("rows", "fingerprint", "dtype")


def leads(
    runs: Sequence[Path], pairs: Sequence[str] = (), without: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Returns the lead of each pair of methods over each group of tasks.

    Args:
        runs: Folders of runs that asked the same items; the first one's tasks are grouped. Where
            two hold the same record, the later folder's counts.
        pairs: "METHOD/METHOD", the first's lead over the second; none: every method over
            zero-shot.
        without: Tasks that leads are given without as well.

    Raises:
        ValueError: The runs are of other rows, weights or dtypes; or a method or task is unknown.
    """
    configs = [RunFolder(folder).read_config() for folder in runs]
    _check_same_items(configs)
    roles = {task["name"]: task["role"] for task in configs[0]["tasks"]}
    records_by_method = _records_by_method(runs)
    if not pairs:
        pairs = [f"{name}/{BASELINE}" for name in records_by_method if name != BASELINE]
    groups = task_groups(roles, without)
    leads_by_name = {}
    for pair in pairs:
        name, _, other_name = pair.partition("/")
        if not other_name:
            raise ValueError(f"expected METHOD/METHOD, such as icr/{BASELINE}, got {pair!r}")
        ours = known("method", name, records_by_method)
        theirs = known("method", other_name, records_by_method)
        for group, task_names in groups.items():
            shared = _shared_tasks(ours, theirs, task_names)
            # Of a group that the two have no item of in common nothing can be said.
            if shared:
                points = lead(ours, theirs, shared)
                if len(shared) < len(task_names):
                    points["tasks"] = f"{len(shared)} of {len(task_names)}"
                leads_by_name[f"{name} over {other_name}, {group}"] = points
    if not leads_by_name:
        raise ValueError("no two of the methods have answered the same items: nothing to pair")
    return leads_by_name


def _shared_tasks(
    ours: Sequence[Record], theirs: Sequence[Record], task_names: Sequence[str]
) -> list[str]:
    """The tasks of which both have answered an item for one seed."""
    our_keys = {(record.task, record.seed, record.index) for record in ours}
    their_keys = {(record.task, record.seed, record.index) for record in theirs}
    shared = {task for task, _, _ in our_keys & their_keys}
    return [name for name in task_names if name in shared]


def task_groups(roles: Mapping[str, str], without: Sequence[str] = ()) -> dict[str, list[str]]:
    """Returns the tasks of each role and all of them, and then without some of them.

    Args:
        roles: "source" or "unseen", by the task's name.
        without: Names of tasks to be left out; a group of these alone has no shortened form.
    """
    for name in without:
        known("task", name, roles)
    groups = {}
    for role in ("source", "unseen"):
        names = [name for name in roles if roles[name] == role]
        if names:
            groups[f"{role} tasks"] = names
    groups["all tasks"] = list(roles)
    shortened = {}
    for group, names in groups.items():
        rest = [name for name in names if name not in without]
        if 0 < len(rest) < len(names):
            shortened[f"{group} but {' and '.join(without)}"] = rest
    return {**groups, **shortened}


def lead(
    ours: Sequence[Record], theirs: Sequence[Record], task_names: Sequence[str]
) -> dict[str, Any]:
    """Returns the mean paired gain over tasks, in points of accuracy.

    `value`, `low` and `high` are the mean and its 95 % interval, `by seed` the mean of each seed
    where there are several, `significantly below` the number of tasks on which ours lose
    (McNemar's test, Holm-corrected).
    """
    gains = []
    p_values = {}
    gains_by_seed = []
    for task in task_names:
        our_frame = metrics.frame(record for record in ours if record.task == task)
        their_frame = metrics.frame(record for record in theirs if record.task == task)
        gains.append(metrics.difference(our_frame, their_frame).columns("gain"))
        p_values[task] = metrics.mcnemar(our_frame, their_frame)
        pairs = metrics.paired(our_frame, their_frame)
        gains_by_seed.append(pairs.groupby("seed").change.mean())
    corrected = metrics.holm(pd.Series(p_values))
    n_below = 0
    for gain, p_value in zip(gains, corrected, strict=True):
        if gain["gain"] < 0 and p_value < metrics.SIGNIFICANCE:
            n_below += 1
    mean = metrics.mean(pd.DataFrame(gains), "gain")
    points: dict[str, Any] = {
        "value": _in_points(mean.value),
        "low": _in_points(mean.low),
        "high": _in_points(mean.high),
    }
    # A seed that some task lacks has no mean over the tasks.
    by_seed = pd.concat(gains_by_seed, axis=1).dropna().mean(axis=1)
    if len(by_seed) > 1:
        points["by seed"] = [_in_points(gain) for gain in by_seed]
    return {**points, "significantly below": n_below}


def in_words(name: str, points: Mapping[str, Any]) -> str:
    """Returns a lead as one line of text."""
    interval = f"{points['low']:+.1f} to {points['high']:+.1f}"
    line = f"{name}: {points['value']:+.1f} ({interval})"
    if "by seed" in points:
        line += f", by seed {', '.join(f'{gain:+.1f}' for gain in points['by seed'])}"
    if "tasks" in points:
        line += f", {points['tasks']} tasks"
    if points["significantly below"]:
        n_below = counted(points["significantly below"], "task")
        line += f", significantly below on {n_below}"
    return line


def _in_points(share: float) -> float:
    return round(100 * share, 1)


def _check_same_items(configs: Sequence[Mapping[str, Any]]) -> None:
    for name in SAME_IN_ALL_RUNS:
        values = sorted({str(config.get(name)) for config in configs})
        # The rows that "rows" has beside the tasks' are the sources', which nobody is asked.
        is_same_asked = name == "rows" and _have_same_tasks(configs)
        if len(values) > 1 and not is_same_asked:
            raise ValueError(
                f"the runs differ in {name} ({', '.join(values)}): their records are no pairs"
            )


def _have_same_tasks(configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all runs say that their tasks' rows are the same; earlier versions say nothing."""
    digests = {config.get("task_rows") for config in configs}
    return len(digests) == 1 and None not in digests


def _records_by_method(runs: Sequence[Path]) -> dict[str, list[Record]]:
    records_by_key = {}
    for folder in runs:
        for record in records.read(RunFolder(folder).records):
            records_by_key[record.key] = record
    records_by_method: dict[str, list[Record]] = {}
    for record in records_by_key.values():
        records_by_method.setdefault(record.method, []).append(record)
    return records_by_method
