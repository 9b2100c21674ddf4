"""What does routing cost, and what does keeping the trunk save? Every figure is a ratio of two turns in one run.

    python benchmarks/speed.py --out benchmarks/results/speed.json

On SmolLM2-135M with a router of the default shape. For each prompt length the plain and the routed scoring pass
take turns; the routed pass is timed with its routing given (the attention alone) and as a user calls it (the
router on top, reading a sentence encoder or the backbone's own hidden state). Training is timed per epoch with the
trunk kept and without.
"""

import argparse
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from icrouting.attach import attach
from icrouting.batches import pad
from icrouting.config import HIDDEN, FitConfig
from icrouting.families import dims_of, late_third
from icrouting.features import Reader, features_of
from icrouting.models import load_model
from icrouting.pids import PIDs
from icrouting.routed import rerouted
from icrouting.router import Router
from icrouting.runs import commit
from icrouting.scoring import next_token_logits
from icrouting.storage import save_json
from icrouting.train import Query, Trainer
from icrouting.trunk import late_entry, run_trunk

RANK = 8
SHAPES = ((8, 64), (8, 256), (2, 1024))


def in_turns(first, second, n_turns):
    """Median, smallest and largest of second / first, each pair measured back to back."""
    ratios, base = [], []
    for turn in range(n_turns + 1):
        seconds = []
        for call in (first, second):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        if turn:  # the first turn warms up
            ratios.append(seconds[1] / seconds[0])
            base.append(seconds[0])
    ratios.sort()
    return {
        "ratio": round(ratios[len(ratios) // 2], 3),
        "low": round(ratios[0], 3),
        "high": round(ratios[-1], 3),
        "first_seconds": round(sorted(base)[len(base) // 2], 4),
        "turns": n_turns,
    }


def random_pids(model, layers):
    dims, generator = dims_of(model), torch.Generator().manual_seed(0)
    query, key = (
        torch.linalg.qr(torch.randn(len(layers), width, RANK, generator=generator)).Q
        for width in (dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim)
    )
    return PIDs(layers, query, key, *(torch.full((len(layers), RANK), 5.0) for _ in range(4)), "whitened")


def reader_of(model, tokenizer, encoder, layers):
    features = features_of(encoder, model, tokenizer, "cpu")
    generator, n_heads = torch.Generator().manual_seed(0), dims_of(model).n_heads
    router = Router(features.n_features, len(layers), n_heads, RANK, 256, generator)
    torch.nn.init.normal_(router.alpha[-1].weight, std=0.01, generator=generator)  # untrained, it would add nothing
    return Reader(model, tokenizer, features, router.requires_grad_(False), layers[0], 1.0)


def scoring(model, tokenizer, pids, n_turns):
    rows = {}
    readers = {name: reader_of(model, tokenizer, name, pids.layers) for name in ("pinned:minilm", HIDDEN)}
    for batch_size, length in SHAPES:
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(100, 40000, (batch_size, length), generator=generator).tolist()
        batch = pad(tokens, 0)
        routing = readers[HIDDEN].router(torch.randn(batch_size, model.config.hidden_size, generator=generator))

        @contextmanager
        def given(routing=routing):
            with attach(model, pids) as attachment:
                attachment.routing = routing
                yield

        def plain(batch=batch):
            next_token_logits(model, batch)

        def with_routing_given(batch=batch, given=given):
            with given():
                next_token_logits(model, batch)

        name = f"{batch_size} x {length} tokens"
        rows[f"routed attention / plain, {name}"] = in_turns(plain, with_routing_given, n_turns)
        for encoder, reader in readers.items():

            def as_called(batch=batch, reader=reader):
                with rerouted(reader, pids):
                    next_token_logits(model, batch)

            rows[f"routed as called, reading {encoder} / plain, {name}"] = in_turns(plain, as_called, n_turns)
    return rows


class WholePass:
    """Stands in for a late entry: runs every layer, as training without a kept trunk would."""

    def __init__(self, model):
        self.model = model

    def next_token_logits(self, batch, hidden):
        return next_token_logits(self.model, batch)


def training(model, pids, n_features, n_turns):
    """Seconds per epoch on 64 queries of 60 tokens: whole passes against the kept trunk."""
    dims, generator = dims_of(model), torch.Generator().manual_seed(1)
    lists = torch.randint(100, 40000, (64, 60), generator=generator).tolist()
    states = run_trunk(model, lists, pids.layers[0], 0)
    queries = [Query(s, torch.randn(n_features, generator=generator), [11, 12], 0) for s in states]
    config = FitConfig(epochs=1)

    def epoch(entry_of):
        def run():
            router = Router(n_features, len(pids.layers), dims.n_heads, RANK, 256, generator)
            trainer = Trainer(model, pids, router, queries, config, 0)
            with attach(model, pids) as attachment, entry_of() as entry:
                for _ in range(trainer.n_steps):
                    rows = trainer._rows()
                    trainer._update(trainer._terms(entry, attachment, [queries[row] for row in rows]))

        return run

    @contextmanager
    def whole():
        yield WholePass(model)

    kept = epoch(lambda: late_entry(model, pids.layers[0]))
    return {"epoch without the trunk kept / with": in_turns(kept, epoch(whole), n_turns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/speed.json"))
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    model, tokenizer = load_model("pinned:smollm2-135m")
    layers = late_third(model.config.num_hidden_layers)
    pids = random_pids(model, layers)
    with torch.no_grad():
        rows = scoring(model, tokenizer, pids, arguments.turns)
    rows |= training(model, pids, model.config.hidden_size, 3)
    about = {"commit": commit(), "dtype": str(model.dtype), "threads": torch.get_num_threads(), "layers": len(layers)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_json(arguments.out, {"command": "python benchmarks/speed.py", **about, "rows": rows})
    width = max(map(len, rows))
    for name, row in rows.items():
        print(f"{name:{width}}  {row['ratio']:.3f}  ({row['low']:.3f} to {row['high']:.3f}, {row['turns']} turns)")


if __name__ == "__main__":
    main()
