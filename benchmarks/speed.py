"""What does routing cost, and what does it save? Every figure is a ratio of calls that take turns.

    python -m benchmarks.speed --out benchmarks/results/speed/smollm2-135m.json

Killed and started again with the same --out, it goes on with the row it was at. It runs where the
model does: with `--model random:llama-2-7b` and an accelerator on random weights of that shape,
which cost what real ones cost.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import speed_fit, speed_passes
from benchmarks.speed_passes import RANK, World
from benchmarks.speed_turns import Rows, Stopwatch, draw
from icrouting.decoder.families import dims_of
from icrouting.decoder.loading import load_model
from icrouting.routing.pids import PIDs, late_third
from icrouting.tasks.load import load_task

PARTS = {
    "scoring": speed_passes.scoring,
    "decoding": speed_passes.decoding,
    "training": speed_fit.training,
    "few-shot": speed_passes.demonstrations,
    "extraction": speed_fit.extraction,
    "dense": speed_passes.dense,
    "reading": speed_passes.reading,
    "loading": speed_fit.loading,
}


def model_of(name: str):
    """The model and its tokenizer; a random one borrows the demo's, and so its number of tokens."""
    if name != "random:llama-2-7b":
        return load_model(name)
    _, tokenizer = load_model("pinned:smollm2-135m", device="cpu")
    has_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if has_cuda else torch.float32
    # A LlamaConfig's own defaults are the shape of Llama-2-7B.
    config = LlamaConfig(vocab_size=len(tokenizer))
    with torch.device("cuda" if has_cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval(), tokenizer


def random_pids(model, layers: tuple[int, ...]) -> PIDs:
    dims = dims_of(model)
    generator = torch.Generator().manual_seed(0)

    def orthonormal(width: int) -> torch.Tensor:
        columns = torch.randn(len(layers), width, RANK, generator=generator)
        return torch.linalg.qr(columns).Q

    query = orthonormal(dims.n_heads * dims.head_dim)
    key = orthonormal(dims.n_kv_heads * dims.head_dim)
    ones = torch.ones(len(layers), RANK)
    return PIDs(layers, query, key, 5 * ones, 5 * ones, 1 * ones, 1 * ones, "whitened")


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="pinned:smollm2-135m", help='for load_model, or "random:llama-2-7b"'
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--out", type=Path, required=True, help="a JSON file; the picture goes beside it"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 256, 1024, 2048], help="tokens"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="rows")
    parser.add_argument(
        "--max-tokens", type=int, default=65536, help="of a pass; larger batches are cut"
    )
    parser.add_argument(
        "--items", type=int, default=4, help="test items per task in few-shot and extraction"
    )
    parser.add_argument("--tasks", nargs="+", default=["agnews", "sst2", "trec"])
    parser.add_argument(
        "--data", default="pinned:staicc", help="where the tasks' rows are, as for `icr`"
    )
    parser.add_argument("--encoder", default="pinned:minilm")
    parser.add_argument("--turns", type=int, default=15, help="at most, per row")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="per row; three turns are taken in any case"
    )
    parser.add_argument(
        "--clock", choices=["cpu", "wall"], default="wall", help="cpu: of this process alone"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parser_of_options().parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    model, tokenizer = model_of(chosen.model)
    layers = late_third(dims_of(model).n_layers)
    name = Path(chosen.model).name.removeprefix("pinned:")
    about = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(layers),
        "rank": RANK,
    }
    rows = Rows(chosen.out, Stopwatch(chosen.clock, chosen.turns, chosen.seconds), about)
    world = World(
        model=model,
        tokenizer=tokenizer,
        pids=random_pids(model, layers),
        encoder=chosen.encoder,
        tasks=[load_task(task, chosen.data) for task in chosen.tasks],
        rows=rows,
        lengths=chosen.lengths,
        batches=chosen.batches,
        max_tokens=chosen.max_tokens,
        n_items=chosen.items,
    )
    for part in chosen.parts:
        if part != "loading":
            PARTS[part](world)
        # Random weights are made, not loaded.
        elif not chosen.model.startswith("random:"):
            speed_fit.loading(world, chosen.model)
    draw(rows.content, chosen.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
