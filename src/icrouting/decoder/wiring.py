"""The wiring check: a row of the family table must read what the attention function receives.

They may differ by rotary embedding, which is the identity at position 0 and keeps the norm of every
head at the others. With one factor f per channel, for rotary tables and queries that a family
scales, on a dummy batch

    received[b, h, 0] = f * captured[b, h, 0]
    |received[b, h, t]| = |f * captured[b, h, t]|

must hold for the queries and the keys of every layer, whatever the family's rotary function.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from icrouting.decoder.kernels import attention_function, kernel_of
from icrouting.decoder.sites import Dims, Family, Site, watched

# More rows than one, also where there is a single key head, or some factor would fit anything.
_BATCH = 5
_LENGTH = 3
# Relative. Rounding stays below four units in the last place; a wrong site is off by about 1.
_MIN_TOLERANCE = 1e-4
_TOLERANCE_IN_ULP = 4
# Kernels whose masks can be made without an accelerator.
_WITH_PLAIN_MASKS = ("sdpa", "eager")

# What attention was handed, by its module.
Received = dict[nn.Module, tuple[Tensor, Tensor]]


def has_sites(stack: PreTrainedModel, family: Family) -> bool:
    """Whether every layer of a stack has the submodules that a family's row names."""
    names = {name for name, _ in stack.named_modules(remove_duplicate=False)}
    for layer in range(stack.config.num_hidden_layers):
        for site in (family.query, family.key):
            if f"{family.layers}.{layer}.{family.attention}.{site.module}" not in names:
                return False
    return True


@torch.no_grad()
def agrees(
    model: PreTrainedModel,
    stack: PreTrainedModel,
    family: Family,
    dims: Dims,
    device: torch.device,
) -> bool:
    """Whether attention receives, in every layer, what a row captures.

    Args:
        model: the whole model, whose attention function is exchanged meanwhile.
        stack: its stack of layers, which has the row's sites.
        family: the row.
        dims: the sizes of the stack.
        device: where the stack takes its tokens.
    """
    attentions = [getattr(layer, family.attention) for layer in getattr(stack, family.layers)]
    # Outputs are watched as they are: `read` may not suit a model that the row is only tried on.
    raw = replace(family, query=Site(family.query.module), key=Site(family.key.module))
    kernel = model.config._attn_implementation
    received: Received = {}
    with ExitStack() as cleanup:
        captured = [cleanup.enter_context(watched(module, raw, dims)) for module in attentions]
        for module in stack.modules():
            cleanup.callback(setattr, module, "training", module.training)
        stack.eval()
        cleanup.enter_context(
            attention_function(
                model,
                "icrouting_wiring",
                _recording(received, kernel or "eager"),
                # Those of a call that another thread makes meanwhile; none is read here.
                masks=kernel if kernel in _WITH_PLAIN_MASKS else "sdpa",
            )
        )
        tokens = _dummy_batch(stack.config.vocab_size).to(device)
        stack(input_ids=tokens, use_cache=False)
        for attention, outputs in zip(attentions, captured, strict=True):
            if attention not in received:
                return False
            if not _layer_agrees(received[attention], outputs, family, dims):
                return False
    return True


def _dummy_batch(vocab_size: int) -> Int[Tensor, "batch q_len"]:
    """Returns tokens from all over the vocabulary."""
    n_tokens = _BATCH * _LENGTH
    tokens = torch.arange(1, n_tokens + 1) * vocab_size // (n_tokens + 1)
    return tokens.view(_BATCH, _LENGTH)


def _recording(received: Received, kernel: str) -> Callable:
    """Returns an attention function that keeps queries and keys, and lets tokens see themselves.

    A call that another thread makes meanwhile gets what the model's own kernel computes.
    """
    thread = threading.get_ident()

    def recording_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if threading.get_ident() != thread:
            own_kernel = kernel_of(kernel, module)
            return own_kernel(module, query, key, value, attention_mask, **kwargs)
        received[module] = query, key
        # A token that sees only itself gets its own value, which no kernel is needed for.
        group_size = query.shape[1] // value.shape[1]
        value_by_head = value.repeat_interleave(group_size, dim=1)
        return value_by_head.transpose(1, 2).contiguous(), None

    return recording_attention


def _layer_agrees(
    received: tuple[Tensor, Tensor], outputs: dict[str, Tensor], family: Family, dims: Dims
) -> bool:
    # A layer may borrow another's keys.
    if len(outputs) < 2:
        return False
    query, key = received
    return _site_agrees(family.query, outputs["query"], query, dims.n_heads, dims) and _site_agrees(
        family.key, outputs["key"], key, dims.n_kv_heads, dims
    )


def _site_agrees(site: Site, output: Tensor, received: Tensor, n_heads: int, dims: Dims) -> bool:
    try:
        captured = site.read(output, dims)
    except RuntimeError:  # the row is for other shapes than this model's
        return False
    if received.shape[1::2] != (n_heads, dims.head_dim):
        return False
    if captured.shape != received.transpose(1, 2).flatten(2).shape:
        return False
    return _is_received(captured, received)


def _is_received(captured: Tensor, received: Float[Tensor, "batch heads q_len head_dim"]) -> bool:
    """Whether the two equations of this room hold, up to rounding."""
    expected = received.transpose(1, 2).float()
    states = captured.float().view_as(expected)
    # Rotary embedding changes nothing at position 0: the factor is fitted there by least squares.
    first_states = states[:, 0]
    first_expected = expected[:, 0]
    tiny = torch.finfo(first_states.dtype).tiny
    overlap = (first_states * first_expected).sum((0, 1))
    factor = overlap / first_states.square().sum((0, 1)).clamp_min(tiny)
    error = (factor * first_states - first_expected).norm() / first_expected.norm()
    norm_difference = (factor * states).norm(dim=-1) - expected.norm(dim=-1)
    norm_error = norm_difference.norm() / expected.norm()
    tolerance = max(_MIN_TOLERANCE, _TOLERANCE_IN_ULP * torch.finfo(received.dtype).eps)
    return bool(error <= tolerance) and bool(norm_error <= tolerance)
