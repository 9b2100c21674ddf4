"""What a fit will take, reckoned before it starts: parameters, tokens, memory, disk and time.

    moments   8 * n_routed * (query_width^2 + query_width + key_width^2 + key_width)       bytes, for any n_prompts
    trunk     query tokens * hidden_size * itemsize                                        bytes, on disk
    pass      2 * n_matrix * tokens + 4 * n_layers * query_width * sum of squared lengths  FLOP
    training  2 * epochs * the routed layers' pass                FLOP; backward goes to activations alone

n_matrix counts the weights without embeddings and vocabulary head. docs/scaling.md holds this against measurements.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.batches import context_length, tokenize
from icrouting.decoder.families import dims_of, stack_of
from icrouting.fitting.capture import TOKEN_BUDGET
from icrouting.routing.pids import check_layers, late_third
from icrouting.tasks.prompts import extraction_prompts
from icrouting.tasks.task import Task

# Without a tokenizer; with SmolLM2's it is 3.0 (csqa) to 4.2 (sst2).
CHARS_PER_TOKEN = 3.8
# One core's: to add a prompt to a number of the moments, and to decompose a covariance, per width^3.
SECONDS_PER_PRODUCT, SECONDS_PER_CUBE = 0.065e-9, 1.2e-9
MINILM_WIDTH = 384


@dataclass(frozen=True)
class Texts:
    """One task's prompts in one stage: how many, the sums of their lengths in tokens and of those squared."""

    count: int
    tokens: int
    squares: int
    longest: int


@dataclass(frozen=True)
class Plan:
    """A fit, reckoned: bytes by part, FLOP by stage, seconds of one core for moments and PCA; batches are rough."""

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
        running = {stage: flops / speed for stage, flops in self.flops.items()}
        return {**running, "moments and PCA on one core": self.processor}

    def check(self, memory: int, disk: int, device: int | None, *, is_spread: bool = False) -> None:
        """Raises ValueError if what is needed for certain, so without batches, exceeds the bytes that are free.

        Where the weights of a model that `is_spread` go is accelerate's to see; those of a quantised one are not known.
        """
        weights, moments = 0 if is_spread else self.memory.get("weights", 0), self.memory["moments"]
        fewer = f"route fewer than {len(self.layers)} layers (--layers) or take a smaller model"
        for what, needed, free, advice in (
            ("memory", moments + (weights if device is None else 0), memory, fewer),
            (
                "disk space",
                sum(self.disk.values()),
                disk,
                "lower --n-queries or set --out to another disk",
            ),
            (
                "accelerator memory",
                weights,
                device,
                "spread the model over more devices or take a smaller one",
            ),
        ):
            if free is not None and needed > free:
                raise ValueError(
                    f"this fit needs {size(needed)} of {what}, {size(free)} are free: {advice}"
                )


def size(n_bytes: int) -> str:
    """Returns a number of bytes as people read it."""
    power = min(4, int(math.log(max(1, n_bytes), 1000)))
    return f"{n_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def hours(seconds: float) -> str:
    """Returns a time as people read it."""
    return str(timedelta(seconds=round(seconds)))


def listed(amounts: dict[str, Any], said: Callable[[Any], str]) -> str:
    """Returns amounts by name in one line."""
    return ", ".join(f"{name} {said(amount)}" for name, amount in amounts.items())


