"""Does a gate on novelty save the unseen tasks? Prompts far from the training queries go unrouted.

    python -m benchmarks.novelty --run runs/smollm2-135m/rivals-once \\
        --out benchmarks/results/novelty
    python -m benchmarks.novelty --run runs/smollm2-135m/run --out runs/fresh \\
        --without runs/smollm2-135m/rivals-once

Reads a finished run's zero-shot and ICR records, so a gate of strength 0 or 1 is exact without a
further pass. What counts as far is set on rows of the source tasks that the router was not trained
on, of which a set share may be shut out; no label and no test row is read for it. Each source task
is also left out of the training queries in turn: a gate that knows novelty when it sees it lets few
of that task's rows pass.
"""

import argparse
import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from icrouting.decoder.batches import tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import load_model
from icrouting.decoder.partial import entering_states
from icrouting.evaluation import records
from icrouting.evaluation.runs import commit
from icrouting.icr import InContextRouter
from icrouting.report.leads import lead
from icrouting.routing.features import features_of
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.load import load_task

# Training queries and fresh rows of a source task, and prompts that are read at once.
N_BANK = 200
N_FRESH = 60
CHUNK = 32
# Shares of the fresh rows that a gate may shut out.
SHUT_OUT = (0.01, 0.05, 0.1, 0.25)


def reader_of(model, tokenizer, encoder: str, first_layer: int):
    """Reads prompts by the encoder's vector, the last token's state and the mean state at once."""
    encode = features_of(encoder, Decoder.of(model, tokenizer), "cpu").read

    def read(prompts):
        token_lists = tokenize(tokenizer, prompts)
        parts_by_kind = defaultdict(list)
        for start in tqdm(range(0, len(token_lists), CHUNK), leave=False):
            chunk = token_lists[start : start + CHUNK]
            states = entering_states(Decoder.of(model, tokenizer), chunk, first_layer)
            last = torch.stack([row[-1].float() for row in states])
            mean = torch.stack([row.float().mean(0) for row in states])
            parts_by_kind[encoder].append(encode(chunk, states).cpu())
            parts_by_kind["hidden, last token"].append(last)
            parts_by_kind["hidden, mean"].append(mean)
        return {kind: torch.cat(parts) for kind, parts in parts_by_kind.items()}

    return read


def nearest(bank):
    """Minus the distance to the nearest training query, in deviations of the bank."""
    whole = torch.cat(list(bank.values()))
    mean = whole.mean(0)
    std = whole.std(0).clamp_min(1e-6)
    queries = (whole - mean) / std

    def closeness(rows):
        distances = torch.cdist((rows - mean) / std, queries)
        return -distances.min(1).values.numpy()

    return closeness


def gaussian(bank):
    """Minus the squared Mahalanobis distance to the nearest source task.

    A task's covariance is shrunk a tenth towards a ball: rows are fewer than dimensions.
    """
    fitted = []
    for rows in bank.values():
        cov = torch.cov(rows.double().T)
        ball = torch.eye(len(cov), dtype=cov.dtype) * cov.trace() / len(cov)
        fitted.append((rows.double().mean(0), torch.linalg.inv(0.9 * cov + 0.1 * ball)))

    def closeness(rows):
        distances = []
        for mean, inverse in fitted:
            gap = rows.double() - mean
            distances.append(((gap @ inverse) * gap).sum(1))
        return -torch.stack(distances).min(0).values.numpy()

    return closeness


MEASURES = {"nearest query": nearest, "nearest task": gaussian}


def gated(records_by_key, inside):
    """ICR's records inside the gate, zero-shot's beyond, all called "gated"."""
    chosen = []
    for key, is_inside in inside.items():
        method = "icr" if is_inside else "zero-shot"
        chosen.append(dataclasses.replace(records_by_key[method, key], method="gated"))
    return chosen


def read_prompts(tasks, sources, keys, model, tokenizer, fit, first_layer):
    """What prompts are read as, by kind: training queries and fresh rows of each source, and tests.

    The draw of the fit is made again: its queries come first, what follows is new to the router.
    """
    read = reader_of(model, tokenizer, fit.encoder, first_layer)
    rng = np.random.default_rng(fit.seed + 1)
    queries_by_source = {}
    fresh_by_source = {}
    for name in sources:
        task = tasks[name]
        drawn = [task.prompt(task.train[index]) for index in rng.permutation(len(task.train))]
        queries_by_source[name] = read(drawn[: fit.n_queries][:N_BANK])
        fresh_by_source[name] = read(drawn[fit.n_queries :][:N_FRESH])
    test = read([tasks[name].prompt(tasks[name].test[index]) for name, index in keys])
    return queries_by_source, fresh_by_source, test


