"""What is a learned gate worth beside a comparison of texts? From a finished run with zero-shot, icr and icr-gated.

    python benchmarks/gate.py --run runs/smollm2-135m/gated --without runs/smollm2-135m/rivals-once \
        --out benchmarks/results/novelty/gate.json

The rival gate lets a prompt pass if its last line ("Sentiment:") is that of a source task's prompt; its answers are
picked from the two runs. Items in `--without`, which had a part in the gate's design, are also told apart from others.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from novelty import gain

from icrouting import records
from icrouting.runs import commit
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.load import load_task


def last_line(task, row) -> str:
    return task.prompt(row).split("\n")[-1]


def run(folder: Path, without: Path, data: str, out: Path) -> None:
    roles = {task["name"]: task["role"] for task in load_json(folder / "config.json")["tasks"]}
    tasks = {name: load_task(name, data) for name in roles}
    by = {(r.method, r.task, r.index): r for r in records.read(folder / "records.jsonl") if r.seed == 0}
    seen = {(record.task, record.index) for record in records.read(without / "records.jsonl")}
    endings = {name: [last_line(task, row) for row in task.test] for name, task in tasks.items()}
    known = {last_line(tasks[name], row) for name in roles if roles[name] == "source" for row in tasks[name].train}
    keys, passes = [key[1:] for key in by if key[0] == "zero-shot"], {}
    for name in roles:
        own = [(by["icr-gated", *key], by["icr", *key]) for key in keys if key[0] == name]
        alike = [np.allclose(gated.option_logits, icr.option_logits, atol=1e-3) for gated, icr in own]
        same_line = [endings[name][index] in known for task, index in keys if task == name]
        passes[name] = {"icr-gated": float(np.mean(alike)), "last line": float(np.mean(same_line))}
    for key in keys:
        chosen = by["icr" if endings[key[0]][key[1]] in known else "zero-shot", *key]
        by["last line", *key] = dataclasses.replace(chosen, method="last line")
    items = {"all": set(keys), "design": seen & set(keys), "others": set(keys) - seen}
    pairs = [("icr", "zero-shot"), ("icr-gated", "zero-shot"), ("last line", "zero-shot")]
    pairs += [("icr-gated", "icr"), ("icr-gated", "last line")]
    leads = {}
    for part, kept in items.items():
        for one, other in pairs:
            sides = [
                [record for key, record in by.items() if key[0] == name and key[1:] in kept] for name in (one, other)
            ]
            for group in ("source", "unseen"):
                names = [name for name in roles if roles[name] == group and any(task == name for task, _ in kept)]
                leads[f"{one} over {other}, {group} tasks, {part} items"] = gain(*sides, names)
    save_json(out, {"command": f"python {' '.join(sys.argv)}", "commit": commit(), "passes": passes, "leads": leads})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--without", type=Path, required=True)
    parser.add_argument("--data", default="../shared/data", help="where the tasks' rows are, as for `icr`")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    run(chosen.run, chosen.without, chosen.data, chosen.out)
