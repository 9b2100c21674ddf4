"""The gate of a fit, from the states that its training queries left in the trunk."""

import logging
from collections.abc import Sequence

import torch

from icrouting.fitting.queries import Query
from icrouting.fitting.warm import Start
from icrouting.routing.gate import FEWEST_ROWS, PromptGate
from icrouting.runtime.processes import is_first
from icrouting.tasks.task import Task

log = logging.getLogger(__name__)


def fit_gate(
    queries: Sequence[Query],
    tasks: Sequence[Task],
    first_layer: int,
    start: Start | None = None,
) -> PromptGate | None:
    """Returns the gate of the prompts that a router was trained on, task by task.

    Tasks of a router to go on from stand first, as in the description; they keep what its gate
    knows of them, if it has one.

    None, with a line in the log that says why, where there can be none: a source has fewer than 26
    rows, or the router routes from layer 0 up, where a state has read the last token alone.

    Args:
        queries: all training queries.
        tasks: the source tasks.
        first_layer: the first routed layer.
        start: the router that the fit went on from; None where it began anew.
    """
    names = [task.name for task in tasks]
    gate_by_task: dict[str, PromptGate] = {}
    if start is not None:
        names = list(dict.fromkeys([*start.description.tasks, *names]))
        gate_by_task = start.gate_by_task()
    states_by_task: dict[str, list[torch.Tensor]] = {
        name: [] for name in names if name not in gate_by_task
    }
    # An answer that is learned in several places has a query for each, of one prompt.
    query_by_row = {query.row: query for query in reversed(queries)}
    for _, query in sorted(query_by_row.items()):
        if query.task in states_by_task:
            last = len(query.state.hidden) - 1 - query.n_answer
            states_by_task[query.task].append(query.state.hidden[last])
    reason = _reason_against({name: len(rows) for name, rows in states_by_task.items()})
    if reason and start is not None and start.gate is None:
        reason += "; the router to start from has no gate that knows its tasks"
    if first_layer == 0:
        reason = "what enters layer 0 tells no prompts apart: route from layer 1 up for one"
    if reason:
        if is_first():
            log.warning("the router has no gate, so it routes every prompt: %s", reason)
        return None
    for name, states in states_by_task.items():
        gate_by_task[name] = PromptGate.of([torch.stack(states)])
    return PromptGate.joined([gate_by_task[name] for name in names])


def _reason_against(n_rows: dict[str, int]) -> str:
    """Says why there are too few rows for a gate; empty where there are enough."""
    too_few = [f"{name} has {n}" for name, n in n_rows.items() if n < FEWEST_ROWS]
    if not too_few:
        return ""
    return f"it takes {FEWEST_ROWS} training queries of each task, {', '.join(too_few)}"
