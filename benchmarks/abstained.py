"""How often ELICIT left a prompt alone: answers whose logits are zero-shot's to the bit, by task and seed.

    python benchmarks/abstained.py --run runs/rivals-once --method elicit-once \
        --out benchmarks/results/smollm2-135m-rivals-once/abstained.json
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from icrouting import records
from icrouting.runs import commit
from icrouting.runtime.storage import save_json
from icrouting.summary import BASELINE


def run(folder: Path, method: str, out: Path) -> None:
    found = {record.key: record.option_logits for record in records.read(folder / "records.jsonl")}
    same = defaultdict(list)
    for name, task, seed, index in found:
        if name == method:
            plain = found[BASELINE, task, seed, index]
            same[task, seed].append(found[name, task, seed, index] == plain)
    shares: dict[str, dict[str, str]] = defaultdict(dict)
    for (task, seed), alike in sorted(same.items()):
        shares[task][f"seed {seed}"] = f"{sum(alike)} of {len(alike)}"
    save_json(out, {"command": f"python {' '.join(sys.argv)}", "commit": commit(), "left alone": shares})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--method", default="elicit-once")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    run(given.run, given.method, given.out)
