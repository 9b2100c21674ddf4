"""How far the heads that Function Vectors choose hang on rounding: a run's fit beside the same draws in float32.

    python benchmarks/heads.py --run runs/rivals-in-domain-sources --task trec --seed 0 --data ../shared/data \
        --out runs/heads/float32 --others runs/heads/old runs/heads/float32-asked

The fit in float32 takes about ten minutes of a core and is kept in `--out`'s `fits`, which must hold no other; put into
another run's `fits`, it can be asked there. `--others` are further runs with a fit of these draws: an earlier commit's,
or the one in float32, asked in bfloat16. Writes heads.json, with each run's accuracy on the task.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from icrouting import methods as registry
from icrouting import records
from icrouting.config import Settings
from icrouting.decoder.identity import check_fitted_on
from icrouting.decoder.loading import load_model
from icrouting.evaluate import Evaluation
from icrouting.methods.function_vectors import TOP_HEADS
from icrouting.runs import commit
from icrouting.runtime.storage import load_json, load_tensors, save_json, save_tensors
from icrouting.tasks.load import load_task

NAME = "function-vectors"


def refit(run: Path, task: str, seed: int, data: str, out: Path) -> Path:
    """Returns the file of a fit in float32 with the settings and draws of a run's."""
    config, file = load_json(run / "config.json"), out / "fits" / f"{NAME}-seed{seed}-{task}.safetensors"
    if file.exists() and load_tensors(file)[1].get("dtype") != "float32":
        raise SystemExit(f"{file} is another fit: choose another folder with --out")
    settings = Settings(**{name: config[name] for name in vars(Settings()) if name != "router"})
    model, tokenizer = load_model(config["model"], dtype=torch.float32)
    check_fitted_on(model, str(run), config["model"], config["fingerprint"])
    loaded, (method,) = load_task(task, data), registry.make([NAME], settings)
    Evaluation(model, tokenizer, [method], [loaded], out / "records.jsonl", out / "fits").fit(seed)
    method.on(loaded)
    tensors, notes = load_tensors(file)
    save_tensors(file, tensors, {**notes, "dtype": "float32"})
    return file


def asked(run: Path, task: str, seed: int) -> dict[str, object]:
    """Returns how many percent of a task's items a run's fit is right on, and where that was found."""
    config, found = load_json(run / "config.json"), records.read(run / "records.jsonl")
    right = [r.label == r.prediction for r in found if (r.method, r.task, r.seed) == (NAME, task, seed)]
    accuracy = round(100 * sum(right) / len(right), 1)
    return {"accuracy": accuracy, "items": len(right), "dtype": config["dtype"], "begun at commit": config["commit"]}


def compared(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Returns how many of the first heads two fits have in common, and how alike their effects and vectors are."""
    effects = [fit["effects"].flatten() for fit in (one, other)]
    tops = [set(each.argsort(descending=True, stable=True)[: TOP_HEADS[0]].tolist()) for each in effects]
    return {
        "prompts answered otherwise": int((one["right"] != other["right"]).sum()),
        f"heads in common of {TOP_HEADS[0]}": len(tops[0] & tops[1]),
        "correlation of effects": round(float(torch.stack(effects).corrcoef()[0, 1]), 3),
        "mean difference of effects": round(float((effects[0] - effects[1]).abs().mean()), 6),
        "cosine of vectors": round(float(torch.cosine_similarity(one["vector"], other["vector"], dim=0)), 3),
    }


def main(run: Path, task: str, seed: int, data: str, out: Path, others: list[Path]) -> None:
    runs = {each.name: each for each in (run, *others)}
    kept = [each / "fits" / f"{NAME}-seed{seed}-{task}.safetensors" for each in runs.values()]
    files, names = [refit(run, task, seed, data, out), *kept], ["float32", *runs]
    fits = [load_tensors(file)[0] for file in files]
    ranked = [fit["effects"].flatten().sort(descending=True).values for fit in fits]
    gap = {name: round(float(r[TOP_HEADS[0] - 1] - r[TOP_HEADS[0]]), 6) for name, r in zip(names, ranked, strict=True)}
    pairs = {f"{names[i]} and {names[j]}": compared(fits[i], fits[j]) for i, j in combinations(range(len(fits)), 2)}
    found = {"effect of the last head chosen less the next one's": gap, **pairs}
    found |= {f"{name}, asked": asked(each, task, seed) for name, each in runs.items()}
    save_json(out / "heads.json", {"command": f"python {' '.join(sys.argv)}", "commit": commit(), "found": found})
    for name, values in found.items():
        print(f"{name}: {values}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--others", type=Path, nargs="*", default=[])
    main(**vars(parser.parse_args()))
