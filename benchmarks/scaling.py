"""Holds the plan of a fit (`icr fit --dry-run`) against what short fits on SmolLM2-135M take: docs/scaling.md.

    python benchmarks/scaling.py --data FOLDER

The speed is fitted on two extractions, of the shortest and of the longest prompts; all else is predicted. Every row
runs in a process of its own, on one thread, and is timed in seconds of its core, since machines are shared.
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
    plan, layers = (
        plan_fit(model, tokenizer, tasks, config, torch.float32, sample=10**6),
        late_third(30),
    )
    model(input_ids=torch.ones(1, 8, dtype=torch.long))
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # Linux: the peak so far, of loading, is forgotten
    started = time.process_time()
    pids = extract_pids(Decoder.of(model, tokenizer), tasks, layers, config, None)
    seconds = {"extraction": time.process_time() - started}
    peak = (
        int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024 - before
    )
    if trains:
        features = features_of(HIDDEN, Decoder.of(model, tokenizer), "cpu")
        started = time.process_time()
        queries, _ = training_queries(
            Decoder.of(model, tokenizer), tasks, features, layers[0], config
        )
        seconds["trunk"] = time.process_time() - started
        started = time.process_time()
        router = Router(
            features.n_features,
            len(layers),
            dims_of(model).n_heads,
            config.rank,
            config.hidden_width,
        )
        Trainer(Decoder.of(model, tokenizer), pids, router, queries, config).run()
        seconds["training"] = time.process_time() - started
    return {
        "seconds": seconds,
        "peak": peak,
        "flops": plan.flops,
        "memory": plan.memory,
        "tokens": tokens_of(plan),
    }


def tokens_of(plan: Plan) -> dict[str, int]:
    """Returns the tokens of both kinds of prompts."""
    kinds = {"extraction": plan.prompts, "queries": plan.queries}
    return {
        kind: sum(texts.tokens for texts in by_task.values()) for kind, by_task in kinds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default="../shared/data", help="folder with NAME/train.jsonl and NAME/test.jsonl"
    )
    data, rows = parser.parse_args().data, {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, tasks, n_prompts in EXTRACTIONS:
            trains = len(tasks) > 1
            config = FitConfig(
                n_prompts=n_prompts, n_queries=40, encoder=HIDDEN, epochs=1, batch_size=4
            )
            rows[name] = pool.apply(measured, (data, tasks, config, trains))
            print(name, json.dumps(rows[name]), flush=True)
    fitted = [rows[name] for name, _, _ in EXTRACTIONS[:2]]
    speed = sum(row["flops"]["extraction"] for row in fitted) / sum(
        row["seconds"]["extraction"] for row in fitted
    )
    for row in rows.values():
        row["off"] = {
            stage: row["flops"][stage] / speed / took - 1 for stage, took in row["seconds"].items()
        }
        parts = ("moments", "extraction batch", "PCA of one layer")
        row["off"]["peak"] = sum(row["memory"][part] for part in parts) / row["peak"] - 1
        print(row["off"])
    RESULT.write_text(
        json.dumps({"model": MODEL, "flops_per_second": speed, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
