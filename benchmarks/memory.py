"""Does a fit's memory grow with the number of prompts? Each size is a process of its own; its peak is read at the end.

    python benchmarks/memory.py --out benchmarks/results/memory.json

A Llama of random weights and small width (what grows does not depend on them) reads prompts of the demo's tasks.
"extraction" runs the few-shot prompts into moments, "training" runs the trunk of zero-shot queries into its file and
takes 50 steps. The peak is that of anonymous memory, which no disk can take over; the file's pages come beside it.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STAGES = {"extraction": (40, 400), "training": (2_500, 25_000)}


def anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status).group(1)) / 1024


class Peak:
    """Samples this process's anonymous memory until it is stopped."""

    def __enter__(self):
        self.start, self.peak, self._running = anonymous_mb(), 0.0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while self._running:
            self.peak = max(self.peak, anonymous_mb())
            time.sleep(0.005)

    def __exit__(self, *_):
        self._running = False
        self._thread.join()


def world(n_rows):
    """A small random model, its tokenizer and a task of as many rows as asked, repeated from the demo's."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from icrouting.decoder.loading import folder_of
    from icrouting.tasks.load import load_task

    tokenizer = AutoTokenizer.from_pretrained(folder_of("pinned:smollm2-135m"))
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **shape, max_position_embeddings=4096)
    ).eval()
    task = load_task("agnews", "pinned:staicc")
    rows = (task.train * (1 + n_rows // len(task.train)))[:n_rows]
    return model, tokenizer, dataclasses.replace(task, train=rows)


def measure(stage: str, size: int, folder: Path) -> dict[str, float]:
    import torch

    from icrouting.config import HIDDEN, FitConfig
    from icrouting.decoder.decoder import Decoder
    from icrouting.decoder.families import dims_of
    from icrouting.fitting.queries import training_queries
    from icrouting.fitting.stages import extract_pids
    from icrouting.fitting.training import Trainer
    from icrouting.routing.features import features_of
    from icrouting.routing.router import Router

    model, tokenizer, task = world(max(size, 1000))
    config = FitConfig(n_prompts=size, n_queries=size, rank=4, encoder=HIDDEN, epochs=1)
    features, layers, started = (
        features_of(HIDDEN, Decoder.of(model, tokenizer), "cpu"),
        (4, 5),
        time.monotonic(),
    )
    with Peak() as peak:
        if stage == "extraction":
            extract_pids(Decoder.of(model, tokenizer), [task], layers, config, None)
        else:
            few = dataclasses.replace(config, n_prompts=8)
            pids = extract_pids(Decoder.of(model, tokenizer), [task], layers, few, None)
            queries, _ = training_queries(
                Decoder.of(model, tokenizer), [task], features, 4, config, folder
            )
            router = Router(
                features.n_features,
                2,
                dims_of(model).n_heads,
                4,
                32,
                torch.Generator().manual_seed(0),
            )
            trainer = Trainer(Decoder.of(model, tokenizer), pids, router, queries, config)
            trainer.n_steps = 50
            trainer.run()
    file = folder / "trunk.bin"
    return {
        "prompts": size,
        "before_mb": round(peak.start),
        "peak_mb": round(peak.peak),
        "trunk_file_mb": round(file.stat().st_size / 2**20) if file.exists() else 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    from icrouting.evaluation.runs import commit
    from icrouting.runtime.storage import save_json

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/memory.json"))
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--size", type=int)
    arguments = parser.parse_args()
    if arguments.stage:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.stage, arguments.size, Path(folder))))
        return
    rows = {}
    for stage, sizes in STAGES.items():
        for size in sizes:
            command = [sys.executable, __file__, "--stage", stage, "--size", str(size)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.setdefault(stage, []).append(json.loads(said.splitlines()[-1]))
            print(stage, rows[stage][-1], flush=True)
    ratios = {
        stage: round(large["peak_mb"] / small["peak_mb"], 3)
        for stage, (small, large) in rows.items()
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": "python benchmarks/memory.py", "commit": commit()}
    save_json(arguments.out, {**about, "ten_times_the_prompts": ratios, "rows": rows})
    print("ten times the prompts, peak over peak:", ratios)


if __name__ == "__main__":
    main()
