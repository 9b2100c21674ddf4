"""What the part directions looks like, with a sentence of figures each."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from icrouting.analysing import pictures
from icrouting.analysing.directions import ROUTER, SIDES
from icrouting.analysing.pictures import Picture, or_dash

# Frames, whose columns no type checker knows.
Tables = Mapping[str, Any]
SIDE_NAMES = {"query": "queries", "key": "keys"}


def directions(tables: Tables) -> list[Picture]:
    """Returns the pictures of what tasks share, and of how stable it is."""
    return [
        _correlation(tables["correlation"]),
        _overlap(tables["overlap"]),
        _spectrum(tables["spectrum"]),
        _stability(tables["stability"]),
    ]


def clustered(values: np.ndarray) -> list[int]:
    """Returns the order in which rows of a correlation matrix lie beside what they are like.

    Average linkage on 1 - rho; the order they have where some correlation is not known.
    """
    if len(values) < 3 or np.isnan(values).any():
        return list(range(len(values)))
    distances = 1 - (values + values.T) / 2
    np.fill_diagonal(distances, 0)
    condensed = squareform(distances.clip(min=0), checks=False)
    return leaves_list(linkage(condensed, "average", optimal_ordering=True)).tolist()


def _correlation(table: Any) -> Picture:
    square = table.pivot(index="task", columns="other", values="rho")
    names = list(table.task.unique())
    values = square.loc[names, names].to_numpy()
    order = clustered(values)
    values = values[order][:, order]
    names = [names[place] for place in order]
    texts = [[or_dash(value) for value in row] for row in values]
    apart = [(values[i, j], names[i], names[j]) for i in range(len(names)) for j in range(i)]
    apart = [pair for pair in apart if not np.isnan(pair[0])]
    says = "There is no pair of tasks whose use of directions could be compared."
    if apart:
        least, most = min(apart), max(apart)
        says = f"Most alike in the directions they use are {most[1]} and {most[2]} "
        says += f"({most[0]:.2f}), least {least[1]} and {least[2]} ({least[0]:.2f})."
    return Picture(
        "Do tasks use the same directions?",
        pictures.matrix(
            values,
            names,
            names,
            "Spearman's correlation of directions' importance",
            texts=texts,
            low=-1.0,
            high=1.0,
            signed=True,
        ),
        says,
        "1: both tasks rank all directions of all layers alike. Tasks stand beside those that they "
        "are like (average linkage on 1 - correlation).",
        "correlation",
    )


def _overlap(table: Any) -> Picture:
    mean = table.groupby(["task", "other"], sort=False).overlap.mean().unstack(sort=False)
    tasks = list(table.task.unique())
    mean = mean.loc[tasks, [*tasks, ROUTER]]
    values = mean.to_numpy()
    same = np.diag(values).mean()
    chance = table.chance.mean()
    others = values[:, :-1][~np.eye(len(tasks), dtype=bool)]
    says = f"Two draws of one task share {100 * same:.0f} % of their directions"
    if len(others):
        says += f", two tasks {100 * others.mean():.0f} %"
    says += f"; each task shares {100 * values[:, -1].mean():.0f} % with the router's own and "
    says += f"random ones {100 * chance:.0f} %."
    return Picture(
        "Which subspaces few-shot prompts of two tasks share",
        pictures.matrix(
            100 * values,
            tasks,
            [*tasks, ROUTER],
            "overlap of subspaces, %, mean over layers, queries and keys",
            texts=[[f"{100 * value:.0f}" for value in row] for row in values],
            low=0.0,
        ),
        says,
        "On the diagonal stands the overlap of two draws of the same task: as much as this many "
        "prompts could show of two tasks that are one.",
        "overlap",
    )


def _spectrum(table: Any) -> Picture:
    series = {}
    bands = {}
    for side in SIDES:
        by_rank = table[table.side == side].groupby("rank").explained
        name = SIDE_NAMES[side]
        series[name] = (list(by_rank.groups), (100 * by_rank.mean()).tolist())
        bands[name] = ((100 * by_rank.min()).tolist(), (100 * by_rank.max()).tolist())
    by_rank = table.groupby("rank")
    explained = by_rank.explained.mean()
    gap = by_rank.gap.mean()
    largest = gap.idxmax()
    rank = int(table[table.is_routers]["rank"].iloc[0])
    says = f"At the router's rank, {rank}, {100 * explained[rank]:.0f} % of the variance of "
    says += f"few-shot prompts is explained, and the next eigenvalue is {100 * gap[rank]:.0f} % "
    says += f"smaller; the widest such gap is after rank {largest} ({100 * gap[largest]:.0f} %)."
    return Picture(
        "Variance that a rank explains",
        pictures.lines(
            series, "rank", "variance explained, %", bands=bands, y_from=0.0, y_to=100.0
        ),
        says,
        "Pooled over tasks; bands go from the lowest to the highest layer. A spiked covariance "
        "would bend sharply at the number of its spikes.",
        "spectrum",
    )


def _stability(table: Any) -> Picture:
    series = {}
    bands = {}
    for side in SIDES:
        lines = table[table.side == side]
        name = SIDE_NAMES[side]
        series[name] = (lines.n.tolist(), (100 * lines.overlap).tolist())
        bands[name] = ((100 * lines.low).tolist(), (100 * lines.high).tolist())
    mean = table.groupby("n").overlap.mean()
    return Picture(
        "Do more prompts settle the directions?",
        pictures.lines(
            series,
            "few-shot prompts of a draw, all tasks pooled",
            "overlap of two draws, %",
            bands=bands,
            x_log=True,
            y_from=0.0,
            y_to=100.0,
        ),
        f"Two draws of {mean.index[0]} prompts share {100 * mean.iloc[0]:.0f} % of their "
        f"directions, two of {mean.index[-1]} prompts {100 * mean.iloc[-1]:.0f} %.",
        "100 %: other prompts of the same tasks give the same directions. Bands go from the lowest "
        "to the highest layer.",
        "stability",
    )
