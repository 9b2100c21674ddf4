"""Folds: how many steps suit rows that are too few to hold a slice of them back for good."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from icrouting.config import FitConfig
from icrouting.fitting.queries import Query, n_rows_of
from icrouting.fitting.validation import Look

N_FOLDS = 3

# Trains on the first queries, judges on the second, keeps its checkpoint in a folder, if there is
# one, and returns its looks.
Training = Callable[[Sequence[Query], Sequence[Query], Path | None], Sequence[Look]]


def chosen_by_folds(
    queries: Sequence[Query],
    training: Training,
    seed: int,
    folder: Path | None,
    rehearsed: Collection[str] = (),
) -> Look | None:
    """Returns the step at which routers do best on queries that they did not learn from.

    A router is trained on all folds but one, and judged on that one, for each fold in turn. The
    loss at a step is the mean over all queries, so that every one is learned from and judged on,
    and the router that is used learns from them all. A training that stopped before a step counts
    there with its last loss.

    Args:
        queries: all training queries.
        training: one training.
        seed: draws the folds.
        folder: keeps the trainings, a subfolder each; None keeps nothing.
        rehearsed: names of the tasks that all trainings learn from and none is judged on, since
            the router that they begin as has learned from their rows; where hardly a row is of
            another task, all are judged on.

    Returns:
        The first look of the least loss; None where the examples are fewer than the folds.
    """
    judging = [query for query in queries if query.task not in rehearsed]
    if n_rows_of(judging) < N_FOLDS:
        judging = list(queries)
    if n_rows_of(judging) < N_FOLDS:
        return None
    folds = stratified(judging, seed)
    fold_by_row = {query.row: fold for query, fold in zip(judging, folds, strict=True)}
    looks_by_fold = []
    sizes = []
    for number in range(N_FOLDS):
        held = [query for query in queries if fold_by_row.get(query.row) == number]
        rest = [query for query in queries if fold_by_row.get(query.row) != number]
        fold_folder = None if folder is None else folder / f"fold-{number}"
        if fold_folder is not None:
            fold_folder.mkdir(exist_ok=True)
        looks_by_fold.append(training(rest, held, fold_folder))
        sizes.append(n_rows_of(held))
    best = min(pooled(looks_by_fold, sizes), key=lambda look: look.loss)
    return replace(best, n_rows=sum(sizes))


def n_read(n_queries: int, n_judged: int, config: FitConfig) -> int:
    """Returns how many queries a fit's trainings read, repeats too, unless one stops before.

    Args:
        n_queries: how many the training learns from.
        n_judged: how many validation rows choose the router; without any, folds are trained on.
        config: settings.
    """
    sizes = [n_queries]
    if config.watches(n_queries) and not n_judged and n_queries >= N_FOLDS:
        # Each fold's training leaves its own queries out.
        n_held = [len(range(number, n_queries, N_FOLDS)) for number in range(N_FOLDS)]
        sizes += [n_queries - n for n in n_held]
    return sum(round(size * config.n_passes(size)) for size in sizes)


def stratified(queries: Sequence[Query], seed: int) -> list[int]:
    """Returns the fold of each query; each task's examples of a label are dealt to them in turn."""
    # An example may have several queries, of which none may be learned from where others judge.
    group_by_row = {query.row: (query.task, query.answer) for query in queries}
    rows = list(group_by_row)
    order = np.random.default_rng(seed).permutation(len(rows))
    # Sorting keeps the drawn order within a task's label.
    dealt = sorted((rows[place] for place in order), key=lambda row: group_by_row[row])
    fold_by_row = {row: turn % N_FOLDS for turn, row in enumerate(dealt)}
    return [fold_by_row[query.row] for query in queries]


def pooled(looks_by_fold: Sequence[Sequence[Look]], sizes: Sequence[int]) -> list[Look]:
    """Returns loss and accuracy over the queries of all folds, at every step that was looked at."""
    steps = sorted({look.step for looks in looks_by_fold for look in looks})
    pooled_looks = []
    for step in steps:
        reached = []
        for looks in looks_by_fold:
            reached.append([look for look in looks if look.step <= step][-1])
        loss = np.average([look.loss for look in reached], weights=sizes)
        accuracy = np.average([look.accuracy for look in reached], weights=sizes)
        pooled_looks.append(Look(step, float(loss), float(accuracy)))
    return pooled_looks
