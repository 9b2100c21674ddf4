"""The oracle: In-Context Routing on dense matrices, one row and one head at a time (method.md, section 3)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


def dense_attention(query, key, value, mask, scaling, bias, gates):
    """softmax(scaling * Q_h K_g^T + gamma_h * bias + mask) V_g for every head h of one row."""
    n_heads, group = query.shape[0], query.shape[0] // key.shape[0]
    outputs = []
    for head in range(n_heads):
        attn_logits = scaling * query[head] @ key[head // group].T + gates[head] * bias
        attn_logits = attn_logits.masked_fill(~mask, torch.finfo(attn_logits.dtype).min)
        outputs.append(attn_logits.softmax(-1) @ value[head // group])
    return torch.stack(outputs, dim=1)  # [q_len, n_heads, head_dim]


@contextmanager
def reference_routed(model, pids, routing) -> Iterator[None]:
    """Inside, an eager model without a cache computes every layer densely, the routed ones with their bias."""
    layers, caught, handles = model.model.layers, {}, []
    for index in pids.layers:
        for name in ("q", "k"):
            attention = layers[index].self_attn
            site = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")

            def keep(module, args, output, where=(attention, name)):
                heads_first = output.ndim == 4  # Gemma3 normalises [batch, heads, q_len, head_dim]
                caught[where] = output.transpose(1, 2).flatten(2) if heads_first else output

            handles.append(site.register_forward_hook(keep))
    routed = {layers[index].self_attn: position for position, index in enumerate(pids.layers)}

    def attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
        rows = []
        times = len(query) // len(routing.routing_vector)  # beams: each query's rows stand together
        for row in range(len(query)):
            bias, gates = torch.zeros(query.shape[2], key.shape[2]), torch.zeros(query.shape[1])
            if (position := routed.get(module)) is not None:
                alpha = routing.routing_vector[row // times, position]
                z_query = caught[module, "q"][row] @ pids.query_directions()[position]
                z_key = caught[module, "k"][row] @ pids.key_directions()[position]
                bias, gates = (
                    z_query @ torch.diag(alpha) @ z_key.T,
                    routing.head_gates[row // times, position],
                )
            mask = attention_mask[row, 0] == 0
            rows.append(dense_attention(query[row], key[row], value[row], mask, scaling, bias, gates))
        return torch.stack(rows), None

    try:
        with mock.patch.object(sys.modules[type(model).__module__], "eager_attention_forward", attention_forward):
            yield
    finally:
        for handle in handles:
            handle.remove()
