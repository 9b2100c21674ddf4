"""Tally: the records and the configuration of a run, counted into a summary."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from icrouting import metrics
from icrouting.records import Record
from icrouting.summary import BASELINE, Cell, Gain, GroupMean, MethodLine, Rival, Summary, TaskLine

HEADLINE = "icr"
SECTIONS = ("source", "in-domain, unseen", "near", "far")

Cells = Mapping[tuple[str, str], Sequence[Record]]


def summarise(records: Sequence[Record], config: Mapping[str, Any]) -> Summary:
    """Returns the figures of a run, finished or in progress."""
    if not records:
        raise ValueError("no records to summarise: the run has not scored an example yet")
    by_cell: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_cell[record.method, record.task].append(record)
    described: dict[str, Mapping[str, Any]] = {task["name"]: task for task in config["tasks"]}
    if unknown := sorted({task for _, task in by_cell} - set(described)):
        raise ValueError(f"config.json does not describe the tasks {unknown}, which have records")
    groups = _groups(described.values())
    scored = [name for name in groups["all"] if any(task == name for _, task in by_cell)]
    methods = list(dict.fromkeys([*config["methods"], *(method for method, _ in by_cell)]))
    by_method = {method: _cells(method, groups["all"], by_cell) for method in methods}
    means = [_mean(cells, group, groups[group]) for cells in by_method.values() for group in groups]
    refused = config.get("refused", ())
    headline = _headline([method for method, cells in by_method.items() if cells])
    return Summary(
        headline=headline,
        methods=tuple(_method_line(cells) for cells in by_method.values() if cells),
        tasks=tuple(_task_line(name, _section(described[name]), by_cell) for name in scored),
        groups=groups,
        cells=tuple(cell for cells in by_method.values() for cell in cells),
        means=tuple(mean for mean in means if mean),
        rivals=_rivals(headline, by_cell) if headline else (),
        unfinished=_unfinished(methods, list(described), by_cell, {(m, task) for m, task, _ in refused}),
        notes=(*config.get("notes", ()), *(f"{m} does not fit {task}: {said}" for m, task, said in refused)),
        origin=_origin(config),
    )


def _section(task: Mapping[str, Any]) -> str:
    if task["role"] == "source":
        return "source"
    return "in-domain, unseen" if task["group"] == "in-domain" else task["group"]


def _groups(tasks: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Task names by section, and those of the unseen and of all tasks."""
    sections = {task["name"]: _section(task) for task in tasks}
    ranked = sorted(dict.fromkeys(sections.values()), key=lambda section: (*SECTIONS, section).index(section))
    groups = {section: tuple(name for name in sections if sections[name] == section) for section in ranked}
    unseen = tuple(name for section in ranked if section != "source" for name in groups[section])
    everything = (*groups.get("source", ()), *unseen)
    return {**groups, **({"unseen": unseen} if unseen else {}), "all": everything}


def _task_line(name: str, section: str, by_cell: Cells) -> TaskLine:
    """A task's line; its levels come from the method with the most records."""
    records = max((found for (_, task), found in by_cell.items() if task == name), key=len)
    n_items = len({record.index for record in records})
    return TaskLine(name, section, n_items, metrics.chance(records), metrics.majority(records))


def _cells(method: str, tasks: Sequence[str], by_cell: Cells) -> tuple[Cell, ...]:
    """A method's cells; Holm's correction is over its tasks."""
    tasks = [task for task in tasks if (method, task) in by_cell]
    pairs = {task: (by_cell[method, task], by_cell.get((BASELINE, task), ())) for task in tasks}
    compared = [task for task in tasks if method != BASELINE and metrics.paired(*pairs[task])]
    p_values = [metrics.mcnemar(*pairs[task]) for task in compared]
    gains = {
        task: Gain(metrics.difference(*pairs[task]), p_value, p_holm)
        for task, p_value, p_holm in zip(compared, p_values, metrics.holm(p_values), strict=True)
    }
    return tuple(_cell(by_cell[method, task], gains.get(task)) for task in tasks)


def _cell(records: Sequence[Record], gain: Gain | None) -> Cell:
    seeds = sorted({record.seed for record in records})
    return Cell(
        method=records[0].method,
        task=records[0].task,
        accuracy=metrics.accuracy(records),
        # a fixed generator per cell: a report remade from the same records says the same
        macro_f1=metrics.macro_f1(records, np.random.default_rng(0)),
        gain=gain,
        is_above_chance=metrics.is_above_chance(records),
        by_seed=tuple(metrics.accuracy([r for r in records if r.seed == seed]).value for seed in seeds),
        confusion=metrics.confusion(records),
        seconds=float(np.median([record.seconds for record in records])),
        n_tokens=float(np.mean([record.n_tokens for record in records])),
    )


def _mean(cells: Sequence[Cell], group: str, tasks: Sequence[str]) -> GroupMean | None:
    cells = [cell for cell in cells if cell.task in tasks]
    if not cells:
        return None
    gains = [cell.gain.change for cell in cells if cell.gain]
    accuracy = metrics.mean([cell.accuracy for cell in cells])
    return GroupMean(cells[0].method, group, accuracy, metrics.mean(gains) if gains else None)


def _method_line(cells: Sequence[Cell]) -> MethodLine:
    gains = [cell.gain for cell in cells if cell.gain]
    lost = metrics.collapse([gain.change for gain in gains], [gain.p_holm for gain in gains]) if gains else None
    return MethodLine(
        name=cells[0].method,
        seconds=float(np.mean([cell.seconds for cell in cells])),
        n_tokens=float(np.mean([cell.n_tokens for cell in cells])),
        n_collapsed=lost[0] if lost else None,
        n_collapsed_significantly=lost[1] if lost else None,
    )


def _headline(methods: Sequence[str]) -> str | None:
    others = [method for method in methods if method != BASELINE]
    return HEADLINE if HEADLINE in others else others[-1] if others else None


def _rivals(headline: str, by_cell: Cells) -> tuple[Rival, ...]:
    leads: dict[str, list[metrics.Estimate]] = defaultdict(list)
    for (method, task), records in by_cell.items():
        ours = by_cell.get((headline, task), ())
        if method not in (headline, BASELINE) and metrics.paired(records, ours):
            leads[method].append(metrics.difference(records, ours))
    return tuple(Rival(method, metrics.mean(found)) for method, found in leads.items())


def _unfinished(
    methods: Sequence[str], tasks: Sequence[str], by_cell: Cells, refused: set[tuple[str, str]]
) -> tuple[str, ...]:
    """What is missing against the configuration, and against the method with the most records on a task."""
    lines = []
    for method in methods:
        missing = [task for task in tasks if (method, task) not in by_cell and (method, task) not in refused]
        if missing:
            lines.append(f"{method}: no records on {', '.join(missing)}")
        for task in [task for task in tasks if (method, task) in by_cell]:
            n, most = (
                len(by_cell[method, task]),
                max(len(by_cell.get((other, task), ())) for other in methods),
            )
            if n < most:
                lines.append(f"{method} on {task}: {n} of {most} predictions")
    return tuple(lines)


def _origin(config: Mapping[str, Any]) -> str:
    seeds = ", ".join(str(seed) for seed in config["seeds"])
    return (
        f"Model {config['model']}, {config['n_test']} test items a task at most, seeds {seeds}, "
        f"{config['created']}, commit {config['commit']}: {config['command']}"
    )
