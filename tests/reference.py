"""The oracle: In-Context Routing on dense matrices (method.md, section 3).

It takes one row and one head at a time. It knows no family: queries and keys before rotary
embedding are what attention receives, rotated back.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch


def dense_attention(query, key, value, mask, scaling, bias, gates, softcap):
    """softmax(cap(scaling * Q_h K_g^T + gamma_h * bias) + mask) V_g for every head h of one row."""
    outputs = []
    for head in range(len(query)):
        kv_head = head * len(key) // len(query)
        attn_logits = scaling * query[head] @ key[kv_head].T + gates[head] * bias
        if softcap is not None:  # Gemma 2 caps the sum
            attn_logits = softcap * torch.tanh(attn_logits / softcap)
        attn_logits = attn_logits.masked_fill(~mask, torch.finfo(attn_logits.dtype).min)
        outputs.append(attn_logits.softmax(-1) @ value[kv_head])
    return torch.stack(outputs, dim=1)  # [q_len, n_heads, head_dim]


def before_rotary(states, cos, sin):
    """[heads, q_len, head_dim] of one row rotated back, heads joined: [q_len, heads * head_dim]."""
    width = cos.shape[-1]
    first, second = states[..., : width // 2], states[..., width // 2 : width]
    back = states[..., :width] * cos + torch.cat([second, -first], dim=-1) * sin
    return torch.cat([back, states[..., width:]], dim=-1).transpose(0, 1).flatten(1)


@contextmanager
def reference_routed(model, pids, routing, first_biased=None):
    """Inside, an eager model without a cache computes every layer densely.

    The routed ones are computed with their bias: in all rows, or from a row of each query on.
    """
    rotary, unrotated = {}, (torch.zeros(1, 1, 0), torch.zeros(1, 1, 0))

    def keep_rotary(module, args, kwargs):
        rotary[module] = kwargs.get("position_embeddings", unrotated)

    def attention_forward(
        module, query, key, value, attention_mask, scaling, softcap=None, **kwargs
    ):
        rows, times = (
            [],
            len(query) // len(routing.routing_vector),
        )  # beams: each query's rows stand together
        for row in range(len(query)):
            bias, gates = torch.zeros(query.shape[2], key.shape[2]), torch.zeros(query.shape[1])
            if module.layer_idx in pids.layers:
                position = pids.layers.index(module.layer_idx)
                cos, sin = (angle[row % len(angle)] for angle in rotary[module])
                unscaled = query[row] * (
                    scaling / module.scaling
                )  # OPT scales the query instead of the product
                z_query = before_rotary(unscaled, cos, sin) @ pids.query_directions()[position]
                z_key = before_rotary(key[row], cos, sin) @ pids.key_directions()[position]
                bias = (
                    z_query @ torch.diag(routing.routing_vector[row // times, position]) @ z_key.T
                )
                if first_biased is not None:
                    bias[: first_biased[row // times]] = 0
                gates = routing.head_gates[row // times, position]
            heads = (query[row], key[row], value[row], attention_mask[row, 0] == 0)
            rows.append(dense_attention(*heads, scaling, bias, gates, softcap))
        return torch.stack(rows), None

    with ExitStack() as stack:
        for attention in (module for module in model.modules() if hasattr(module, "layer_idx")):
            stack.callback(
                attention.register_forward_pre_hook(keep_rotary, with_kwargs=True).remove
            )
        stack.enter_context(
            mock.patch(f"{type(model).__module__}.eager_attention_forward", attention_forward)
        )
        yield