def share_of_left_out(make_measure, queries, fresh, share) -> float:
    """The mean share of a source task's rows that pass a gate made without that task."""
    passing = []
    for left_out in queries:
        rest = [name for name in queries if name != left_out]
        closeness = make_measure({name: queries[name] for name in rest})
        known = np.concatenate([closeness(fresh[name]) for name in rest])
        passes = closeness(fresh[left_out]) >= np.quantile(known, share)
        passing.append(float(passes.mean()))
    return round(sum(passing) / len(passing), 3)


def leads_of(our_records, plain_records, groups) -> dict[str, dict]:
    """The lead over zero-shot of each group of tasks."""
    return {group: lead(our_records, plain_records, names) for group, names in groups.items()}


def gate_rows(kinds, records_by_key, keys, group_of, groups):
    """One named row for every kind of reading, measure of closeness and share that is shut out."""
    plain = [records_by_key["zero-shot", key] for key in keys]
    queries_by_source, fresh_by_source, test = kinds
    for kind in test:
        queries = {name: read[kind] for name, read in queries_by_source.items()}
        fresh = {name: read[kind] for name, read in fresh_by_source.items()}
        for measure, make_measure in MEASURES.items():
            closeness = make_measure(queries)
            test_closeness = closeness(test[kind])
            known = np.concatenate([closeness(rows) for rows in fresh.values()])
            for share in SHUT_OUT:
                is_inside = test_closeness >= np.quantile(known, share)
                inside = dict(zip(keys, is_inside, strict=True))
                passes = pd.Series(inside).groupby(lambda key: group_of[key[0]]).mean()
                row = {
                    "passes": passes.round(3).to_dict(),
                    "a left-out source passes": share_of_left_out(
                        make_measure, queries, fresh, share
                    ),
                    **leads_of(gated(records_by_key, inside), plain, groups),
                }
                yield f"{kind} | {measure} | {share}", row


def paired_records(folder: Path, without: Path | None):
    """The first seed's records by method and item, and the items that both methods answered.

    Items are a task's name and an index; those of the run `without` are left out.
    """
    records_by_key = {}
    for record in records.read(folder / "records.jsonl"):
        if record.seed == 0:
            records_by_key[record.method, (record.task, record.index)] = record
    seen = set()
    if without is not None:
        for record in records.read(without / "records.jsonl"):
            seen.add((record.task, record.index))
    keys = []
    for method, key in records_by_key:
        if method == "zero-shot" and ("icr", key) in records_by_key and key not in seen:
            keys.append(key)
    return records_by_key, keys


def run(folder: Path, data: str, out: Path, without: Path | None) -> None:
    torch.set_grad_enabled(False)
    out.mkdir(parents=True, exist_ok=True)
    config = load_json(folder / "config.json")
    group_of = {}
    for task in config["tasks"]:
        group_of[task["name"]] = "source" if task["role"] == "source" else task["group"]
    sources = [name for name, group in group_of.items() if group == "source"]
    name = config["model"].removeprefix("pinned:")
    router = InContextRouter.from_pretrained(Path("routers") / name)
    assert router.digest() == config["router"], "the run's router is not the one under routers/"
    records_by_key, keys = paired_records(folder, without)
    model, tokenizer = load_model(config["model"])
    tasks = {name: load_task(name, data) for name in group_of}
    fit = router.description.fit
    first_layer = router.pids.layers[0]
    kinds = read_prompts(tasks, sources, keys, model, tokenizer, fit, first_layer)
    tested = {task for task, _ in keys}
    unseen = [name for name in group_of if name in tested and name not in sources]
    groups = {"source": sources, "unseen": unseen}
    rows = {}
    for name, row in gate_rows(kinds, records_by_key, keys, group_of, groups):
        rows[name] = row
        print(name, row, flush=True)
    always = [records_by_key["icr", key] for key in keys]
    plain = [records_by_key["zero-shot", key] for key in keys]
    rows["no gate"] = leads_of(always, plain, groups)
    content = {
        "command": f"python -m benchmarks.novelty {' '.join(sys.argv[1:])}",
        "commit": commit(),
        "run's commit": config.get("commit"),
        "items": len(keys),
        "bank": N_BANK,
        "fresh": N_FRESH,
        "rows": rows,
    }
    save_json(out / "table.json", content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="a run folder with zero-shot and ICR"
    )
    parser.add_argument(
        "--without",
        type=Path,
        help="a run folder whose items are left out: those that chose the gate",
    )
    parser.add_argument(
        "--data", default="../shared/data", help="where the tasks' rows are, as for `icr`"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/novelty"))
    chosen = parser.parse_args()
    run(chosen.run, chosen.data, chosen.out, chosen.without)
