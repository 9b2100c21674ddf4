"""What does `icr predict` cost beside the bare model's forward passes, and does its memory grow?

    python -m benchmarks.predicting --router routers/smollm2-135m --model pinned:smollm2-135m \\
        --data pinned:staicc --task agnews --out benchmarks/results/predicting.json

"speed" takes turns on one file of rows: the bare model's passes on the very batches, the routed
model's, and the whole command, from the rows' file to the answers' (the model is loaded before).
"memory" runs the command in a process for each number of rows, and samples its anonymous memory;
all sizes have the same rows, the larger ones again and again.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from benchmarks.memory import Peak
from benchmarks.speed_turns import Stopwatch, device_name
from icrouting.cli import predict as room
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.batches import by_length, pad, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import load_model
from icrouting.decoder.passes import TOKEN_BUDGET, next_token_logits
from icrouting.evaluation.runs import commit
from icrouting.icr import InContextRouter
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.load import load_task


def write_rows(task, n_rows: int, file: Path, n_distinct: int | None = None) -> list[str]:
    """Writes the first rows of a task, again and again, and returns their prompts."""
    examples = [*task.test, *task.train][:n_distinct]
    examples = [examples[n % len(examples)] for n in range(n_rows)]
    pd.DataFrame([dict(example.fields) for example in examples]).to_csv(file, index=False)
    return [task.prompt(example) for example in examples]


def batches_of(decoder, prompts):
    """The batches of a command's windows."""
    batches = []
    for start in range(0, len(prompts), room.WINDOW):
        token_lists = tokenize(decoder.tokenizer, prompts[start : start + room.WINDOW])
        for group in by_length(token_lists, TOKEN_BUDGET):
            lists = [token_lists[row] for row in group]
            batches.append(pad(lists, decoder.pad_id).to(decoder.device))
    return batches


@torch.no_grad()
def run_passes(decoder, batches):
    for batch in batches:
        next_token_logits(decoder.model, batch).cpu()


def speed(arguments, folder: Path) -> dict:
    """Seconds of each way, in turns."""
    model, tokenizer = load_model(arguments.model)
    decoder = Decoder.of(model, tokenizer)
    icr = InContextRouter.from_pretrained(arguments.router)
    task = load_task(arguments.task, arguments.data)
    rows = folder / "rows.csv"
    prompts = write_rows(task, arguments.rows_a_turn, rows)
    batches = batches_of(decoder, prompts)
    room.load = lambda backbone: (model, tokenizer)
    n_runs = 0

    def bare():
        run_passes(decoder, batches)

    def routed():
        with icr.attached(model, tokenizer):
            run_passes(decoder, batches)

    def command():
        nonlocal n_runs
        n_runs += 1
        out = folder / f"answers-{n_runs}.csv"
        predict(arguments, rows, out)

    stopwatch = Stopwatch(arguments.clock, arguments.turns, arguments.seconds)
    seconds = stopwatch.in_turns({"bare": bare, "routed": routed, "icr predict": command})
    shares = [
        mine / whole for mine, whole in zip(seconds["bare"], seconds["icr predict"], strict=True)
    ]
    routed_shares = [
        mine / whole for mine, whole in zip(seconds["bare"], seconds["routed"], strict=True)
    ]
    return {
        "rows": arguments.rows_a_turn,
        "turns": len(shares),
        "rows/s": {name: len(prompts) / median(times) for name, times in seconds.items()},
        "icr predict over bare": {"median": median(shares), "all": shares},
        "routed passes over bare": {"median": median(routed_shares), "all": routed_shares},
    }


def predict(arguments, rows: Path, out: Path) -> None:
    backbone = Backbone(arguments.model)
    room.predict(arguments.router, rows, out, backbone, arguments.task, gate=True, prefix="")


def measure_memory(arguments, folder: Path) -> None:
    """One process's part: the peak of the command on some rows."""
    rows = folder / "rows.csv"
    # The same rows in every size: more of them hold longer ones, which take more by themselves.
    task = load_task(arguments.task, arguments.data)
    write_rows(task, arguments.memory_rows, rows, min(arguments.sizes))
    with Peak() as peak:
        predict(arguments, rows, folder / "answers.csv")
    save_json(arguments.out, {"rows": arguments.memory_rows, "peak MB": peak.peak})


def memory(arguments, folder: Path) -> dict:
    peaks = {}
    for n_rows in arguments.sizes:
        part = folder / f"memory-{n_rows}.json"
        same = ["--router", arguments.router, "--model", arguments.model, "--data", arguments.data]
        command = [sys.executable, "-m", "benchmarks.predicting", *same, "--task", arguments.task]
        command += ["--memory-rows", str(n_rows), "--out", str(part)]
        command += ["--sizes", *map(str, arguments.sizes)]
        subprocess.run(command, check=True)
        peaks[str(n_rows)] = load_json(part)["peak MB"]
    smallest, *_, largest = peaks.values()
    return {"peak MB": peaks, "largest over smallest": largest / smallest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--router", required=True)
    parser.add_argument("--model", default="pinned:smollm2-135m")
    parser.add_argument("--data", default="pinned:staicc")
    parser.add_argument("--task", default="agnews", help="one of the router's sources")
    parser.add_argument("--rows-a-turn", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--memory-rows", type=int, help="of one process's part; not by hand")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.memory_rows:
            return measure_memory(arguments, folder)
        figures = {
            "commit": commit(),
            "device": device_name(),
            "model": arguments.model,
            "task": arguments.task,
            "speed": speed(arguments, folder),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        save_json(arguments.out, figures)
        figures["memory"] = memory(arguments, folder)
        save_json(arguments.out, figures)
    return None


if __name__ == "__main__":
    main()
