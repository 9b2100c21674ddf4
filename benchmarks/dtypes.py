"""What bfloat16 saves on a processor that multiplies it.

SmolLM2-135M in float32 and in bfloat16 takes turns:

    OMP_NUM_THREADS=1 python -m benchmarks.dtypes

Processor time of one thread, which other work on the machine does not lengthen. "descent" is a
scoring pass with its gradient at the embeddings, as soft prompts are trained.
"""

from functools import partial
from pathlib import Path

import torch

from benchmarks.speed_turns import Rows, Stopwatch
from icrouting.decoder.batches import Batch, pad
from icrouting.decoder.loading import load_model
from icrouting.decoder.passes import last_position_only, next_token_logits

OUT = Path(__file__).parent / "results" / "speed" / "dtypes.json"
SHAPES = {"scoring": ((1, 64), (8, 64), (4, 256), (1, 1024)), "descent": ((2, 64), (4, 128))}
MODELS = {
    dtype: load_model("pinned:smollm2-135m", dtype=getattr(torch, dtype))[0]
    for dtype in ("bfloat16", "float32")
}


@torch.no_grad()
def score(dtype: str, batch: Batch) -> None:
    """A scoring pass."""
    next_token_logits(MODELS[dtype], batch)


def descend(dtype: str, batch: Batch) -> None:
    """A scoring pass and its gradient at the embeddings."""
    model = MODELS[dtype]
    embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    mask = batch.attention_mask
    with last_position_only(model, mask):
        output = model(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False)
    # Any loss that hangs on all logits will do: its value is not read.
    output.logits.float().logsumexp(-1).sum().backward()


def main() -> None:
    torch.set_num_threads(1)
    processor = torch.cpu.get_capabilities()
    native = [name for name in ("amx_bf16", "avx512_bf16") if processor.get(name)]
    about = {
        "model": "pinned:smollm2-135m",
        "dtype": "both",
        "processor": [processor.get("cpu_name"), *native],
    }
    rows = Rows(OUT, Stopwatch(clock="cpu", turns=11, seconds=60), about)
    for part, call in (("scoring", score), ("descent", descend)):
        for n_rows, length in SHAPES[part]:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(100, 40_000, (n_rows, length), generator=generator)
            batch = pad(tokens.tolist(), 0)
            calls = {dtype: partial(call, dtype, batch) for dtype in MODELS}
            rows.measure(part, f"{n_rows} x {length} tokens", calls)


if __name__ == "__main__":
    main()
