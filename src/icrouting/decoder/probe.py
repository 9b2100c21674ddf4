"""The probe: what a family's row captures must be what the attention function receives, up to rotary embedding.

Rotary embedding is the identity at position 0 and keeps the norm of every head at the others. With one factor
f per channel, for rotary tables and queries that a family scales, on a dummy batch

    received[b, h, 0] = f * captured[b, h, 0]    and    |received[b, h, t]| = |f * captured[b, h, t]|

must hold for the queries and the keys of every layer, whatever the family's rotary function.
"""

import weakref
from contextlib import ExitStack
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from icrouting.decoder.kernels import attention_function
from icrouting.decoder.sites import Dims, Family, Site, watched

# More rows than one, also where there is a single key head, or some factor would fit anything.
_BATCH, _LENGTH = 5, 3
# Relative; rounding stays below four units in the last place, and a wrong site is off by about 1.
_MIN_TOLERANCE, _TOLERANCE_IN_ULP = 1e-4, 4

_received: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Keeps the query and the key; every token attends to itself alone, which no kernel is needed for."""
    _received[module] = query, key
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(
        1, 2
    ).contiguous(), None


def _is_received(captured: Tensor, received: Float[Tensor, "batch heads q_len head_dim"]) -> bool:
    tolerance = max(_MIN_TOLERANCE, _TOLERANCE_IN_ULP * torch.finfo(received.dtype).eps)
    expected = received.transpose(1, 2).float()
    states = captured.float().view_as(expected)
    first, target = states[:, 0], expected[:, 0]
    factor = (first * target).sum((0, 1)) / first.square().sum((0, 1)).clamp_min(
        torch.finfo(first.dtype).tiny
    )
    error = (factor * first - target).norm() / target.norm()
    norm_error = ((factor * states).norm(dim=-1) - expected.norm(dim=-1)).norm() / expected.norm()
    return bool(error <= tolerance) and bool(norm_error <= tolerance)


def has_sites(decoder: PreTrainedModel, family: Family) -> bool:
    """Whether every layer of a decoder has the submodules that a family's row names."""
    names = {name for name, _ in decoder.named_modules(remove_duplicate=False)}
    layers = [
        f"{family.layers}.{layer}.{family.attention}"
        for layer in range(decoder.config.num_hidden_layers)
    ]
    return all(
        f"{layer}.{site.module}" in names for layer in layers for site in (family.query, family.key)
    )


def _layer_agrees(
    attention: nn.Module, store: dict[str, Tensor], family: Family, dims: Dims
) -> bool:
    if (
        len(store) < 2 or attention not in _received
    ):  # a layer that borrows another's keys, or calls no function
        return False
    places = (("query", family.query, dims.n_heads), ("key", family.key, dims.n_kv_heads))
    for (name, site, n_heads), received in zip(places, _received[attention], strict=True):
        try:
            captured = site.read(store[name], dims)
        except RuntimeError:  # the row is for other shapes than this model's
            return False
        is_sized = received.shape[1::2] == (n_heads, dims.head_dim)
        is_sized &= captured.shape == received.transpose(1, 2).flatten(2).shape
        if not (is_sized and _is_received(captured, received)):
            return False
    return True


@torch.no_grad()
def agrees(model: PreTrainedModel, decoder: PreTrainedModel, family: Family, dims: Dims) -> bool:
    """Whether attention receives, in every layer of a decoder with a row's sites, what the row captures."""
    attentions = [getattr(layer, family.attention) for layer in getattr(decoder, family.layers)]
    # As it is: `read` may not suit a model that the row is only tried on.
    raw = replace(family, query=Site(family.query.module), key=Site(family.key.module))
    tokens = (
        torch.arange(1, _BATCH * _LENGTH + 1) * decoder.config.vocab_size // (_BATCH * _LENGTH + 1)
    )
    with ExitStack() as stack:
        stores = [stack.enter_context(watched(attention, raw, dims)) for attention in attentions]
        for attention in attentions:
            stack.callback(_received.pop, attention, None)
        for module in decoder.modules():
            stack.callback(setattr, module, "training", module.training)
        decoder.eval()
        stack.enter_context(
            attention_function(model, "icrouting_probe", _recording_attention, masks="sdpa")
        )
        on = next(
            (p.device for p in decoder.parameters() if not p.is_meta), tokens.device
        )  # off-loaded ones are meta
        decoder(input_ids=tokens.view(_BATCH, _LENGTH).to(on), use_cache=False)
        return all(
            _layer_agrees(*layer, family, dims) for layer in zip(attentions, stores, strict=True)
        )
