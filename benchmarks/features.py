"""What should the router read of a prompt? Each source task is left out in turn, as in leave_one_out.py.

    python benchmarks/features.py --out benchmarks/results/features

On SmolLM2-135M with the demo's three source tasks: PIDs and router are fitted on two of them and scored on 100
held-back train rows of all three; no test row is touched. Killed and started again, it goes on.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import leave_one_out as loo
import torch
from choose_defaults import Items
from novelty import gain

from icrouting import fitting, records
from icrouting.config import FitConfig
from icrouting.decoder.batches import pad_id_of
from icrouting.decoder.loading import load_model
from icrouting.routing.features import Features, features_of
from icrouting.routing.pids import QKMoments, fit_pids, late_third
from icrouting.runs import commit
from icrouting.runtime.storage import load_tensors, save_json, save_tensors
from icrouting.tasks.load import load_task

CONFIG = FitConfig(
    basis="pca", lr=1e-4, ce_scope="options", batch_size=8, n_prompts=20, n_queries=250, epochs=2, seed=loo.SEED
)


def last(states):
    return states[-1]


def mean(states):
    return states.mean(0)


def pooled(model, *pools):
    """Hidden states pooled in several ways, one after the other."""

    def read(token_lists, hidden):
        return torch.stack([torch.cat([pool(states.float()) for pool in pools]) for states in hidden])

    return Features(model.config.hidden_size * len(pools), "pooled", True, read)


def kinds(model, tokenizer):
    minilm, hidden = features_of("pinned:minilm", model, tokenizer, "cpu"), pooled(model, last)

    def joined(token_lists, states):
        return torch.cat([part.read(token_lists, states).cpu() for part in (minilm, hidden)], dim=1)

    return {
        "minilm": minilm,
        "hidden, last token": hidden,
        "hidden, mean": pooled(model, mean),
        "hidden, last and mean": pooled(model, last, mean),
        "minilm and hidden, last": Features(minilm.n_features + hidden.n_features, "joined", True, joined),
        # "reads hidden" also says that they are standardised over the training queries
        "minilm, standardised": dataclasses.replace(minilm, reads_hidden=True),
        "constant": features_of("constant:pinned:minilm", model, tokenizer, "cpu"),
    }


def moments_of(model, tokenizer, tasks, layers, out):
    """Each task's moments; kept, since they take the longest."""
    loo.BASE = CONFIG
    for task in tasks:
        file = out / f"moments-{task.name}.safetensors"
        if not file.exists():
            save_tensors(file, loo.moments_per_task(model, tokenizer, [task], layers)[task.name].tensors())
    return {
        task.name: QKMoments.from_tensors(load_tensors(out / f"moments-{task.name}.safetensors")[0]) for task in tasks
    }


def run(out: Path, chosen: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file = out / "records.jsonl"
    done = {record.method for record in records.read(file)}
    model, tokenizer = load_model("pinned:smollm2-135m")
    layers, pad_id = late_third(30), pad_id_of(tokenizer)
    whole = [load_task(name, "pinned:staicc") for name in loo.TASKS]
    tasks = [dataclasses.replace(task, train=task.train[: -loo.N_VALIDATION]) for task in whole]
    moments = moments_of(model, tokenizer, tasks, layers, out)
    known = kinds(model, tokenizer)
    if unknown := [kind for kind in chosen if kind not in known]:
        raise SystemExit(f"unknown kinds {unknown}: known are {list(known)}")
    for kind, features in ((kind, known[kind]) for kind in chosen or known):
        names = {left_out: f"{kind} | without {left_out}" for left_out in loo.TASKS}
        if set(names.values()) <= done:
            continue
        for left_out, name in names.items():
            if name in done:
                continue
            started, kept = time.monotonic(), [task for task in tasks if task.name != left_out]
            queries, scale = fitting.training_queries(model, tokenizer, kept, features, layers[0], CONFIG)
            items = [
                Items(model, tokenizer, features, t, t.train[-loo.N_VALIDATION :], layers[0], scale) for t in whole
            ]
            of_kept = [moments[task.name] for task in kept]
            pids, router = loo.fit(model, pad_id, CONFIG, of_kept, queries, features.n_features)
            found = [
                r for item in items for r in item.score(name, model, router, pids, CONFIG.final_alpha_scale, pad_id)
            ]
            if "zero-shot" not in done:
                plain = fit_pids(moments["agnews"], layers, 8, "pca", torch.Generator())
                found += [r for item in items for r in item.score("zero-shot", model, None, plain, 0.0, pad_id)]
                done.add("zero-shot")
            records.append(file, found)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    tabulate(file, out, known)


def lead(found, kind: str, base: str, is_kept: bool) -> dict[str, float]:
    """One kind's paired lead over another, the mean over every fit's tasks; a task's fits count as independent."""
    sides = []
    for name in (kind, base):
        fits = [(left, r) for left in loo.TASKS for r in found if r.method == f"{name} | without {left}"]
        sides.append(
            [dataclasses.replace(r, task=f"{r.task}, {left}") for left, r in fits if (r.task != left) == is_kept]
        )
    return gain(*sides, sorted({record.task for record in sides[0]}))


def tabulate(file: Path, out: Path, names) -> None:
    """Writes every kind's mean accuracy on kept and on left-out tasks, and its lead over a constant."""
    found = records.read(file)
    right: dict[tuple[str, str], list[bool]] = {}
    for record in found:
        right.setdefault((record.method, record.task), []).append(record.label == record.prediction)
    accuracy = {key: 100 * sum(values) / len(values) for key, values in right.items()}
    rows = {"zero-shot": {task: accuracy["zero-shot", task] for task in loo.TASKS}}
    for kind in names:
        methods = {left: f"{kind} | without {left}" for left in loo.TASKS}
        if all((method, loo.TASKS[0]) in accuracy for method in methods.values()):
            kept = [accuracy[m, task] for left, m in methods.items() for task in loo.TASKS if task != left]
            unseen = {f"left out: {left}": accuracy[m, left] for left, m in methods.items()}
            rows[kind] = {
                "kept": round(sum(kept) / len(kept), 1),
                "left out": round(sum(unseen.values()) / len(unseen), 1),
                **unseen,
            }
    for kind in rows.keys() - {"zero-shot", "constant"} if "constant" in rows else ():
        parts = {"kept": True, "left out": False}
        rows[kind] |= {f"{part}, over a constant": lead(found, kind, "constant", flag) for part, flag in parts.items()}
    about = {"command": "python benchmarks/features.py", "commit": commit(), "seed": loo.SEED}
    save_json(out / "table.json", {**about, "items": loo.N_VALIDATION, "fit": dataclasses.asdict(CONFIG), "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/features"))
    parser.add_argument("--kinds", nargs="+", default=[], help="of features; all of them unless given")
    arguments = parser.parse_args()
    run(arguments.out, arguments.kinds)
