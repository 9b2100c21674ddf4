"""Identity: what tells a frozen decoder apart from every other."""

import hashlib

import torch
from accelerate.utils import align_module_device
from torch import nn

from icrouting.decoder.families import base_of


def fingerprint(model: nn.Module) -> str:
    """Returns 16 hex digits that identify a model's architecture and weights.

    A strided sample of every weight, rounded to bfloat16, so that the same checkpoint loaded as float32 or
    as bfloat16, with or without LoRA around it, gives the same digits.
    """
    return weights_digest(base_of(model))


def weights_digest(module: nn.Module) -> str:
    """Returns 16 hex digits that identify a module's weights."""
    tied = getattr(module, "all_tied_weights_keys", {})  # off-loaded ones are no longer one object
    names = [
        name for name, _ in module.named_parameters() if "lora_" not in name and name not in tied
    ]
    samples = {}
    for prefix, owner in module.named_modules():
        with align_module_device(owner):  # brings off-loaded weights in
            for name, weight in owner.named_parameters(prefix, recurse=False):
                flat = weight.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16).float().cpu()
                samples[name] = f"{tuple(weight.shape)}{sample.tolist()}"
    weights = sorted((name.replace(".base_layer", ""), samples[name]) for name in names)
    return hashlib.sha256(
        "".join(f"{name}{sample}" for name, sample in weights).encode()
    ).hexdigest()[:16]
