"""How does a setting do on a task that the router never saw? Each source task is left out in turn.

    python benchmarks/leave_one_out.py --out benchmarks/results/leave-one-out

On SmolLM2-135M with the demo's three source tasks: PIDs and router are fitted on two of them and scored on
100 held-back train rows of all three. The mean over the left-out tasks is the honest proxy for unseen tasks;
no test row is touched. Killed and started again, it goes on.
"""

import argparse
import dataclasses
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from choose_defaults import Items

from icrouting import fitting, records
from icrouting.capture import capture_last_tokens
from icrouting.config import FitConfig
from icrouting.decoder.batches import pad_id_of
from icrouting.decoder.families import dims_of
from icrouting.decoder.loading import load_model
from icrouting.routing.features import features_of
from icrouting.routing.pids import QKMoments, fit_pids, late_third
from icrouting.routing.router import Router
from icrouting.runs import commit
from icrouting.runtime.storage import save_json
from icrouting.tasks.load import load_task
from icrouting.tasks.prompts import extraction_prompts
from icrouting.train import Trainer

TASKS, N_VALIDATION, SEED = ("agnews", "sst2", "trec"), 100, 42
# Every candidate stands here whole, so that a change of the defaults leaves what their names say.
BASE = FitConfig(
    basis="whitened",
    lr=1e-3,
    ce_scope="options",
    batch_size=8,
    n_prompts=40,
    n_queries=400,
    encoder="pinned:minilm",
    seed=SEED,
)
CANDIDATES = {
    "whitened, lr 1e-3, 1 epoch": dataclasses.replace(BASE, epochs=1),
    "pca, lr 1e-4, 1 epoch": dataclasses.replace(BASE, basis="pca", lr=1e-4, epochs=1),
    "pca, lr 1e-4, 2 epochs": dataclasses.replace(BASE, basis="pca", lr=1e-4, epochs=2),
    "pca, lr 1e-4, 2 epochs, over the vocabulary": dataclasses.replace(
        BASE, basis="pca", lr=1e-4, epochs=2, ce_scope="vocabulary"
    ),
    "whitened, lr 1e-3, 2 epochs": dataclasses.replace(BASE, epochs=2),
    "random, lr 1e-4, 2 epochs": dataclasses.replace(BASE, basis="random", lr=1e-4, epochs=2),
}
STRENGTHS = (1.0, 0.6, 0.3)


def moments_per_task(model, tokenizer, tasks, layers):
    dims, found = dims_of(model), {}
    for task in tasks:
        found[task.name] = QKMoments(len(layers), dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim)
        rng = np.random.default_rng(SEED)
        prompts = list(extraction_prompts(task, BASE.n_prompts, BASE.demos_per_class, rng))
        for query, key in capture_last_tokens(model, tokenizer, prompts, layers):
            found[task.name].update(query, key)
    return found


def fit(model, pad_id, config, moments, queries, n_features):
    layers, dims = late_third(model.config.num_hidden_layers), dims_of(model)
    pooled = QKMoments(len(layers), dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim)
    for part in moments:
        pooled.merge(part)
    pids = fit_pids(pooled, layers, config.rank, config.basis, torch.Generator().manual_seed(SEED))
    generator = torch.Generator().manual_seed(SEED)
    router = Router(n_features, len(layers), dims.n_heads, config.rank, config.hidden_width, generator)
    Trainer(model, pids, router, queries, config, pad_id).run()
    return pids, router


def run(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file = out / "records.jsonl"
    done = {record.method for record in records.read(file)}
    model, tokenizer = load_model("pinned:smollm2-135m")
    layers, pad_id, features = (
        late_third(30),
        pad_id_of(tokenizer),
        features_of("pinned:minilm", model, tokenizer, "cpu"),
    )
    whole = [load_task(name, "pinned:staicc") for name in TASKS]
    tasks = [dataclasses.replace(task, train=task.train[:-N_VALIDATION]) for task in whole]
    moments = moments_per_task(model, tokenizer, tasks, layers)
    queries = {
        task.name: fitting.training_queries(model, tokenizer, [task], features, layers[0], BASE)[0] for task in tasks
    }
    unscaled = features.scale(torch.empty(0))
    items = [Items(model, tokenizer, features, t, t.train[-N_VALIDATION:], layers[0], unscaled) for t in whole]
    if "zero-shot" not in done:
        pids = fit_pids(moments["agnews"], layers, 8, "pca", torch.Generator())
        records.append(file, [r for item in items for r in item.score("zero-shot", model, None, pids, 0.0, pad_id)])
    for name, config in CANDIDATES.items():
        for left_out in TASKS:
            names = [f"{name} | without {left_out} | strength {strength}" for strength in STRENGTHS]
            if names[-1] in done:
                continue  # the three strengths of one fit are appended together
            kept, started = [task for task in TASKS if task != left_out], time.monotonic()
            of_kept = [query for task in kept for query in queries[task]]
            pids, router = fit(model, pad_id, config, [moments[t] for t in kept], of_kept, features.n_features)
            for method, strength in zip(names, STRENGTHS, strict=True):
                scale = strength * config.final_alpha_scale
                records.append(
                    file, [r for item in items for r in item.score(method, model, router, pids, scale, pad_id)]
                )
            print(f"{name} | without {left_out}: {time.monotonic() - started:.0f} s", flush=True)
            tabulate(file, out)


def tabulate(file: Path, out: Path) -> None:
    """Writes the mean accuracy on kept and on left-out tasks of every candidate, and the gain over zero-shot."""
    right = defaultdict(list)
    for record in records.read(file):
        right[record.method, record.task].append(record.label == record.prediction)
    accuracy = {key: 100 * float(np.mean(values)) for key, values in right.items()}
    rows = {"zero-shot": {task: round(accuracy["zero-shot", task], 1) for task in TASKS}}
    for name in CANDIDATES:
        for strength in STRENGTHS:
            methods = {left: f"{name} | without {left} | strength {strength}" for left in TASKS}
            if any((method, TASKS[0]) not in accuracy for method in methods.values()):
                continue
            unseen = {left: accuracy[method, left] for left, method in methods.items()}
            seen = [accuracy[m, task] for left, m in methods.items() for task in TASKS if task != left]
            plain = float(np.mean(list(rows["zero-shot"].values())))
            rows[f"{name}, strength {strength}"] = {
                "kept": round(float(np.mean(seen)), 1),
                "left out": round(float(np.mean(list(unseen.values()))), 1),
                "left out minus zero-shot": round(float(np.mean(list(unseen.values()))) - plain, 1),
                **{f"left out: {task}": round(value, 1) for task, value in unseen.items()},
            }
    about = {"command": "python benchmarks/leave_one_out.py", "commit": commit(), "seed": SEED, "items": N_VALIDATION}
    save_json(out / "table.json", {**about, "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/leave-one-out"))
    run(parser.parse_args().out)
