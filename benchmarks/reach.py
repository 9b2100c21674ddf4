"""What could routing gain on a task at best, beside calibration? Fits on unseen tasks themselves.

    python -m benchmarks.reach --model MODEL --dtype bfloat16 --out OUT
    python -m benchmarks.reach --model MODEL --out OUT --variants default taken --tasks creak
    python -m benchmarks.reach --out OUT --prediction
    python -m benchmarks.reach --out OUT --summary

Alpha and gamma are fitted on 200 labelled rows of a task and asked its test rows, in the variants
of `reach_training.VARIANTS` (settings, targets, priors, one routing for all prompts). What
several need of a task is computed once and kept in OUT/store. Each fit is a line of
OUT/records.jsonl as soon as it is there, with the options' scores of all test rows at every look,
and none is computed twice. `--prediction` says how well the few-shot traces' coefficients along the
directions are predicted from the prompt alone; it needs no model, but the store.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.reach_parts import Parts, Sizes, World
from benchmarks.reach_prediction import predict
from benchmarks.reach_summary import KEYS, records_of, summarise
from benchmarks.reach_training import DEAR, VARIANTS, as_lists, fit
from icrouting.evaluation.runs import commit
from icrouting.tasks.load import load_task

TASKS = ("sst5", "mr", "mrpc", "cb", "copa", "creak", "ai2scie")


def plain(parts: Parts, scores: torch.Tensor) -> dict:
    """Returns what a record holds of scores that nothing was trained for."""
    return {"n_steps": 0, "looks": {0: {"test": as_lists(scores)}}}


def measure(arguments: argparse.Namespace) -> None:
    """Fits whatever is not there yet: every task with one variant, then with the next."""
    sizes = Sizes(arguments.rows, arguments.held, arguments.items, arguments.sharing)
    world = World(arguments.model, arguments.dtype, arguments.encoder, arguments.out, sizes)
    file = arguments.out / "records.jsonl"
    model = Path(arguments.model.removeprefix("pinned:")).name
    there = {tuple(record[key] for key in KEYS) for record in records_of(file)}
    parts_by_task = {}

    def add(parts: Parts, variant: str, n_steps: int, record: dict) -> None:
        key = (model, parts.name, variant, n_steps)
        labels = {"test": parts.labels("test"), "held": parts.labels("held")}
        line = {**dict(zip(KEYS, key, strict=True)), **record, "labels": labels, "commit": commit()}
        with file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        there.add(key)

    for name in arguments.tasks:
        parts = world.parts_of(load_task(name, arguments.data))
        parts_by_task[parts.name] = parts
        for variant, scores in (("zero-shot", "zero_shot"), ("few-shot", "test_scores")):
            if (model, parts.name, variant, 0) not in there:
                add(parts, variant, 0, plain(parts, parts.traces[scores]))
    for variant in arguments.variants:
        for name, parts in parts_by_task.items():
            if (model, name, variant, arguments.steps) in there:
                continue
            start = time.perf_counter()
            record = fit(world, parts, variant, arguments.steps, arguments.every)
            add(parts, variant, arguments.steps, record)
            stages = ("preparing", "training", "looking")
            print(
                *(model, name, variant, f"{record['n_steps']} steps"),
                *(f"{stage} {record[f'seconds_{stage}']:.0f} s" for stage in stages),
                f"all {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def main(words: list[str] | None = None) -> None:
    """Measures, or prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pinned:smollm2-135m", help="name or folder")
    parser.add_argument("--dtype", help="bfloat16 or float32; without it, what the hardware says")
    parser.add_argument("--encoder", default="pinned:minilm")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reach"))
    parser.add_argument("--data", default="../shared/data", help='a folder, or "pinned:staicc"')
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="names or task files")
    cheap = [name for name in VARIANTS if name not in DEAR]
    parser.add_argument("--variants", nargs="*", default=cheap, choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=100, help="of a fit; `long` takes thrice")
    parser.add_argument("--every", type=int, default=50, help="steps from one look to the next")
    parser.add_argument("--rows", type=int, default=Sizes.rows, help="labelled training rows")
    parser.add_argument("--held", type=int, default=Sizes.held, help="rows that stop a fit")
    parser.add_argument("--items", type=int, default=Sizes.items, help="test rows")
    parser.add_argument("--sharing", type=int, default=Sizes.sharing, help="rows to a context")
    parser.add_argument("--summary", action="store_true", help="print the table, fit nothing")
    parser.add_argument("--prediction", action="store_true", help="predict traces, fit nothing")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    if arguments.summary:
        summarise(arguments.out / "records.jsonl")
    elif arguments.prediction:
        predict(arguments.out / "store", arguments.tasks)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