def room_of(out: Path) -> tuple[int, int, int | None]:
    """Returns the free bytes of memory, disk (with what a fit begun in `out` has written) and accelerator, if any."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    kept = sum(file.stat().st_blocks * 512 for file in (out / "fit").glob("*"))  # without holes
    device = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    return psutil.virtual_memory().available, shutil.disk_usage(there).free + kept, device


def plan_fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[Task],
    config: FitConfig,
    dtype: torch.dtype,
    sample: int = 50,
) -> Plan:
    """Returns the plan of a fit whose weights will be loaded in `dtype`; a model on the meta device will do.

    Of every task `sample` prompts and queries are read, and their mean length stands for all. Of the outputs of a
    layer's matrices, `n_outputs` a token, a pass makes about three times as many, and backward keeps twice as many.
    """
    dims, decoder, itemsize = dims_of(model), stack_of(model).config, dtype.itemsize
    hidden_size, is_quantised = (
        int(decoder.hidden_size),
        getattr(model.config, "quantization_config", None) is not None,
    )
    layers = check_layers(config.layers or late_third(dims.n_layers), dims.n_layers)
    prompts, queries = _texts(model, tokenizer, tasks, config, sample)
    n_routed, n_late, longest = (
        len(layers),
        dims.n_layers - layers[0],
        max(of.longest for of in queries.values()),
    )
    widths = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
    n_router = _n_router(config, hidden_size, n_routed * (config.rank + dims.n_heads))
    moments = 8 * n_routed * sum(width**2 + width for width in widths)
    n_outputs = _n_matrix(model) // dims.n_layers // hidden_size
    largest = max(max(1, TOKEN_BUDGET // of.longest) * of.longest for of in prompts.values())
    batch = min(largest, sum(of.tokens for of in prompts.values()))
    n_parameters = sum(weight.numel() for weight in model.parameters())
    memory = {
        **({} if is_quantised else {"weights": n_parameters * itemsize}),  # else unknown
        "moments": moments,
        "extraction batch": batch * (3 * n_outputs + n_routed * sum(widths)) * itemsize,
        "PCA of one layer": 4 * 8 * widths[0] ** 2,
        "training batch": 2 * config.batch_size * longest * n_late * n_outputs * itemsize,
    }
    n_artifact = n_router + n_routed * config.rank * (sum(widths) + 4)
    n_trunk = hidden_size * sum(of.tokens for of in queries.values())
    disk = {"trunk": n_trunk * itemsize, "moments": moments, "router": 4 * n_artifact}
    head = 2 * int(decoder.vocab_size) * hidden_size * sum(of.count for of in queries.values())
    flops = {
        "extraction": pass_flops(model, prompts.values(), dims.n_layers),
        "trunk": pass_flops(model, queries.values(), dims.n_layers) + head,
        "training": 2 * config.epochs * (pass_flops(model, queries.values(), n_late) + head),
    }
    products = moments / 8 * sum(of.count for of in prompts.values())
    processor = (
        products * SECONDS_PER_PRODUCT
        + n_routed * sum(width**3 for width in widths) * SECONDS_PER_CUBE
    )
    return Plan(n_parameters, n_router, layers, prompts, queries, memory, disk, flops, processor)


def _n_router(config: FitConfig, hidden_size: int, n_out: int) -> int:
    n_features = hidden_size if config.encoder == HIDDEN else MINILM_WIDTH
    return config.hidden_width * (2 * n_features + 2 + n_out) + n_out


def _texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[Task],
    config: FitConfig,
    sample: int,
) -> tuple[dict[str, Texts], dict[str, Texts]]:
    """Every task's prompts and queries, drawn as the fit draws them: up to the sample they are the same ones."""

    def measured(texts: list[str], count: int, limit: float) -> Texts:
        read, per_token = (
            (texts, CHARS_PER_TOKEN) if tokenizer is None else (tokenize(tokenizer, texts), 1)
        )
        lengths, scale = (
            np.minimum([len(each) / per_token for each in read], limit),
            count / len(texts),
        )
        return Texts(
            count,
            round(lengths.sum() * scale),
            round((lengths**2).sum() * scale),
            math.ceil(lengths.max()),
        )

    prompts, queries, limit = (
        {},
        {},
        float(min(config.max_tokens, context_length(model) or config.max_tokens)),
    )
    draws = np.random.default_rng(config.seed), np.random.default_rng(config.seed + 1)
    for task in tasks:
        n_prompts, n_queries = (
            min(n, len(task.train)) for n in (config.n_prompts, config.n_queries)
        )
        shape = min(n_prompts, sample), config.demos_per_class
        shown = extraction_prompts(task, *shape, draws[0], config.queries_per_context)
        prompts[task.name] = measured([prompt.text for prompt in shown], n_prompts, math.inf)
        rows = draws[1].permutation(len(task.train))[: min(n_queries, sample)]
        queries[task.name] = measured(
            [task.prompt(task.train[row]) for row in rows], n_queries, limit
        )
    return prompts, queries


def _n_matrix(model: PreTrainedModel) -> int:
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(weight.numel() for weight in {*stack_of(model).parameters()} - looked_up)


def pass_flops(model: PreTrainedModel, prompts: Iterable[Texts], n_layers: int) -> float:
    """Returns the FLOP of prompts' pass through `n_layers` layers, without the vocabulary head."""
    dims, prompts = dims_of(model), list(prompts)
    matrices = 2.0 * _n_matrix(model) / dims.n_layers * sum(texts.tokens for texts in prompts)
    return n_layers * (
        matrices + 4.0 * dims.n_heads * dims.head_dim * sum(texts.squares for texts in prompts)
    )
