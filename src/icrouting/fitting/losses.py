"""The four terms of the training objective, as pure functions (section 4).

L = CE + w_conf * L_conf + w_spar * L_spar + w_gate * L_gate
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def entropy(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch"]:
    """Returns the entropy of softmax(logits), in nats."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def option_loss(
    logits: Float[Tensor, "batch vocab"],
    option_ids: Int[Tensor, "batch n_options"],
    labels: Int[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Returns the cross-entropy of the answers among their task's options.

    Differs: the paper takes the whole vocabulary; among the options no step is spent on pushing the rest
    of the vocabulary down, which scoring ignores. Padded `option_ids` are negative.
    """
    options = logits.gather(1, option_ids.clamp_min(0)).masked_fill(option_ids < 0, -torch.inf)
    return torch.nn.functional.cross_entropy(options, labels)


def confidence_loss(
    logits: Float[Tensor, "batch vocab"], plain_entropy: Float[Tensor, "batch"]
) -> Float[Tensor, ""]:
    """Returns L_conf = mean ReLU(H(routed) - H(plain)): routing must not make the model less certain."""
    return (entropy(logits) - plain_entropy).relu().mean()


def sparsity_loss(
    routing_vector: Float[Tensor, "batch n_layers rank"], deepest_weight: float
) -> Float[Tensor, ""]:
    """Returns L_spar = mean_l w_l |alpha_l|_1 / rank, w_l rising from 1 to `deepest_weight` with depth.

    The paper names the end of the ramp and not its start (open: 1.0).
    """
    weights = torch.linspace(
        1.0, deepest_weight, routing_vector.shape[1], device=routing_vector.device
    )
    return (routing_vector.abs().mean(-1) * weights).mean()


def gate_loss(head_gates: Float[Tensor, "batch n_layers n_heads"]) -> Float[Tensor, ""]:
    """Returns L_gate = mean_l |gamma_l|_1 / n_heads."""
    return head_gates.abs().mean()
