"""Extraction: few-shot prompts of the source tasks, pooled into moments (stage 1)."""

import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.fitting.capture import capture_last_tokens
from icrouting.fitting.pca import QKMoments, fit_pids
from icrouting.routing.pids import PIDs
from icrouting.runtime.processes import decided, here, total
from icrouting.runtime.progress import track
from icrouting.runtime.storage import load_tensors, save_tensors
from icrouting.tasks.prompts import extraction_prompts
from icrouting.tasks.task import Task

SAVE_EVERY_SECONDS = 20.0


BLOCK = 32  # prompts; what a process takes at a time, and batches by length


HELD = 64  # batches; the moments of a wide model are gigabytes, and slower to add to than a batch is to run


def extract(
    decoder: Decoder,
    tasks: Sequence[Task],
    layers: tuple[int, ...],
    config: FitConfig,
    folder: Path | None,
) -> PIDs:
    """Returns the PIDs of few-shot prompts of all source tasks, pooled (stages 1 and 2).

    Processes take blocks of prompts in turn. What all of them saw is kept at the end of a round, so that any number
    of processes can go on from there; the memory taken does not depend on the number of prompts.
    """
    rng, shape = np.random.default_rng(config.seed), (config.n_prompts, config.demos_per_class)
    prompts = (
        p
        for task in tasks
        for p in extraction_prompts(task, *shape, rng, config.queries_per_context)
    )
    n_prompts = sum(min(config.n_prompts, len(task.train)) for task in tasks)
    dims, place, n_done = decoder.dims, here(), 0
    moments = QKMoments(len(layers), dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim)
    kept = folder / "moments.safetensors" if folder else None
    if kept is not None and kept.exists():
        tensors, metadata = load_tensors(kept)
        n_done = int(metadata["n_done"])
        moments = QKMoments.from_tensors(tensors) if place.is_main_process else moments
    due, blocks, held = (
        time.monotonic() + SAVE_EVERY_SECONDS,
        list(range(n_done, n_prompts, BLOCK)),
        [],
    )
    sizes = [min(BLOCK, n_prompts - start) for start in blocks]
    deque(islice(prompts, n_done), maxlen=0)
    for number, start in enumerate(track(blocks, "extraction", sizes, "prompts", n_done)):
        block, turn = list(islice(prompts, BLOCK)), number % place.num_processes
        if turn == place.process_index:
            held += capture_last_tokens(decoder, block, layers, skip_nan=config.skip_nan)
        is_last = start == blocks[-1]
        is_due = turn == place.num_processes - 1 and decided(time.monotonic() > due)
        if held and (is_due or is_last or len(held) >= HELD):
            moments.update(*(torch.cat(side, dim=1) for side in zip(*held, strict=True)))
            held.clear()
        if kept is not None and (is_due or is_last):
            begun, whole = time.monotonic(), _summed(moments)
            if place.is_main_process:
                save_tensors(kept, whole, {"n_done": str(start + len(block))})
            # Moments of a wide model are gigabytes: writing them takes a twentieth of the time at most.
            due = time.monotonic() + max(SAVE_EVERY_SECONDS, 20 * (time.monotonic() - begun))
    moments = QKMoments.from_tensors(_summed(moments))
    return fit_pids(
        moments, layers, config.rank, config.basis, torch.Generator().manual_seed(config.seed)
    )


def _summed(moments: QKMoments) -> dict[str, Tensor]:
    """What all processes saw; by name, since one that was read from a file has its tensors in another order."""
    tensors = moments.tensors()
    return {name: total(tensors[name]) for name in sorted(tensors)}
