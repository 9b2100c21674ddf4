"""Extraction: few-shot prompts of the source tasks, pooled into moments (stage 1)."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from icrouting.config import FitConfig
from icrouting.decoder.batches import fits, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.sites import Dims
from icrouting.fitting.capture import capture_last_tokens
from icrouting.fitting.drawing import drawn_prompts
from icrouting.fitting.lengths import none_fits
from icrouting.fitting.pca import QKMoments
from icrouting.fitting.rows import n_extracted
from icrouting.runtime.processes import decided, here, is_first, total
from icrouting.runtime.progress import track
from icrouting.runtime.storage import load_tensors, save_tensors
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import Task

log = logging.getLogger(__name__)

MOMENTS_FILE = "moments.safetensors"
SAVE_EVERY_SECONDS = 20.0
# The first time earlier: who stops a slow fit early is not to lose all of it.
FIRST_SAVE_SECONDS = 4.0
# Moments of a wide model are gigabytes: writing them takes a twentieth of the time at most.
SAVING_SHARE = 1 / 20
# Prompts; what a process takes at a time, and batches by length.
BLOCK = 32
# Batches; the moments of a wide model are slower to add to than a batch is to run.
HELD = 64
# Rows that are named where several are too long.
MOST_NAMED = 3


class Extraction:
    """What has been seen of the prompts so far; it can be saved and taken up again.

    Every process has one. The moments are those of the prompts that this process ran; the first
    process's include what an earlier run saved. The memory taken does not depend on the number of
    prompts.

    Attributes:
        moments: what this process has seen, without the batches that are held back.
        n_done: prompts that were handed out; at the end of a round all of them are run.
        file: where to save; None saves nothing.
    """

    def __init__(self, n_layers: int, dims: Dims, file: Path | None):
        query_width = dims.n_heads * dims.head_dim
        key_width = dims.n_kv_heads * dims.head_dim
        self.moments = QKMoments(n_layers, query_width, key_width)
        self.n_done = 0
        self.file = file
        self._held_back: list[tuple[Tensor, Tensor]] = []
        self._wait_to_save(FIRST_SAVE_SECONDS)

    def load(self) -> None:
        """Takes up what an earlier run saved, if there is anything."""
        if self.file is None or not self.file.exists():
            return
        tensors, metadata = load_tensors(self.file)
        self.n_done = int(metadata["n_done"])
        # The file holds what all processes saw, so that it counts once: in the first one's sums.
        if is_first():
            self.moments = QKMoments.from_tensors(tensors)
        self._wait_to_save(FIRST_SAVE_SECONDS)

    def add(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Adds the queries and keys of a block of prompts; up to HELD batches are held back."""
        self._held_back.extend(batches)
        if len(self._held_back) >= HELD:
            self._add_held_back()

    def is_due(self) -> bool:
        """Whether the first process's clock says to save; all processes ask together."""
        return decided(time.monotonic() > self._due)

    def save(self) -> None:
        """Writes what all processes saw; all of them save together."""
        self._add_held_back()
        if self.file is None:
            self._wait_to_save(SAVE_EVERY_SECONDS)
            return
        started = time.monotonic()
        state = _summed(self.moments)
        if is_first():
            save_tensors(self.file, state, {"n_done": str(self.n_done)})
        seconds_saving = time.monotonic() - started
        self._wait_to_save(max(SAVE_EVERY_SECONDS, seconds_saving / SAVING_SHARE))

    def whole(self) -> QKMoments:
        """Returns the moments of all processes together."""
        self._add_held_back()
        return QKMoments.from_tensors(_summed(self.moments))

    def _add_held_back(self) -> None:
        if not self._held_back:
            return
        queries = [query for query, _ in self._held_back]
        keys = [key for _, key in self._held_back]
        self.moments.update(torch.cat(queries, dim=1), torch.cat(keys, dim=1))
        self._held_back.clear()

    def _wait_to_save(self, seconds: float) -> None:
        self._due = time.monotonic() + seconds


