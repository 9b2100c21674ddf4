"""How well the coefficients of few-shot traces are predicted from the prompt alone (R2).

See `benchmarks.reach`. A coefficient is the projection of a few-shot prompt's last-token query
on a direction of its layer; the directions are the fit's, of the traces of those tasks alone that
the ridge regression learns from.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.reach_parts import TRACES_FILE, directions
from icrouting.analysing.prediction import predicted, r2
from icrouting.routing.pids import late_third
from icrouting.runtime.storage import load_tensors

RANK = 8
READS = ("encoder", "hidden")


def coefficients(trace: dict, pids) -> np.ndarray:
    """Returns the projections of a task's few-shot queries, [n_rows, n_layers, rank]."""
    queries = trace["query"][list(pids.layers)]
    return torch.einsum("lnw,lwr->nlr", queries, pids.query_pids).numpy()


def row_of(traces: dict[str, dict], task: str, reads: str, layers: tuple[int, ...]) -> list[float]:
    """Returns a task's R2: held out about its own mean, the others', its mean known, and within."""
    others = [trace for name, trace in traces.items() if name != task]
    trace = traces[task]
    pids = directions(others, layers, RANK)
    wanted = np.concatenate([coefficients(other, pids) for other in others])
    known = np.concatenate([other[reads].numpy() for other in others])
    true = coefficients(trace, pids)
    guessed = predicted(known, wanted, trace[reads].numpy())
    # About its own mean, rows are told apart; about the others', the task too.
    figures = [r2(true, guessed, true.mean(0)), r2(true, guessed, wanted.mean(0))]
    # As if the task's own mean were known, which one routing for all its prompts could learn.
    figures.append(r2(true, guessed - guessed.mean(0) + true.mean(0), true.mean(0)))
    n_known = len(true) * 3 // 4
    within = predicted(trace[reads][:n_known].numpy(), true[:n_known], trace[reads][n_known:])
    figures.append(r2(true[n_known:], within, true[:n_known].mean(0)))
    return figures


def predict(store: Path, tasks: Sequence[str]) -> None:
    """Prints R2 by task and by what is read, and the means."""
    traces = {}
    for name in tasks:
        file = store / Path(name).stem / TRACES_FILE
        if file.exists():
            traces[file.parent.name] = load_tensors(file)[0]
    if len(traces) < 2:
        raise ValueError(f"{store} holds traces of {len(traces)} tasks: expected two or more")
    layers = late_third(len(next(iter(traces.values()))["query"]))
    names = ("R2 about its mean", "R2 about the others' mean", "R2, its mean known", "R2 within")
    print("| read | held-out task | " + " | ".join(names) + " |")
    print("|---|---|---|---|---|---|")
    for reads in READS:
        rows = []
        for task in traces:
            rows.append(row_of(traces, task, reads, layers))
            print(f"| {reads} | {task} | " + " | ".join(f"{v:.3f}" for v in rows[-1]) + " |")
        means = np.mean(rows, axis=0)
        print(f"| {reads} | mean | " + " | ".join(f"{v:.3f}" for v in means) + " |", flush=True)
