"""Does a fit's memory grow with the number of prompts?

    python -m benchmarks.memory --out benchmarks/results/memory.json

Each size runs in a process of its own, whose peak is read at the end. A Llama of random weights and
small width (what grows does not depend on them) reads prompts of the demo's tasks. "extraction"
runs the few-shot prompts into moments, "training" runs the trunk of zero-shot queries into its file
and takes 50 steps. The peak is that of anonymous memory, which no disk can take over; the file's
pages come beside it.
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
LAYERS = (4, 5)


def anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+)", status)
    return int(kilobytes) / 1024


class Peak:
    """Samples this process's anonymous memory until it is stopped."""

    def __enter__(self):
        self.start = anonymous_mb()
        self.peak = 0.0
        self._running = True
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


def small_model(n_rows: int):
    """A small random model, its tokenizer and a task of `n_rows` rows, repeated from the demo's."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from icrouting.decoder.loading import folder_of
    from icrouting.tasks.load import load_task

    tokenizer = AutoTokenizer.from_pretrained(folder_of("pinned:smollm2-135m"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).eval()
    task = load_task("agnews", "pinned:staicc")
    n_copies = 1 + n_rows // len(task.train)
    rows = (task.train * n_copies)[:n_rows]
    return model, tokenizer, dataclasses.replace(task, train=rows)


def train(model, tokenizer, task, config, folder: Path) -> None:
    """Keeps the trunk of the task's queries in a file and takes 50 steps; PIDs need few prompts."""
    import torch

    from icrouting.decoder.decoder import Decoder
    from icrouting.decoder.families import dims_of
    from icrouting.fitting.queries import training_queries
    from icrouting.fitting.stages import extract_pids
    from icrouting.fitting.training import Trainer
    from icrouting.routing.features import features_of
    from icrouting.routing.router import Router

    features = features_of(config.encoder, Decoder.of(model, tokenizer), "cpu")
    few_prompts = dataclasses.replace(config, n_prompts=8)
    pids = extract_pids(Decoder.of(model, tokenizer), [task], LAYERS, few_prompts, None)
    queries, _ = training_queries(
        Decoder.of(model, tokenizer), [task], features, LAYERS[0], config, folder
    )
    n_heads = dims_of(model).n_heads
    generator = torch.Generator().manual_seed(0)
    router = Router(features.n_features, len(LAYERS), n_heads, config.rank, 32, generator)
    trainer = Trainer(Decoder.of(model, tokenizer), pids, router, queries, config)
    trainer.n_steps = 50
    trainer.run()


def measure(stage: str, size: int, folder: Path) -> dict[str, float]:
    from icrouting.config import HIDDEN, FitConfig
    from icrouting.decoder.decoder import Decoder
    from icrouting.fitting.stages import extract_pids

    model, tokenizer, task = small_model(max(size, 1000))
    config = FitConfig(n_prompts=size, n_queries=size, rank=4, encoder=HIDDEN, epochs=1)
    started = time.monotonic()
    with Peak() as peak:
        if stage == "extraction":
            extract_pids(Decoder.of(model, tokenizer), [task], LAYERS, config, None)
        else:
            train(model, tokenizer, task, config, folder)
    file = folder / "trunk.bin"
    return {
        "prompts": size,
        "before_mb": round(peak.start),
        "peak_mb": round(peak.peak),
        "trunk_file_mb": round(file.stat().st_size / 2**20) if file.exists() else 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def measured_apart(stage: str, size: int) -> dict[str, float]:
    """What `measure` says in a new process, whose memory holds nothing of another row's."""
    module = [sys.executable, "-m", "benchmarks.memory"]
    command = [*module, "--stage", stage, "--size", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


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
            rows.setdefault(stage, []).append(measured_apart(stage, size))
            print(stage, rows[stage][-1], flush=True)
    ratios = {}
    for stage, (small, large) in rows.items():
        ratios[stage] = round(large["peak_mb"] / small["peak_mb"], 3)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": "python -m benchmarks.memory", "commit": commit()}
    save_json(arguments.out, {**about, "ten_times_the_prompts": ratios, "rows": rows})
    print("ten times the prompts, peak over peak:", ratios)


if __name__ == "__main__":
    main()
