"""What a fit will take, told before it starts: parameters, tokens, memory, disk and time."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.config import FitConfig
from icrouting.decoder.batches import context_length, tokenize
from icrouting.decoder.families import dims_of
from icrouting.fitting.lengths import Texts, TokenCounts, prompts_by_task, queries_by_task
from icrouting.fitting.reckoning import Reckoning, Sizes
from icrouting.fitting.rows import check_rank, n_judged
from icrouting.routing.pids import check_layers, late_third
from icrouting.tasks.task import Task

# Without a tokenizer; with SmolLM2's it is 3.0 (csqa) to 4.2 (sst2).
CHARS_PER_TOKEN = 3.8
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Plan:
    """A fit, reckoned; the figures of batches are rough.

    Attributes:
        n_parameters: of the model.
        n_router: parameters of the router.
        layers: the routed ones.
        prompts: few-shot prompts of the extraction, by task.
        queries: zero-shot queries of the training, by task.
        memory: bytes by part; weights of unknown size are left out.
        disk: bytes by part.
        flops: FLOP by stage.
        processor: seconds of one core for moments and PCA.
    """

    n_parameters: int
    n_router: int
    layers: tuple[int, ...]
    prompts: dict[str, Texts]
    queries: dict[str, Texts]
    memory: dict[str, int]
    disk: dict[str, int]
    flops: dict[str, float]
    processor: float

    def seconds(self, speed: float) -> dict[str, float]:
        """Returns the time of every stage where the model runs at `speed`, in FLOP/s."""
        by_stage = {stage: flops / speed for stage, flops in self.flops.items()}
        by_stage["moments and PCA on one core"] = self.processor
        return by_stage

    def check(self, memory: int, disk: int, device: int | None, *, is_spread: bool = False) -> None:
        """Checks that there is room for what is needed for certain, so without batches.

        Args:
            memory: bytes that are free.
            disk: bytes that are free.
            device: bytes that are free on the accelerator; None where there is none.
            is_spread: whether the model is spread over devices. Where its weights go is
                accelerate's to see; those of a quantised model are not known.

        Raises:
            ValueError: more is needed than is free.
        """
        weights = 0 if is_spread else self.memory.get("weights", 0)
        # Without an accelerator the weights lie where the moments do.
        in_memory = self.memory.get("moments", 0)
        if device is None:
            in_memory += weights
        _check_room(
            "memory",
            in_memory,
            memory,
            f"route fewer than {len(self.layers)} layers (--layers) or take a smaller model",
        )
        _check_room(
            "disk space",
            sum(self.disk.values()),
            disk,
            "lower --n-queries or set --out to another disk",
        )
        if device is not None:
            _check_room(
                "accelerator memory",
                weights,
                device,
                "spread the model over more devices or take a smaller one",
            )


def _check_room(what: str, needed: int, free: int, advice: str) -> None:
    if needed > free:
        raise ValueError(
            f"this fit needs {size(needed)} of {what}, {size(free)} are free: {advice}"
        )


def size(n_bytes: int) -> str:
    """Returns a number of bytes as people read it."""
    thousands = int(math.log(max(1, n_bytes), 1000))
    # Whatever is larger stays in the last unit.
    power = min(len(_UNITS) - 1, thousands)
    return f"{n_bytes / 1000**power:.3g} {_UNITS[power]}"


def hours(seconds: float) -> str:
    """Returns a time as people read it."""
    return str(timedelta(seconds=round(seconds)))


def listed(amounts: dict[str, Any], in_words: Callable[[Any], str]) -> str:
    """Returns amounts by name in one line."""
    return ", ".join(f"{name} {in_words(amount)}" for name, amount in amounts.items())


def room_of(stages: Path) -> tuple[int, int, int | None]:
    """Returns the free bytes of memory, disk and accelerator, if there is one.

    What fits have written to `stages`, the folder of their stages, counts as free disk.
    """
    folders = (stages.absolute(), *stages.absolute().parents)
    nearest = next(folder for folder in folders if folder.exists())
    # Blocks rather than sizes, since a file may have holes.
    written = 0
    for folder, _, names in os.walk(stages):
        for name in names:
            # What another fit had under way may be gone by now.
            with suppress(FileNotFoundError):
                written += Path(folder, name).stat().st_blocks * 512
    disk = shutil.disk_usage(nearest).free + written
    device = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    return psutil.virtual_memory().available, disk, device


def plan_fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[Task],
    config: FitConfig,
    dtype: torch.dtype,
    sample: int = 50,
    *,
    is_extracted: bool = True,
) -> Plan:
    """Returns the plan of a fit.

    Args:
        model: the model, of which the weights need not be there: the meta device will do.
        tokenizer: its tokenizer; None reckons tokens from characters.
        tasks: the source tasks.
        config: settings.
        dtype: what the weights will be loaded in.
        sample: prompts and queries of every task that are read; their mean length stands for all.
        is_extracted: whether few-shot prompts are run; a fit that goes on from a router has its
            directions.

    Raises:
        ValueError: the model cannot be routed, or not in these layers, or a task's prompts are all
            longer than its context.
    """
    tasks = [task.bound_to(tokenizer) for task in tasks]
    sizes = Sizes.of(model)
    layers = check_layers(config.layers or late_third(sizes.n_layers), sizes.n_layers)
    if is_extracted:
        check_rank(tasks, config, dims_of(model))
    token_counts = _token_counts(tokenizer)
    limit = context_length(model)
    prompts = {}
    if is_extracted:
        prompts = prompts_by_task(tasks, config, token_counts, sample, limit)
    queries = queries_by_task(tasks, config, token_counts, sample, limit)
    reckoning = Reckoning(
        sizes=sizes,
        layers=layers,
        prompts=list(prompts.values()),
        queries=list(queries.values()),
        config=config,
        itemsize=dtype.itemsize,
        n_judged=sum(n_judged(tasks, config).values()),
    )
    memory = {"weights": reckoning.weights_bytes}
    if is_extracted:
        memory |= {
            "moments": reckoning.moments_bytes,
            "extraction batch": reckoning.extraction_batch_bytes,
            "PCA of one layer": reckoning.pca_bytes,
        }
    memory["training batch"] = reckoning.training_batch_bytes
    # A quantised model's weights are smaller than `dtype`, by how much is not known here.
    if getattr(model.config, "quantization_config", None) is not None:
        del memory["weights"]
    disk = {
        "trunk": reckoning.trunk_bytes,
        "moments": reckoning.moments_bytes,
        "router": reckoning.artifact_bytes,
    }
    if not is_extracted:
        del disk["moments"]
    flops = {
        "extraction": reckoning.extraction_flops,
        "trunk": reckoning.trunk_flops,
        "training": reckoning.training_flops,
    }
    return Plan(
        n_parameters=sizes.n_parameters,
        n_router=reckoning.n_router,
        layers=layers,
        prompts=prompts,
        queries=queries,
        memory=memory,
        disk=disk,
        flops=flops,
        processor=reckoning.processor_seconds if is_extracted else 0.0,
    )


def _token_counts(tokenizer: PreTrainedTokenizerBase | None) -> TokenCounts:
    """Returns what counts texts' tokens, or reckons them from their characters."""

    def counted(texts: list[str]) -> list[float]:
        if tokenizer is None:
            return [len(text) / CHARS_PER_TOKEN for text in texts]
        return [float(len(tokens)) for tokens in tokenize(tokenizer, texts)]

    return counted
