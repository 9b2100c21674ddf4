"""What a run comes to beside its records: what was refused, and what methods take."""

from collections.abc import Mapping, Sequence
from typing import Any

from icrouting.evaluation import records
from icrouting.evaluation.costs import fit_costs, write_tried
from icrouting.evaluation.evaluate import Evaluation
from icrouting.evaluation.folder import Outcome, RunFolder
from icrouting.evaluation.records import BASELINE
from icrouting.evaluation.timing import time_ratios
from icrouting.icr import InContextRouter
from icrouting.methods import Method
from icrouting.routing.routed import routing_summary
from icrouting.runtime.storage import save_json
from icrouting.tasks.task import Task


def complete(
    folder: RunFolder,
    evaluation: Evaluation,
    tasks: Sequence[Task],
    seed: int,
    icr: InContextRouter | None,
    routers: Mapping[str, InContextRouter] | None = None,
) -> None:
    """Adds to a run's folder what its report shows beside the records.

    That is refusals, times, costs, what the router did on each task, and its training curve; so
    the report can be remade without the model. `icr` is the router without a name of its own,
    `routers` are those that have one.
    """
    records.gather(folder.records)
    folder.add(outcome_of(evaluation, tasks, seed, folder))
    write_tried(folder.fits, folder.read_config()["methods"], folder.tried)
    if icr is not None:
        save_json(folder.routing, _routing_by(icr, evaluation, tasks))
        if icr.folder is not None:
            folder.take_training(icr.folder / "fit")
    drawn: set[str] = set()
    for name, router in (routers or {}).items():
        # Attached otherwise, a router decides the same.
        if router.digest() not in drawn and not folder.routing_of(name).exists():
            save_json(folder.routing_of(name), _routing_by(router, evaluation, tasks))
            if router.folder is not None:
                folder.take_training(router.folder / "fit", name)
        drawn.add(router.digest())


def _routing_by(
    icr: InContextRouter, evaluation: Evaluation, tasks: Sequence[Task]
) -> dict[str, Any]:
    """What a router does on each task."""
    # Prompts of unseen tasks are no surprise here.
    with icr.attached_by(icr.reader(evaluation.decoder)) as routed:
        return routing_summary(routed, icr.pids.layers, tasks)


def outcome_of(
    evaluation: Evaluation, tasks: Sequence[Task], seed: int, folder: RunFolder
) -> Outcome:
    """Returns what an evaluation came to, with what earlier ones left in the folder.

    Methods that were not timed yet are timed, fitted for `seed`.
    """
    config = folder.read_config()
    refused = _refused(evaluation, tasks, config.get("refused", []))
    skipped = _skipped(evaluation, tasks, config.get("skipped", []))
    # Before the timing, which takes a while: a kill there must not lose why a cell is empty.
    folder.write_config({**config, "refused": refused, "skipped": skipped})
    return Outcome(
        refused=refused,
        skipped=skipped,
        ratios=_ratios(evaluation, tasks, seed, config.get("timing", {}).get("ratios", [])),
        baseline=BASELINE,
        costs=_costs(evaluation, folder, config),
    )


def _refused(
    evaluation: Evaluation, tasks: Sequence[Task], earlier: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Earlier refusals of what was not asked this time, then this time's."""
    refused = _of_others(evaluation, tasks, earlier)
    for cell, reason in evaluation.refused.items():
        refused.append([*cell, reason])
    return refused


def _skipped(
    evaluation: Evaluation, tasks: Sequence[Task], earlier: Sequence[Sequence[Any]]
) -> list[list[Any]]:
    """The numbers of items skipped earlier of what was not asked this time, then this time's."""
    skipped = _of_others(evaluation, tasks, earlier)
    for cell, items in evaluation.skipped.items():
        if cell not in evaluation.refused:
            skipped.append([*cell, len(items)])
    return skipped


def _of_others(
    evaluation: Evaluation, tasks: Sequence[Task], earlier: Sequence[Sequence[Any]]
) -> list[list[Any]]:
    """The earlier entries of methods and tasks that were not asked this time."""
    cells = {(method.name, task.name) for method in evaluation.methods for task in tasks}
    return [list(entry) for entry in earlier if tuple(entry[:2]) not in cells]


def _costs(
    evaluation: Evaluation, folder: RunFolder, config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What fits took: those that were there before the run, then the run's own."""
    # An earlier run of the folder may have had a router that this one lacks.
    rows_by_method = {row["method"]: row for row in config.get("fits", [])}
    for method in evaluation.methods:
        row = method.fitted_before(evaluation.sources)
        if row:
            rows_by_method[row["method"]] = row
    before = [row for row in rows_by_method.values() if row["seconds"] is None]
    return [*before, *fit_costs(folder.fits, config["methods"])]


def _ratios(
    evaluation: Evaluation, tasks: Sequence[Task], seed: int, earlier: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each way of each method that has been timed, by this run or by earlier ones."""
    rows_by_way = {row["method"]: dict(row) for row in earlier}
    methods = _able(evaluation, tasks)
    # In turns means on the same prompts, so only a task that no method refuses will do.
    shared_tasks = _answered_by_all(evaluation, methods, tasks)
    expected = {method.name for method in methods} - {BASELINE}
    # A run that is taken up for more seeds or items is not timed again.
    if shared_tasks and not rows_by_way.keys() >= expected:
        evaluation.fit(seed, methods)
        # Where prompts are short, what a method adds to their time shows most.
        shortest = min(shared_tasks, key=_length)
        new_rows = time_ratios(evaluation.decoder, methods, shortest)
        rows_by_way.update({str(row["method"]): row for row in new_rows})
    return list(rows_by_way.values())


def _able(evaluation: Evaluation, tasks: Sequence[Task]) -> list[Method]:
    """The methods that fit some task."""
    able = []
    for method in evaluation.methods:
        if any((method.name, task.name) not in evaluation.refused for task in tasks):
            able.append(method)
    return able


def _answered_by_all(
    evaluation: Evaluation, methods: Sequence[Method], tasks: Sequence[Task]
) -> list[Task]:
    """The tasks that no method refuses."""
    answered = []
    for task in tasks:
        if not any((method.name, task.name) in evaluation.refused for method in methods):
            answered.append(task)
    return answered


def _length(task: Task) -> int:
    """How long a task's prompts are, by its first test items."""
    return sum(len(task.prompt(example)) for example in task.test[:20])
