"""Does a gate on novelty save the unseen tasks? Prompts far from the router's training queries are left unrouted.

    python -m benchmarks.novelty --run runs/smollm2-135m/rivals-once --out benchmarks/results/novelty
    python -m benchmarks.novelty --run runs/smollm2-135m/run --without runs/smollm2-135m/rivals-once --out runs/fresh

Reads a finished run's zero-shot and ICR records, so a gate of strength 0 or 1 is exact without a further pass. What
counts as far is set on rows of the source tasks that the router was not trained on, of which a given share may be
shut out; no label and no test row is read for it. Each source task is also left out of the training queries in
turn: a gate that knows novelty when it sees it lets few of that task's rows pass.
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

from icrouting.decoder.batches import pad_id_of, tokenize
from icrouting.decoder.loading import load_model
from icrouting.decoder.partial import entering_states
from icrouting.evaluation import records
from icrouting.evaluation.runs import commit
from icrouting.icr import InContextRouter
from icrouting.report import metrics
from icrouting.routing.features import features_of
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.load import load_task

N_BANK, N_FRESH, CHUNK = 200, 60, 32
SHUT_OUT = (0.01, 0.05, 0.1, 0.25)


def reader_of(model, tokenizer, encoder: str, first_layer: int):
    """Reads prompts three ways at once: the encoder's vector, the last token's state and the mean state."""
    encode = features_of(encoder, model, tokenizer, "cpu").read

    def read(prompts):
        lists, found = tokenize(tokenizer, prompts), defaultdict(list)
        for start in tqdm(range(0, len(lists), CHUNK), leave=False):
            chunk = lists[start : start + CHUNK]
            states = entering_states(model, chunk, first_layer, pad_id_of(tokenizer))
            found[encoder].append(encode(chunk, states).cpu())
            found["hidden, last token"].append(torch.stack([row[-1].float() for row in states]))
            found["hidden, mean"].append(torch.stack([row.float().mean(0) for row in states]))
        return {kind: torch.cat(parts) for kind, parts in found.items()}

    return read


def nearest(bank):
    """Minus the distance to the nearest training query, after the bank's mean and deviations are taken out."""
    whole = torch.cat(list(bank.values()))
    mean, std = whole.mean(0), whole.std(0).clamp_min(1e-6)
    return lambda rows: (
        -torch.cdist((rows - mean) / std, (whole - mean) / std).min(1).values.numpy()
    )


def gaussian(bank):
    """Minus the Mahalanobis distance to the nearest source task, its covariance shrunk a tenth towards a ball."""
    fitted = []
    for rows in bank.values():
        cov = torch.cov(rows.double().T)
        ball = torch.eye(len(cov), dtype=cov.dtype) * cov.trace() / len(cov)
        fitted.append((rows.double().mean(0), torch.linalg.inv(0.9 * cov + 0.1 * ball)))

    def closeness(rows):
        gaps = [rows.double() - mean for mean, _ in fitted]
        distances = [
            ((gap @ inverse) * gap).sum(1) for gap, (_, inverse) in zip(gaps, fitted, strict=True)
        ]
        return -torch.stack(distances).min(0).values.numpy()

    return closeness


MEASURES = {"nearest query": nearest, "nearest task": gaussian}


def gated(found, inside):
    """ICR's records inside the gate, zero-shot's beyond, all called "gated"."""
    chosen = [
        found["icr", key] if is_in else found["zero-shot", key] for key, is_in in inside.items()
    ]
    return [dataclasses.replace(record, method="gated") for record in chosen]


def gain(kept, plain, tasks) -> dict[str, object]:
    """The mean paired gain over tasks in points, its interval and seeds, and how many lose significantly (Holm)."""
    lines, p_values, by_seed = [], {}, []
    for task in tasks:
        own, base = (metrics.frame(r for r in side if r.task == task) for side in (kept, plain))
        found = metrics.difference(own, base)
        lines.append({"gain": found.value, "gain_low": found.low, "gain_high": found.high})
        p_values[task] = metrics.mcnemar(own, base)
        by_seed.append(metrics.paired(own, base).groupby("seed").change.mean())
    corrected = metrics.holm(pd.Series(p_values))
    n_lost = sum(line["gain"] < 0 and p < 0.05 for line, p in zip(lines, corrected, strict=True))
    mean = metrics.mean(pd.DataFrame(lines), "gain")
    found = {name: round(100 * getattr(mean, name), 1) for name in ("value", "low", "high")}
    if len(seeds := pd.concat(by_seed, axis=1).dropna().mean(axis=1)) > 1:
        found["by seed"] = [round(100 * gain, 1) for gain in seeds]
    return {**found, "significantly below": n_lost}


