"""Holds the plan of a fit (`icr fit --dry-run`) against what short fits take: docs/scaling.md.

    python -m benchmarks.scaling --data FOLDER

The fits are of SmolLM2-135M. The speed is fitted on two extractions, of the shortest and of the
longest prompts; all else is predicted. Every row runs in a process of its own, on one thread, and
is timed in seconds of its core, since machines are shared.
"""

import argparse
import gc
import json
import multiprocessing
import re
import time
from pathlib import Path

import psutil
import torch

from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import dims_of
from icrouting.decoder.loading import load_model
from icrouting.fitting.plan import Plan, plan_fit
from icrouting.fitting.queries import training_queries
from icrouting.fitting.stages import extract_pids
from icrouting.fitting.training import Trainer
from icrouting.routing.features import features_of
from icrouting.routing.pids import late_third
from icrouting.routing.router import Router
from icrouting.tasks.load import load_task

MODEL = "pinned:smollm2-135m"
# Name, tasks, prompts of each: the first two are fitted.
EXTRACTIONS = (
    ("sst2", ("sst2",), 12),
    ("csqa", ("csqa",), 9),
    ("trec, agnews", ("trec", "agnews"), 5),
    ("sst2, ten times as many", ("sst2",), 120),
    ("piqa", ("piqa",), 9),
)
RESULT = Path(__file__).parent / "results" / "scaling.json"


def measured(data: str, names: tuple[str, ...], config: FitConfig, trains: bool) -> dict:
    """Returns what stages take here, beside the plan's numbers; runs in a process of its own."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, dtype=torch.float32)
    tasks = [load_task(name, data) for name in names]
    plan = plan_fit(model, tokenizer, tasks, config, torch.float32, sample=10**6)
    layers = late_third(30)
    # What a first call allocates once and for all is none of the fit's.
    model(input_ids=torch.ones(1, 8, dtype=torch.long))
    gc.collect()
    before = psutil.Process().memory_info().rss
    # Linux: the peak so far, of loading, is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    started = time.process_time()
    pids = extract_pids(Decoder.of(model, tokenizer), tasks, layers, config, None)
    seconds = {"extraction": time.process_time() - started}
    peak = peak_bytes() - before
    if trains:
        features = features_of(HIDDEN, Decoder.of(model, tokenizer), "cpu")
        started = time.process_time()
        queries, _ = training_queries(
            Decoder.of(model, tokenizer), tasks, features, layers[0], config
        )
        seconds["trunk"] = time.process_time() - started
        started = time.process_time()
        n_heads = dims_of(model).n_heads
        router = Router(features.n_features, len(layers), n_heads, config.rank, config.hidden_width)
        Trainer(Decoder.of(model, tokenizer), pids, router, queries, config).run()
        seconds["training"] = time.process_time() - started
    return {
        "seconds": seconds,
        "peak": peak,
        "flops": plan.flops,
        "memory": plan.memory,
        "tokens": tokens_of(plan),
    }


def peak_bytes() -> int:
    """The most memory that this process has held."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def tokens_of(plan: Plan) -> dict[str, int]:
    """Returns the tokens of both kinds of prompts."""
    kinds = {"extraction": plan.prompts, "queries": plan.queries}
    return {
        kind: sum(texts.tokens for texts in by_task.values()) for kind, by_task in kinds.items()
    }


def errors_of(row: dict, flops_per_second: float) -> dict[str, float]:
    """How far the plan is off in each stage's seconds and in the peak of memory; 0 is exact."""
    errors = {}
    for stage, seconds in row["seconds"].items():
        planned = row["flops"][stage] / flops_per_second
        errors[stage] = planned / seconds - 1
    # The parts that are there at one time in an extraction, which is what the peak was read of.
    parts = ("moments", "extraction batch", "PCA of one layer")
    errors["peak"] = sum(row["memory"][part] for part in parts) / row["peak"] - 1
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default="../shared/data", help="folder with NAME/train.jsonl and NAME/test.jsonl"
    )
    data = parser.parse_args().data
    rows = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, tasks, n_prompts in EXTRACTIONS:
            trains = len(tasks) > 1
            config = FitConfig(
                n_prompts=n_prompts, n_queries=40, encoder=HIDDEN, epochs=1, batch_size=4
            )
            rows[name] = pool.apply(measured, (data, tasks, config, trains))
            print(name, json.dumps(rows[name]), flush=True)
    fitted_rows = [rows[name] for name, _, _ in EXTRACTIONS[:2]]
    flops = sum(row["flops"]["extraction"] for row in fitted_rows)
    seconds = sum(row["seconds"]["extraction"] for row in fitted_rows)
    flops_per_second = flops / seconds
    for row in rows.values():
        row["off"] = errors_of(row, flops_per_second)
        print(row["off"])
    content = {"model": MODEL, "flops_per_second": flops_per_second, "rows": rows}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
