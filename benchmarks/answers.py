"""A run's answers in one small file, to be published with its figures, and the run that is made of them again.

    python benchmarks/answers.py keep runs/rivals-in-domain benchmarks/results/smollm2-135m-rivals-in-domain
    python benchmarks/answers.py restore benchmarks/results/smollm2-135m-rivals-in-domain runs/rivals-in-domain

`keep` writes answers.json: by method, task and seed one digit an item, the option that was chosen ("." where there is
none yet). `restore` makes config.json and records.jsonl, which `icr eval` goes on with (more seeds, more methods),
`icr report` shows and benchmarks/leads.py reads. Accuracies, gains and tests come out as they were; of the rest,
logits are not kept (NaN), and seconds and tokens are a cell's median and mean; a run that goes on knows what its new
fits cost, not what the old ones did.
"""

import argparse
import math
import sys
from pathlib import Path
from statistics import fmean, median

from icrouting.evaluation import records
from icrouting.evaluation.records import Record
from icrouting.evaluation.runs import commit
from icrouting.runtime.storage import load_json, save_json

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def keep(run: Path, out: Path) -> None:
    asked: dict[str, dict[int, Record]] = {}
    cells: dict[tuple[str, str, int], dict[int, Record]] = {}
    for record in records.read(run / "records.jsonl"):
        asked.setdefault(record.task, {})[record.index] = record
        cells.setdefault((record.method, record.task, record.seed), {})[record.index] = record
    tasks, answers = {}, {}
    for task, items in asked.items():
        tasks[task] = {
            "items": " ".join(map(str, items)),
            "labels": "".join(DIGITS[record.label] for record in items.values()),
            "n_options": "".join(DIGITS[len(record.option_logits)] for record in items.values()),
        }
    for (method, task, seed), cell in cells.items():
        answers.setdefault(method, {}).setdefault(task, {})[str(seed)] = {
            "chosen": "".join(
                DIGITS[cell[index].prediction] if index in cell else "." for index in asked[task]
            ),
            "seconds": round(median(record.seconds for record in cell.values()), 4),
            "n_tokens": round(fmean(record.n_tokens for record in cell.values())),
        }
    origin = {"command": f"python {' '.join(sys.argv)}", "commit": commit()}
    save_json(out / "answers.json", {**origin, "tasks": tasks, "answers": answers})


def restore(kept: Path, run: Path) -> None:
    if (run / "records.jsonl").exists():
        raise SystemExit(f"{run} holds records already: give a new folder")
    content, found = load_json(kept / "answers.json"), []
    for method, by_task in content["answers"].items():
        for task, by_seed in by_task.items():
            of = content["tasks"][task]
            items = list(
                zip(map(int, of["items"].split()), of["labels"], of["n_options"], strict=True)
            )
            for seed, cell in by_seed.items():
                for (index, label, n_options), chosen in zip(items, cell["chosen"], strict=True):
                    if chosen != ".":
                        options = (
                            DIGITS.index(label),
                            DIGITS.index(chosen),
                            (math.nan,) * DIGITS.index(n_options),
                        )
                        costs = cell["n_tokens"], cell["seconds"]
                        found.append(Record(method, task, int(seed), index, *options, *costs))
    run.mkdir(parents=True, exist_ok=True)
    save_json(run / "config.json", load_json(kept / "config.json"))
    records.append(run / "records.jsonl", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=["keep", "restore"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    {"keep": keep, "restore": restore}[given.way](given.source, given.target)
