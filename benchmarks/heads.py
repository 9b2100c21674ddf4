"""How far the heads that Function Vectors choose hang on rounding: a run's fit beside the same draws in float32.

    python benchmarks/heads.py --run runs/rivals-in-domain-sources --task trec --seed 0 --data ../shared/data \
        --out runs/heads/float32 --others runs/heads/old/fits/function-vectors-seed0-trec.safetensors

The fit in float32 takes about ten minutes of a core, is kept in `--out`, and can be put into another run's `fits`, to
be asked there. `--others` are further fits of these draws, of earlier versions say. Writes heads.json.
"""

import argparse
import sys
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from icrouting import methods as registry
from icrouting.config import Settings
from icrouting.methods.function_vectors import TOP_HEADS
from icrouting.models import load_model
from icrouting.runs import commit
from icrouting.storage import load_json, load_tensors, save_json
from icrouting.tasks import load_task

NAME = "function-vectors"


def refit(run: Path, task: str, seed: int, data: str, out: Path) -> Path:
    """Returns the file of a fit in float32 with the settings and draws of a run's."""
    config = load_json(run / "config.json")
    settings = Settings(**{name: config[name] for name in vars(Settings()) if name != "router"})
    model, tokenizer = load_model(config["model"], dtype=torch.float32)
    loaded, (method,) = load_task(task, data), registry.make([NAME], settings)
    rng = np.random.default_rng([seed, zlib.crc32(NAME.encode())])
    method.fit(model, tokenizer, [loaded], rng, out / f"{NAME}-seed{seed}.safetensors")
    method.on(loaded)
    return out / f"{NAME}-seed{seed}-{task}.safetensors"


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
    files = [refit(run, task, seed, data, out), run / "fits" / f"{NAME}-seed{seed}-{task}.safetensors", *others]
    names = ["float32", "run", *(f"other {i}" for i in range(1, len(others) + 1))]
    fits = [load_tensors(file)[0] for file in files]
    ranked = [fit["effects"].flatten().sort(descending=True).values for fit in fits]
    gap = {name: round(float(r[TOP_HEADS[0] - 1] - r[TOP_HEADS[0]]), 6) for name, r in zip(names, ranked, strict=True)}
    pairs = {f"{names[i]} and {names[j]}": compared(fits[i], fits[j]) for i, j in combinations(range(len(fits)), 2)}
    found = {"effect of the last head chosen less the next one's": gap, **pairs}
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
