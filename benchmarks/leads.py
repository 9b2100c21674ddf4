"""Paired leads of one method over another, across run folders that asked the same items; means over the tasks.

    python benchmarks/leads.py --runs runs/smollm2-135m/rivals-once runs/smollm2-135m/controls-once \
        --pairs icr-refit-once/zero-shot prefix-tuning-once/icr-refit-once \
        --out benchmarks/results/smollm2-135m-controls-once/leads.json
"""

import argparse
import sys
from pathlib import Path

from novelty import gain

from icrouting.evaluation import records
from icrouting.evaluation.runs import commit
from icrouting.runtime.storage import load_json, save_json


def run(folders: list[Path], pairs: list[str], out: Path, without: list[str]) -> None:
    roles = {task["name"]: task["role"] for task in load_json(folders[0] / "config.json")["tasks"]}
    configs = [load_json(folder / "config.json") for folder in folders]
    for name in ("rows", "fingerprint", "dtype"):
        if len(found := {str(config.get(name)) for config in configs}) > 1:
            raise SystemExit(
                f"the runs differ in {name} ({', '.join(sorted(found))}): their records are no pairs"
            )
    by_method: dict[str, list] = {}
    for key, record in {
        r.key: r for folder in folders for r in records.read(folder / "records.jsonl")
    }.items():
        by_method.setdefault(key[0], []).append(record)
    groups = {
        f"{role} tasks": [name for name in roles if roles[name] == role]
        for role in ("source", "unseen")
    }
    groups = {group: names for group, names in groups.items() if names} | {"all tasks": list(roles)}
    if without:
        groups |= {
            f"{group} but {' and '.join(without)}": [name for name in names if name not in without]
            for group, names in groups.items()
            if set(names) & set(without)
        }
    leads = {}
    for one, other in (pair.split("/") for pair in pairs):
        for group, names in groups.items():
            leads[f"{one} over {other}, {group}"] = gain(by_method[one], by_method[other], names)
    save_json(out, {"command": f"python {' '.join(sys.argv)}", "commit": commit(), "leads": leads})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--pairs", nargs="+", required=True, help="METHOD/METHOD")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--without", nargs="+", default=[], help="tasks: leads are given without them too"
    )
    chosen = parser.parse_args()
    run(chosen.runs, chosen.pairs, chosen.out, chosen.without)
