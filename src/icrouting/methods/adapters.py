"""Adapters: peft's LoRA in a frozen model, by a context that leaves no trace."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from icrouting.decoder.families import device_of
from icrouting.decoder.hold import frozen

RANK = 32
DROPOUT = 0.05


def load_peft() -> Any:
    """Returns the package peft; ValueError says how to install it."""
    try:
        return import_module("peft")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"LoRA and soft prompts come from peft ({error}): pip install 'icrouting[peft]'"
        ) from error


@contextmanager
def injected(
    base: PreTrainedModel, targets: Sequence[str], alpha: int, adapter: Mapping[str, Tensor] | int
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, peft's LoRA stands around some modules of a model.

    Then these are back in their places. The update is alpha / 32 * B A (Hu et al.).

    Args:
        base: The model, without a LoRA of its own; ValueError for one that has it.
        targets: Full names of the modules.
        alpha: What the update is scaled by, over the rank.
        adapter: A and B by name, which are put in; or the seed of a new A, to be trained with
            dropout, beside a B of zeros.

    Yields:
        A and B of every module by peft's names, in float32.
    """
    peft = load_peft()
    seed = adapter if isinstance(adapter, int) else None
    originals = {name: base.get_submodule(name) for name in targets}
    if any(".lora_" in name for name, _ in base.named_modules()):
        raise ValueError(
            "expected a model without LoRA, got one that has it: merge it first (merge_and_unload)"
        )
    # Only training draws: what is put in has no dropout.
    dropout = DROPOUT if seed is not None else 0.0
    # GPT-2's Conv1D holds its weight transposed.
    is_transposed = any(isinstance(module, Conv1D) for module in originals.values())
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        fan_in_fan_out=is_transposed,
    )
    with frozen(base):
        try:
            if seed is not None:
                torch.manual_seed(seed)
            # peft warns of tied heads, which merging alone would harm.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Weights that are put in need no memory, and no draw, for their start.
                peft.LoraModel(base, config, "default", low_cpu_mem_usage=seed is None)
            starts = _lora_weights(base)
            for name, start in starts.items():
                weight = start if isinstance(adapter, int) else adapter[name]
                _set_lora_weight(base, name, weight, originals)
            yield _lora_weights(base)
        finally:
            for name, module in originals.items():
                base.set_submodule(name, module)
            # peft leaves a note on the model that it has an adapter.
            vars(base).pop("peft_config", None)


def _lora_weights(base: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in base.named_parameters() if ".lora_" in name}


def _set_lora_weight(
    base: PreTrainedModel, name: str, weight: Tensor, originals: Mapping[str, nn.Module]
) -> None:
    """Makes a weight the parameter of that name, in float32, where its module is."""
    target, _, _ = name.partition(".lora_")
    # A model may be spread over several devices.
    device = device_of(originals[target])
    parent_name, _, _ = name.rpartition(".")
    parent = base.get_submodule(parent_name)
    parent.weight = nn.Parameter(weight.detach().float().to(device))
