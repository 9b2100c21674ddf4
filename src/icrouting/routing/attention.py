r"""Routed attention on tensors: a low-rank logit bias as columns of queries and keys (section 3).

    attn_logits[h] = scaling * Q_h K_g^T + mask + gamma_h * (Q U_q) diag(alpha) (K U_k)^T
                   = scaling * [Q_h, gamma_h * alpha * z_q / scaling] [K_g, z_k]^T + mask

with z_q = Q U_q, z_k = K U_k over the concatenated heads, and g the key-value head of query head h.
The second line is an ordinary attention of width head_dim + rank: any kernel computes it, nothing
of size q_len x kv_len is made, and the widened keys go through the model's own cache. Values are
widened by zeros, since kernels want equal widths, and the output's last `rank` columns are dropped.
A kernel that caps its logits (Gemma 2) caps the sum.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def project(
    states: Float[Tensor, "batch q_len width"], directions: Float[Tensor, "width rank"]
) -> Float[Tensor, "batch q_len rank"]:
    """Returns z = states @ directions in float32, whatever the model's dtype."""
    return states.float() @ directions


def widen_query(
    query: Float[Tensor, "batch n_heads q_len head_dim"],
    z_query: Float[Tensor, "batch q_len rank"],
    weights: Float[Tensor, "batch n_heads 1 rank"],
) -> Float[Tensor, "batch n_heads q_len wide"]:
    """Returns [Q_h, z_q * weights], weights being gamma_h * alpha / scaling, one row per batch row.

    `query` is what the attention function received, after rotary embedding; `z_query` are projected
    queries.
    """
    # Multiplied in float32, and rounded once.
    columns = z_query[:, None] * weights
    return torch.cat([query, columns.to(query.dtype)], dim=-1)


def widen_key(
    key: Float[Tensor, "batch n_kv_heads q_len head_dim"], z_key: Float[Tensor, "batch q_len rank"]
) -> Float[Tensor, "batch n_kv_heads q_len wide"]:
    """Returns [K_g, z_k], the same columns for every key-value head."""
    columns = z_key[:, None].expand(-1, key.shape[1], -1, -1)
    return torch.cat([key, columns.to(key.dtype)], dim=-1)


def widen_value(
    value: Float[Tensor, "batch n_kv_heads q_len head_dim"], rank: int
) -> Float[Tensor, "batch n_kv_heads q_len wide"]:
    """Returns [V_g, 0]."""
    # Zeros behind the values, so that what they add to the output can be cut off.
    return torch.nn.functional.pad(value, (0, rank))
