"""What does a router's gate do: how many foreign prompts, and how many of its own, does it leave?

    python -m benchmarks.gating --model pinned:smollm2-135m --data pinned:staicc \\
        --sources agnews sst2 trec --foreign mr subj emotion tweet_hate --rows 50 120 400 \\
        --out benchmarks/results/gating.json

The gate of a fit is fitted from the last states of training prompts alone, so no router is trained
here. Of each source, some rows make the gate, and others, which it has not seen, are its own
held-back rows. "leave-one-out" is the gate that `InContextRouter.fit` makes; "split" is that of the
method `icr-gated`, which knows 200 of 260 rows and sets its limit by the other 60.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import load_model
from icrouting.decoder.states import last_outputs
from icrouting.evaluation.runs import commit
from icrouting.routing.gate import N_KNOWN, SHUT_OUT, Gaussian, PromptGate
from icrouting.routing.pids import late_third
from icrouting.runtime.storage import save_json
from icrouting.tasks.load import load_task

# Held-back and foreign rows that are asked, of each task.
N_ASKED = 200


def states_of(decoder, task, first_layer: int, n_rows: int, seed: int):
    """Last states where they enter the first routed layer, of rows in a drawn order."""
    rows = [*task.train, *task.test]
    order = np.random.default_rng(seed).permutation(len(rows))[:n_rows]
    prompts = [task.prompt(rows[place]) for place in order]
    (states,), _ = last_outputs(decoder, [decoder.layers[first_layer - 1]], prompts)
    return states


def leave_one_out(states_by_source):
    gate = PromptGate.of(states_by_source)
    return lambda states: gate([state[None] for state in states])


def split(states_by_source):
    """One limit for all sources, by rows that the Gaussians have not seen."""
    gaussians, others = [], []
    for states in states_by_source:
        n_known = min(len(states), 260) * N_KNOWN // 260
        gaussians.append(Gaussian.of(states[:n_known]))
        others.append(states[n_known:260])

    def distances(states):
        return torch.stack([gaussian.distances(states) for gaussian in gaussians]).amin(0)

    limit = distances(torch.cat(others)).quantile(1 - SHUT_OUT)
    return lambda states: distances(states) <= limit


GATES = {"leave-one-out": leave_one_out, "split": split}


def shares(own, foreign, n_rows: int) -> dict:
    """Shares of prompts left alone, by gate: of each source's held-back rows, and of each other."""
    known = [states[:n_rows] for states in own.values()]
    figures = {}
    for name, make in GATES.items():
        gate = make(known)
        held_back = {task: 1 - gate(states[n_rows:]).float().mean() for task, states in own.items()}
        others = {task: 1 - gate(states).float().mean() for task, states in foreign.items()}
        figures[name] = {
            "own": {task: float(share) for task, share in held_back.items()},
            "foreign": {task: float(share) for task, share in others.items()},
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pinned:smollm2-135m")
    parser.add_argument("--data", default="pinned:staicc")
    parser.add_argument("--sources", nargs="+", default=["agnews", "sst2", "trec"])
    parser.add_argument("--foreign", nargs="+", default=["mr", "subj", "emotion", "tweet_hate"])
    parser.add_argument("--rows", type=int, nargs="+", default=[50, 120, 400])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    decoder = Decoder.of(model, tokenizer)
    first_layer = late_third(decoder.dims.n_layers)[0]
    figures = {"commit": commit(), "model": arguments.model, "first layer": first_layer, "runs": []}
    for seed in arguments.seeds:
        own, foreign = {}, {}
        for name in arguments.sources:
            task = load_task(name, arguments.data)
            n_rows = max(arguments.rows) + N_ASKED
            own[name] = states_of(decoder, task, first_layer, n_rows, seed)
        for name in arguments.foreign:
            task = load_task(name, arguments.data)
            foreign[name] = states_of(decoder, task, first_layer, N_ASKED, seed)
        for n_rows in arguments.rows:
            run = {"seed": seed, "rows": n_rows, **shares(own, foreign, n_rows)}
            figures["runs"].append(run)
            print(run, flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_json(arguments.out, figures)


if __name__ == "__main__":
    main()
