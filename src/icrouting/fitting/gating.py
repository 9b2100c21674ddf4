"""The gate of a fit, from the states that its training queries left in the trunk."""

import logging
from collections.abc import Sequence

import torch

from icrouting.fitting.queries import Query
from icrouting.routing.gate import FEWEST_ROWS, PromptGate
from icrouting.runtime.processes import is_first
from icrouting.tasks.task import Task

log = logging.getLogger(__name__)


def fit_gate(
    queries: Sequence[Query], tasks: Sequence[Task], first_layer: int
) -> PromptGate | None:
    """Returns the gate of the prompts that a router was trained on.

    None, with a line in the log that says why, where there can be none: a source has fewer than 26
    rows, or the router routes from layer 0 up, where a state has read the last token alone.

    Args:
        queries: all training queries.
        tasks: the source tasks.
        first_layer: the first routed layer.
    """
    states_by_task: dict[str, list[torch.Tensor]] = {task.name: [] for task in tasks}
    # An answer that is learned in several places has a query for each, of one prompt.
    query_by_row = {query.row: query for query in reversed(queries)}
    for _, query in sorted(query_by_row.items()):
        last = len(query.state.hidden) - 1 - query.n_answer
        states_by_task[query.task].append(query.state.hidden[last])
    reason = _reason_against({name: len(rows) for name, rows in states_by_task.items()})
    if first_layer == 0:
        reason = "what enters layer 0 tells no prompts apart: route from layer 1 up for one"
    if reason:
        if is_first():
            log.warning("the router has no gate, so it routes every prompt: %s", reason)
        return None
    return PromptGate.of([torch.stack(states) for states in states_by_task.values()])


def _reason_against(n_rows: dict[str, int]) -> str:
    """Says why there are too few rows for a gate; empty where there are enough."""
    too_few = [f"{name} has {n}" for name, n in n_rows.items() if n < FEWEST_ROWS]
    if not too_few:
        return ""
    return f"it takes {FEWEST_ROWS} training queries of each task, {', '.join(too_few)}"
