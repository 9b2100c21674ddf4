"""Attaching routed attention to a loaded model, and leaving it as it was found.

Per routed layer: forward hooks catch queries and keys before rotary embedding; a pre-hook on the
attention module swaps the cache for a view whose `update` widens keys and values before they are
stored; and an attention function, registered under a name of ours beside a mask function of the
same name, widens the query and calls the model's own kernel.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from icrouting.decoder.families import attention_of, base_of, dims_of, family_of, stack_of
from icrouting.decoder.guards import Hook
from icrouting.decoder.hold import hooked
from icrouting.decoder.kernels import attention_function, kernel_of
from icrouting.decoder.sites import Dims, watching
from icrouting.routing.attachment import ROUTED_KERNELS, Attachment, RoutedLayer
from icrouting.routing.pids import PIDs, check_layers

# An attention function is handed its module alone, and finds here what belongs to it.
_routed: weakref.WeakKeyDictionary[nn.Module, RoutedLayer] = weakref.WeakKeyDictionary()


def _attention_function(original: str) -> Callable:
    """Returns an attention function that widens in routed layers and calls `original`'s kernel."""

    def routed_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kernel = kernel_of(original, module)
        width = query.shape[-1]
        layer = _routed.get(module)
        weights = None
        if layer is not None:
            n_rows = query.shape[0]
            weights = layer.attachment.weights_for(layer.position, n_rows, scaling, query.device)
        if layer is None or weights is None:
            if layer is not None:
                layer.states.clear()
            # Wider heads may round differently, so columns that add nothing are left out.
            if key.shape[-1] != width:
                key = key[..., :width].contiguous()
                value = value[..., :width].contiguous()
            return kernel(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        # Where there is a cache, it has widened them.
        if key.shape[-1] == width:
            key, value = layer.widen_cached(key, value)
        first_biased = layer.attachment.current.first_biased(query.shape[0])
        query = layer.widen_queries(query, weights, first_biased)
        output, attn_weights = kernel(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output[..., : -layer.rank].contiguous(), attn_weights

    return routed_attention


def routed_kernel(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Inside, the model uses our attention function over the kernel that it used before."""
    original = stack_of(model).config._attn_implementation
    alias = ROUTED_KERNELS.get(original or "")
    if original is None or alias is None:
        raise ValueError(
            f"attention implementation {original!r} cannot be routed: load the model with "
            f"attn_implementation set to one of {', '.join(map(repr, ROUTED_KERNELS))}"
        )
    return attention_function(model, alias, _attention_function(original), masks=original)


@contextmanager
def attach(model: nn.Module, pids: PIDs) -> Iterator[Attachment]:
    """Inside, the layers of `pids` are routed by the yielded attachment's `routing`.

    On leaving, also by an exception, hooks and attention implementation are as they were.
    """
    base = base_of(model)
    dims = dims_of(model)
    check_layers(pids.layers, dims.n_layers)
    _check_widths(pids, dims)
    attachment = Attachment()
    with hooked(base, "icr", _routed_layers(model, pids, attachment)) as hold:
        attachment.hold = hold
        yield attachment


@contextmanager
def _routed_layers(model: nn.Module, pids: PIDs, attachment: Attachment) -> Iterator[None]:
    """Inside, the hooks of all routed layers are in place, and the kernel is ours."""
    family = family_of(model)
    dims = dims_of(model)
    with ExitStack() as leaving:
        for position, index in enumerate(pids.layers):
            attention = attention_of(model, index)
            layer = RoutedLayer(attachment, position, pids)
            leaving.enter_context(watching(attention, family, dims, layer.states.keep))
            _routed[attention] = layer
            leaving.callback(_routed.pop, attention)
            leaving.enter_context(
                attention.register_forward_pre_hook(Hook(layer.swap_cache), with_kwargs=True)
            )
        leaving.enter_context(routed_kernel(base_of(model)))
        yield


def attachment_of(model: nn.Module, layer: int) -> Attachment | None:
    """Returns the attachment that routes a layer; None where none does."""
    routed_layer = _routed.get(attention_of(model, layer))
    return None if routed_layer is None else routed_layer.attachment


def _check_widths(pids: PIDs, dims: Dims) -> None:
    """Checks that directions are as wide as a model's queries and keys."""
    query_width = dims.n_heads * dims.head_dim
    key_width = dims.n_kv_heads * dims.head_dim
    pids_query_width = pids.query_pids.shape[1]
    pids_key_width = pids.key_pids.shape[1]
    if (pids_query_width, pids_key_width) != (query_width, key_width):
        raise ValueError(
            f"the PIDs are for queries and keys {pids_query_width} and {pids_key_width} wide, this "
            f"model's are {query_width} and {key_width}: use the base model that the router was "
            "fitted on"
        )