def run(folder: Path, data: str, out: Path, without: Path | None) -> None:
    torch.set_grad_enabled(False)
    out.mkdir(parents=True, exist_ok=True)
    config = load_json(folder / "config.json")
    groups = {
        task["name"]: "source" if task["role"] == "source" else task["group"]
        for task in config["tasks"]
    }
    sources = [name for name, group in groups.items() if group == "source"]
    router = InContextRouter.from_pretrained(
        Path("routers") / config["model"].removeprefix("pinned:")
    )
    assert router.digest() == config["router"], "the run's router is not the one under routers/"
    fit, (model, tokenizer) = router.description.fit, load_model(config["model"])
    read = reader_of(model, tokenizer, fit.encoder, router.pids.layers[0])
    tasks = {name: load_task(name, data) for name in groups}
    found = {
        (r.method, (r.task, r.index)): r
        for r in records.read(folder / "records.jsonl")
        if r.seed == 0
    }
    seen = (
        {(record.task, record.index) for record in records.read(without / "records.jsonl")}
        if without
        else set()
    )
    keys = [
        key
        for method, key in found
        if method == "zero-shot" and ("icr", key) in found and key not in seen
    ]
    rng, bank, fresh = np.random.default_rng(fit.seed + 1), {}, {}
    for (
        name
    ) in sources:  # the draw of the fit: its queries come first, what follows is new to the router
        task = tasks[name]
        drawn = [task.prompt(task.train[index]) for index in rng.permutation(len(task.train))]
        queries, others = drawn[: fit.n_queries], drawn[fit.n_queries :]
        bank[name], fresh[name] = read(queries[:N_BANK]), read(others[:N_FRESH])
    test = read([tasks[name].prompt(tasks[name].test[index]) for name, index in keys])
    plain, rows = [found["zero-shot", key] for key in keys], {}
    there = [name for name in groups if any(task == name for task, _ in keys)]
    by_group = {"source": sources, "unseen": [name for name in there if name not in sources]}
    for kind in test:
        for measure, make in MEASURES.items():
            banks = {name: bank[name][kind] for name in sources}
            closeness = make(banks)
            near, known = (
                closeness(test[kind]),
                np.concatenate([closeness(fresh[name][kind]) for name in sources]),
            )
            for share in SHUT_OUT:
                limit = np.quantile(known, share)
                inside = dict(zip(keys, near >= limit, strict=True))
                kept = gated(found, inside)
                passes = (
                    pd.Series(inside).groupby(lambda key: groups[key[0]]).mean().round(3).to_dict()
                )
                alone = []
                for left in sources:
                    rest = make({name: rows for name, rows in banks.items() if name != left})
                    own = np.concatenate(
                        [rest(fresh[name][kind]) for name in sources if name != left]
                    )
                    alone.append(float((rest(fresh[left][kind]) >= np.quantile(own, share)).mean()))
                rows[f"{kind} | {measure} | {share}"] = {
                    "passes": passes,
                    "a left-out source passes": round(sum(alone) / len(alone), 3),
                    **{group: gain(kept, plain, names) for group, names in by_group.items()},
                }
                print(
                    f"{kind} | {measure} | {share}",
                    rows[f"{kind} | {measure} | {share}"],
                    flush=True,
                )
    always = [found["icr", key] for key in keys]
    rows["no gate"] = {group: gain(always, plain, names) for group, names in by_group.items()}
    about = {
        "command": f"python {' '.join(sys.argv)}",
        "commit": commit(),
        "run's commit": config.get("commit"),
    }
    save_json(
        out / "table.json",
        {**about, "items": len(keys), "bank": N_BANK, "fresh": N_FRESH, "rows": rows},
    )


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
