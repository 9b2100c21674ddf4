"""Identity: what tells a frozen decoder apart from every other."""

import hashlib

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from icrouting.decoder.families import base_of

_SAMPLES_PER_WEIGHT = 16


def fingerprint(model: nn.Module) -> str:
    """Returns 16 hex digits that identify a model's architecture and weights.

    A strided sample of every weight, rounded to bfloat16, so that the same checkpoint loaded as
    float32 or as bfloat16, with or without LoRA around it, gives the same digits.
    """
    return weights_digest(base_of(model))


def weights_digest(module: nn.Module) -> str:
    """Returns 16 hex digits that identify a module's weights."""
    samples: dict[str, str] = {}
    for prefix, owner in module.named_modules():
        # Brings off-loaded weights in, for as long as they are read.
        with align_module_device(owner):
            for name, weight in owner.named_parameters(prefix, recurse=False):
                samples[name] = _sample_of(weight)
    # Tied weights count once; off-loaded ones are no longer one object, so names tell them.
    tied = getattr(module, "all_tied_weights_keys", {})
    weights: list[tuple[str, str]] = []
    for name, _ in module.named_parameters():
        if "lora_" not in name and name not in tied:
            # LoRA keeps the plain layer as its `base_layer`.
            weights.append((name.replace(".base_layer", ""), samples[name]))
    text = "".join(f"{name}{sample}" for name, sample in sorted(weights))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sample_of(weight: Tensor) -> str:
    """Returns a weight's shape and numbers taken evenly from it, as text."""
    flat = weight.detach().reshape(-1)
    stride = max(1, flat.numel() // _SAMPLES_PER_WEIGHT)
    sample = flat[::stride][:_SAMPLES_PER_WEIGHT]
    return f"{tuple(weight.shape)}{sample.to(torch.bfloat16).float().cpu().tolist()}"
