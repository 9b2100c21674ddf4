"""Directions: which of them tasks share, and how stable those of few-shot prompts are.

    overlap of two subspaces of rank r    ||U^T V||_F^2 / r      the mean squared cosine of their
                                                                 principal angles
    of two random ones in width d         r / d

Directions are computed anew here, from few-shot prompts of each task, in two draws of half of them
each: what two draws of one task have in common is as much as two tasks could, at that number of
prompts. The pooled prompts say what the theory of the paper needs: how much variance a rank
explains, how far its last eigenvalue is from the next one, and whether more prompts settle it
(Davis-Kahan: the angle is at most the covariance's error over that gap).
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from icrouting.analysing.importance import direction_importance, routing_of
from icrouting.analysing.study import Study, is_constant
from icrouting.fitting.capture import capture_last_tokens
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import extraction_prompts

SIDES = ("query", "key")
ROUTER = "the router"
# Ranks of the spectrum beyond the router's own.
N_BEYOND = 8

# By side, the vectors of prompts in their order, [n_prompts, n_layers, width].
Vectors = dict[str, Float[Tensor, "n_prompts n_layers width"]]


def directions(study: Study) -> dict[str, pd.DataFrame]:
    """Returns four tables.

    "correlation": Spearman's, of the importance of every direction of every layer between two
    tasks; NaN where a task uses all alike. "overlap": of the subspaces of two tasks, each by side,
    mean over layers, with the mean principal angle in degrees; of a task and itself it is that of
    its two draws, and `chance` that of random subspaces. "spectrum": by side, layer and rank, the
    share of variance explained up to it, and the gap to the next eigenvalue as a share of its own;
    `is_routers` marks the router's rank.
    "stability": the overlap of the subspaces of two draws of `n` prompts each, pooled over tasks.

    Raises:
        ValueError: there are too few prompts for two draws of the router's rank.
    """
    check_draws(study)
    rank = study.icr.pids.rank
    draws = _draws(study)
    return {
        "correlation": correlation(study),
        "overlap": pd.DataFrame(_overlaps(study, draws, rank)),
        "spectrum": pd.DataFrame(_spectra(study, draws, rank)),
        "stability": pd.DataFrame(_stability(draws, rank)),
    }


def check_draws(study: Study) -> None:
    """Checks that there are few-shot prompts enough for two draws of the router's rank.

    Raises:
        ValueError: there are too few.
    """
    rank = study.icr.pids.rank
    n_fewest = min(len(task.train) for task in study.tasks.values())
    n_prompts = min(study.config.n_prompts, n_fewest)
    if n_prompts // 2 <= rank:
        raise ValueError(
            f"two draws of {rank} directions need more than {2 * rank + 1} few-shot prompts of "
            f"each task, got {n_prompts}: raise --n-prompts, name tasks of more training rows, or "
            "leave the part directions out"
        )


def correlation(study: Study) -> pd.DataFrame:
    """Returns Spearman's correlation of directions' importance, a line for each pair of tasks."""
    values = {}
    for task in study.task_names:
        values[task] = direction_importance(routing_of(study, task)).flatten()
    lines = []
    for task in study.task_names:
        for other in study.task_names:
            rho = float("nan")
            if not is_constant(values[task]) and not is_constant(values[other]):
                result: Any = spearmanr(values[task], values[other])
                rho = float(result.statistic)
            lines.append({"task": task, "other": other, "rho": rho})
    return pd.DataFrame(lines)


def _draws(study: Study) -> list[dict[str, Vectors]]:
    """Returns two draws of each task's few-shot prompts, by task: every second prompt is in one."""
    halves: list[dict[str, Vectors]] = [{}, {}]
    demos_per_class = study.icr.description.fit.demos_per_class
    sizes = [min(study.config.n_prompts, len(task.train)) for task in study.tasks.values()]
    for task in track(list(study.tasks.values()), "few-shot prompts", sizes, "prompts"):
        rng = np.random.default_rng([study.config.seed, zlib.crc32(task.name.encode())])
        rows: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        for prompt in extraction_prompts(task, study.config.n_prompts, demos_per_class, rng):
            # One at a time, since batches come in the order of their lengths.
            for query, key in capture_last_tokens(study.decoder, [prompt], study.layers):
                rows["query"].append(query[:, 0])
                rows["key"].append(key[:, 0])
        for place, half in enumerate(halves):
            half[task.name] = {side: torch.stack(rows[side][place::2]) for side in SIDES}
    return halves