def extract(
    decoder: Decoder,
    tasks: Sequence[Task],
    layers: tuple[int, ...],
    config: FitConfig,
    folder: Path | None,
) -> QKMoments:
    """Returns the moments of few-shot prompts of all source tasks, pooled (stage 1).

    What other prompts they are of, `config.extract_from` says.
    Processes take blocks of prompts in turn. What all of them saw is kept at the end of a round, so
    that any number of processes can go on from there. Prompts that are longer than the model's
    context are left out, with a warning that names the rows that make them so.

    Raises:
        ValueError: all prompts of a task are longer than the model's context.
    """
    file = folder / MOMENTS_FILE if folder is not None else None
    extraction = Extraction(len(layers), decoder.dims, file)
    extraction.load()
    prompts = _drawn(decoder, tasks, config)
    # What an earlier run is through with is drawn too, for the draws behind it to be the same.
    for _ in islice(prompts, extraction.n_done):
        pass
    # At most: where some are left out, the last blocks are empty.
    n_prompts = n_extracted(tasks, config)
    starts = range(extraction.n_done, n_prompts, BLOCK)
    sizes = [min(BLOCK, n_prompts - start) for start in starts]
    processes = here()
    blocks = track(starts, "extraction", sizes, "prompts", done=extraction.n_done)
    for number, start in enumerate(blocks):
        # Every process draws every block, so that the draws are one process's, and runs its own.
        block = list(islice(prompts, BLOCK))
        turn = number % processes.num_processes
        if turn == processes.process_index:
            extraction.add(
                capture_last_tokens(
                    decoder, block, layers, skip_nan=config.skip_nan, pooling=config.pooling
                )
            )
        extraction.n_done += len(block)
        is_last = start == starts[-1]
        # Only then has every process run what `n_done` counts.
        is_round_over = turn == processes.num_processes - 1
        if is_last or (is_round_over and extraction.is_due()):
            extraction.save()
    return extraction.whole()


def _drawn(decoder: Decoder, tasks: Sequence[Task], config: FitConfig) -> Iterator[Prompt]:
    """Yields the prompts of one task after the other, all drawn from one generator.

    Those that are longer than the model's context are drawn, and left out.
    """
    rng = np.random.default_rng(config.seed)
    limit = decoder.context_length
    for task in tasks:
        n_drawn = 0
        long_prompts: list[Prompt] = []
        for prompt in drawn_prompts(task, config, rng, config.n_prompts):
            n_drawn += 1
            if limit is None or fits(decoder.tokenizer, prompt.text, limit):
                yield prompt
            else:
                long_prompts.append(prompt)
        if limit is None or not long_prompts:
            continue
        if len(long_prompts) == n_drawn:
            raise none_fits(task, limit, config)
        if is_first():
            log.warning(
                "left out: %d of %d %s prompts of %r, as longer than the model's context of "
                "%d tokens; the longest row of each: %s",
                *(len(long_prompts), n_drawn, config.extract_from, task.name, limit),
                _longest_rows(decoder, task, long_prompts),
            )


def _longest_rows(decoder: Decoder, task: Task, prompts: Sequence[Prompt]) -> str:
    """Returns the training rows that make prompts long, in words; of many, the first few."""
    # In a chat, demonstrations are turns without what its template puts around all of them.
    texts = [task.question(row) for row in task.train]
    longest_first = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    places: list[int] = []
    for prompt in prompts:
        # Some chat templates trim turns.
        place = next(place for place in longest_first if texts[place].strip() in prompt.text)
        if place not in places:
            places.append(place)
    names = []
    for place in places[:MOST_NAMED]:
        row_text = " ".join(task.train[place].fields.values())
        (tokens,) = tokenize(decoder.tokenizer, [texts[place]])
        names.append(
            f"training row {place + 1} ({len(tokens)} tokens, it begins {row_text[:40]!r})"
        )
    if len(places) > MOST_NAMED:
        names.append(f"{len(places) - MOST_NAMED} more")
    return ", ".join(names)


def _summed(moments: QKMoments) -> dict[str, Tensor]:
    """Returns what all processes saw, by name.

    In the order of the names, since moments that were read from a file have their tensors in
    another one.
    """
    tensors = moments.tensors()
    return {name: total(tensors[name]) for name in sorted(tensors)}
