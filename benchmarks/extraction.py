"""What does sharing demonstrations among extraction queries save, and how far does it move the PIDs?

    python benchmarks/extraction.py --out benchmarks/results/extraction.json

On SmolLM2-135M with the demo's three source tasks. The paper's way (demonstrations of its own for every query) is run
with two seeds: the distance between those two is what any draw moves, and the measure of what sharing moves. Subspaces
are compared by the cosines of their principal angles, averaged over routed layers and directions. Resumable.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from icrouting import fitting
from icrouting.config import FitConfig
from icrouting.decoder.loading import load_model
from icrouting.routing.pids import late_third
from icrouting.runs import commit
from icrouting.runtime.storage import load_json, load_tensors, save_json, save_tensors
from icrouting.tasks.load import load_task

SHARED = (1, 2, 4, 8)
BASE = FitConfig(n_prompts=24, seed=0)


def cosines(a, b):
    """Cosines of the principal angles between two subspaces per layer, largest first."""
    return torch.linalg.svdvals(a.mT @ b)


def run(out: Path, data: str, n_prompts: int) -> None:
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("pinned:smollm2-135m")
    layers = late_third(model.config.num_hidden_layers)
    tasks = [load_task(name, data) for name in ("agnews", "sst2", "trec")]
    rows = load_json(out)["rows"] if out.exists() else {}
    configs = {"another seed": dataclasses.replace(BASE, n_prompts=n_prompts, seed=1)}
    configs |= {f"{n} a context": dataclasses.replace(BASE, n_prompts=n_prompts, queries_per_context=n) for n in SHARED}
    found = {}
    for name, config in configs.items():
        file, started = folder / f"{name.replace(' ', '-')}.safetensors", time.monotonic()
        if not file.exists():
            pids = fitting.extract(model, tokenizer, tasks, layers, config, None)
            save_tensors(file, {"query": pids.query_pids, "key": pids.key_pids})
            rows[name] = {"seconds": round(time.monotonic() - started, 1)}
        found[name] = load_tensors(file)[0]
        for side in ("query", "key"):
            angles = cosines(found[name][side], found.get("1 a context", found[name])[side])
            rows[name][f"{side}_cosine_mean"] = round(float(angles.mean()), 3)
            rows[name][f"{side}_cosine_smallest"] = round(float(angles[:, -1].mean()), 3)
        about = {
            "command": f"python benchmarks/extraction.py --prompts {n_prompts}",
            "commit": commit(),
            "prompts_per_task": n_prompts,
        }
        save_json(out, {**about, "rows": rows})
    for side in ("query", "key"):  # measured first, compared last
        angles = cosines(found["another seed"][side], found["1 a context"][side])
        rows["another seed"][f"{side}_cosine_mean"] = round(float(angles.mean()), 3)
        rows["another seed"][f"{side}_cosine_smallest"] = round(float(angles[:, -1].mean()), 3)
    whole = rows["1 a context"]["seconds"]
    for row in rows.values():
        row["time over the paper's way"] = round(row["seconds"] / whole, 2)
    save_json(out, {**about, "rows": rows})
    for name, row in rows.items():
        print(f"{name:15} {row}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/extraction.json"))
    parser.add_argument("--data", default="pinned:staicc")
    parser.add_argument("--prompts", type=int, default=BASE.n_prompts)
    arguments = parser.parse_args()
    run(arguments.out, arguments.data, arguments.prompts)
