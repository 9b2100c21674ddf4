"""Which objective and which basis? The comparison behind the defaults of `FitConfig`.

    python benchmarks/choose_defaults.py --data DATA --out runs/choose-defaults

On SmolLM2-135M with the paper's five source tasks, 60 extraction prompts and 400 queries each. Every
candidate is scored on 100 held-back train rows per source task (the choice is made there) and on 200 test
items of each of the twelve tasks (reported, never chosen by). Killed and started again, it goes on.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from icrouting import fitting, records, report
from icrouting.config import PAPER, FitConfig
from icrouting.decoder.batches import pad_id_of, tokenize
from icrouting.decoder.families import dims_of
from icrouting.decoder.loading import load_model
from icrouting.decoder.partial import late_entry
from icrouting.decoder.scoring import option_ids
from icrouting.records import Record
from icrouting.routing.attach import attach
from icrouting.routing.features import features_of
from icrouting.routing.pids import QKMoments, fit_pids, late_third
from icrouting.routing.router import Router
from icrouting.runtime.storage import load_tensors
from icrouting.tasks.catalogue import PAPER_TASKS
from icrouting.tasks.load import load_task
from icrouting.train import Trainer
from icrouting.trunk import pad_states, run_trunk

N_PROMPTS, N_QUERIES, N_TEST, N_VALIDATION, SEED = 60, 400, 200, 100, 42
# Every candidate stands here whole, so that a change of the defaults leaves what their names say.
BASE = FitConfig(
    basis="whitened",
    lr=1e-3,
    ce_scope="options",
    batch_size=8,
    n_prompts=N_PROMPTS,
    n_queries=N_QUERIES,
    encoder="pinned:minilm",
    seed=SEED,
)
_PAPER = dataclasses.replace(PAPER, n_prompts=N_PROMPTS, n_queries=N_QUERIES, encoder="pinned:minilm")
CANDIDATES = {
    "paper, 1 epoch": dataclasses.replace(_PAPER, epochs=1),
    "options, whitened, 1 epoch": dataclasses.replace(BASE, epochs=1),
    "options, whitened, 2 epochs": dataclasses.replace(BASE, epochs=2),
    "options, pca, lr 1e-4, 1 epoch": dataclasses.replace(BASE, basis="pca", lr=1e-4, epochs=1),
    "vocabulary, whitened, 1 epoch": dataclasses.replace(BASE, ce_scope="vocabulary", epochs=1),
    "paper, 2 epochs": _PAPER,
    "options, random, 1 epoch": dataclasses.replace(BASE, basis="random", epochs=1, lr=1e-4),
    "options, whitened, 3 epochs": dataclasses.replace(BASE, epochs=3),
    "options, whitened, lr 3e-4, 2 epochs": dataclasses.replace(BASE, lr=3e-4, epochs=2),
}


class Items:
    """Items to score, with their trunk kept: every candidate then costs the routed third of a pass."""

    def __init__(self, model, tokenizer, features, task, examples, first, scale):
        self.task, self.examples = task, examples
        texts = [task.prompt(example) for example in examples]
        token_lists = tokenize(tokenizer, texts)
        self.states = run_trunk(model, token_lists, first, pad_id_of(tokenizer))
        mean, std = scale
        self.features = (features.read(token_lists, [state.hidden for state in self.states]) - mean) / std
        self.ids = [option_ids(tokenizer, t, task.options(e)) for t, e in zip(texts, examples, strict=True)]

    @torch.no_grad()
    def score(self, name, model, router, pids, scale, pad_id):
        """Returns one record per item; `router` None scores the plain model."""
        order = sorted(range(len(self.states)), key=lambda i: -len(self.states[i].tokens))
        found = {}
        for rows in (order[start : start + 32] for start in range(0, len(order), 32)):
            batch, hidden = pad_states([self.states[i] for i in rows], pad_id)
            started = time.monotonic()
            with late_entry(model, pids.layers[0]) as entry:
                if router is None:
                    logits = entry(batch, hidden)
                else:
                    with attach(model, pids) as attachment:
                        attachment.routing = router(self.features[rows]).scaled(scale)
                        logits = entry(batch, hidden)
            seconds = (time.monotonic() - started) / len(rows)
            for row, line in zip(rows, logits, strict=True):
                scores = tuple(line[self.ids[row]].tolist())
                label, best = self.examples[row].label, int(np.argmax(scores))
                n_tokens = len(self.states[row].tokens)
                found[row] = Record(name, self.task.name, SEED, row, label, best, scores, n_tokens, seconds)
        return [found[row] for row in sorted(found)]


def run(data: Path, out: Path, only: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("pinned:smollm2-135m")
    tasks = {name: load_task(name, data) for name in PAPER_TASKS}
    sources = [task for task in tasks.values() if task.spec.group == "in-domain"]
    fit_tasks = [dataclasses.replace(task, train=task.train[:-N_VALIDATION]) for task in sources]
    layers, dims, pad_id = late_third(model.config.num_hidden_layers), dims_of(model), pad_id_of(tokenizer)
    features = features_of("pinned:minilm", model, tokenizer, "cpu")
    fitting.extract(model, tokenizer, fit_tasks, layers, BASE, out)
    moments = QKMoments.from_tensors(load_tensors(out / "moments.safetensors")[0])
    queries, scale_of = fitting.training_queries(model, tokenizer, fit_tasks, features, layers[0], BASE)
    validation = [Items(model, tokenizer, features, t, t.train[-N_VALIDATION:], layers[0], scale_of) for t in sources]
    test = [Items(model, tokenizer, features, t, t.test[:N_TEST], layers[0], scale_of) for t in tasks.values()]
    chosen = {name: CANDIDATES[name] for name in only} if only else CANDIDATES
    write_config(out, tasks, ["zero-shot", *chosen])
    done = (
        {record.method for record in records.read(out / "records.jsonl")} if (out / "records.jsonl").exists() else set()
    )
    for name, config in {"zero-shot": None, **chosen}.items():
        if name in done:
            continue
        if config is None:
            router, scale = None, 0.0
            pids = fit_pids(moments, layers, 8, "pca", torch.Generator())
        else:
            pids = fit_pids(moments, layers, config.rank, config.basis, torch.Generator().manual_seed(SEED))
            generator = torch.Generator().manual_seed(SEED)
            router = Router(features.n_features, len(layers), dims.n_heads, config.rank, config.hidden_width, generator)
            started = time.monotonic()
            Trainer(model, pids, router, queries, config, pad_id).run()
            print(f"{name}: trained in {time.monotonic() - started:.0f} s", flush=True)
            scale = config.final_alpha_scale
        for file, items in (("validation.jsonl", validation), ("records.jsonl", test)):
            scored = [r for item in items for r in item.score(name, model, router, pids, scale, pad_id)]
            records.append(out / file, scored)
            right = np.mean([r.label == r.prediction for r in scored])
            print(f"{name}: {file.split('.')[0]} {100 * right:.1f}", flush=True)
    report.write(out)


def write_config(out: Path, tasks, methods) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    roles = {"in-domain": "source"}
    config = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": "pinned:smollm2-135m",
        "seeds": [SEED],
        "n_test": N_TEST,
        "methods": methods,
        "tasks": [
            {
                "name": task.name,
                "group": task.spec.group,
                "role": roles.get(task.spec.group, "unseen"),
                "n_options": len(task.options(task.test[0])),
            }
            for task in tasks.values()
        ],
        "demos_per_class": BASE.demos_per_class,
        "notes": [
            f"{N_PROMPTS} extraction prompts and {N_QUERIES} queries per source task, {N_TEST} test items, one seed: "
            "the paper takes 5,000, 5,000, 500 and three."
        ],
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the twelve data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/choose-defaults"))
    parser.add_argument("--only", nargs="*", default=[], help="names of candidates; all by default")
    arguments = parser.parse_args()
    run(arguments.data, arguments.out, arguments.only)