def subspaces(
    vectors: Float[Tensor, "n_prompts n_layers width"], rank: int
) -> Float[Tensor, "n_layers width rank"]:
    """Returns each layer's principal directions of some prompts, as the fit's PCA does."""
    return _svd(vectors)[1][..., :rank]


def _svd(vectors: Float[Tensor, "n_prompts n_layers width"]) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues [n_layers, n] and directions [n_layers, width, n] of the covariance."""
    centred = (vectors - vectors.mean(0)).double().transpose(0, 1)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    return singular.square() / (len(vectors) - 1), directions.mT


def overlap(
    one: Float[Tensor, "n_layers width rank"], other: Float[Tensor, "n_layers width rank"]
) -> tuple[Float[Tensor, "n_layers"], Float[Tensor, "n_layers"]]:
    """Returns the overlap of two subspaces in each layer, and their mean principal angle."""
    cosines = torch.linalg.svdvals(one.double().mT @ other.double()).clamp(0, 1)
    return cosines.square().mean(-1), cosines.arccos().mean(-1).rad2deg()


def _overlaps(study: Study, draws: list[dict[str, Vectors]], rank: int) -> Iterator[dict]:
    pids = study.icr.pids
    for side in SIDES:
        bases = []
        for half in draws:
            bases.append({task: subspaces(half[task][side], rank) for task in study.tasks})
        width = bases[0][study.task_names[0]].shape[1]
        routers = pids.query_pids if side == "query" else pids.key_pids
        for task in study.tasks:
            for other in study.tasks:
                # Of either draw with the other one, so that a task and itself compare as two do.
                pairs = [(bases[0][task], bases[1][other]), (bases[1][task], bases[0][other])]
                yield _overlap_line(side, task, other, pairs, rank / width)
            pairs = [(half[task], routers) for half in bases]
            yield _overlap_line(side, task, ROUTER, pairs, rank / width)


def _overlap_line(side: str, task: str, other: str, pairs: list, chance: float) -> dict:
    figures = [overlap(one, two) for one, two in pairs]
    return {
        "side": side,
        "task": task,
        "other": other,
        "overlap": float(torch.stack([each for each, _ in figures]).mean()),
        "angle": float(torch.stack([angle for _, angle in figures]).mean()),
        "chance": chance,
    }


def _spectra(study: Study, draws: list[dict[str, Vectors]], rank: int) -> Iterator[dict]:
    for side in SIDES:
        vectors = torch.cat([half[task][side] for task in study.tasks for half in draws])
        values, _ = _svd(vectors)
        n_shown = min(rank + N_BEYOND, values.shape[1] - 1)
        for layer, spectrum in zip(study.layers, values, strict=True):
            shares = (spectrum / spectrum.sum()).cumsum(0)
            for place in range(n_shown):
                gap = float(1 - spectrum[place + 1] / spectrum[place])
                line = {"side": side, "layer": layer, "rank": place + 1}
                line["is_routers"] = place + 1 == rank
                yield {**line, "explained": float(shares[place]), "gap": gap}


def _stability(draws: list[dict[str, Vectors]], rank: int) -> Iterator[dict]:
    for side in SIDES:
        pools = [interleaved({task: half[task][side] for task in half}) for half in draws]
        n_most = min(map(len, pools))
        n = rank + 1
        sizes = []
        while n < n_most:
            sizes.append(n)
            n *= 2
        for size in [*sizes, n_most]:
            bases = [subspaces(pool[:size], rank) for pool in pools]
            shared, angles = overlap(*bases)
            line = {"side": side, "n": size, "overlap": float(shared.mean())}
            yield {
                **line,
                "low": float(shared.min()),
                "high": float(shared.max()),
                "angle": float(angles.mean()),
            }


def interleaved(by_task: Mapping[str, Tensor]) -> Tensor:
    """Returns the rows of tasks in turn, as many of each as the smallest has."""
    n = min(map(len, by_task.values()))
    return torch.stack([rows[:n] for rows in by_task.values()], 1).flatten(0, 1)
