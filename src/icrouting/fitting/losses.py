"""The four terms of the training objective, as pure functions (section 4).

L = CE + w_conf * L_conf + w_spar * L_spar + w_gate * L_gate
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def entropy(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch"]:
    """Returns the entropy of softmax(logits), in nats."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    return -(probs * log_probs).sum(-1)


def option_loss(
    logits: Float[Tensor, "batch vocab"],
    option_ids: Int[Tensor, "batch n_options"],
    labels: Int[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Returns the cross-entropy of the answers among their task's options.

    Differs: the paper takes the whole vocabulary; among the options no step is spent on pushing the
    rest of the vocabulary down, which scoring ignores.

    Args:
        logits: over the vocabulary, after each query.
        option_ids: tokens of each query's options; where it has fewer than others, negative ones.
        labels: place of the answer among the options.
    """
    is_padding = option_ids < 0
    option_logits = logits.gather(1, option_ids.clamp_min(0))
    # A probability of zero, so that padding takes no part in the softmax.
    option_logits = option_logits.masked_fill(is_padding, -torch.inf)
    return torch.nn.functional.cross_entropy(option_logits, labels)


def confidence_loss(
    logits: Float[Tensor, "batch vocab"], plain_entropy: Float[Tensor, "batch"]
) -> Float[Tensor, ""]:
    """Returns L_conf = mean ReLU(H(routed) - H(plain)), in nats.

    Routing must not make the model less certain.
    """
    gained = entropy(logits) - plain_entropy
    return gained.relu().mean()


def sparsity_loss(
    routing_vector: Float[Tensor, "batch n_layers rank"], deepest_weight: float
) -> Float[Tensor, ""]:
    """Returns L_spar = mean_l w_l |alpha_l|_1 / rank.

    w_l rises from 1 to `deepest_weight` with depth. The paper names the end of the ramp and not its
    start (open: 1.0).
    """
    n_layers = routing_vector.shape[1]
    weights = torch.linspace(1.0, deepest_weight, n_layers, device=routing_vector.device)
    # A mean over the rank is the L1 norm divided by the rank, as the equation has it.
    layer_sizes = routing_vector.abs().mean(-1)
    return (layer_sizes * weights).mean()


def gate_loss(head_gates: Float[Tensor, "batch n_layers n_heads"]) -> Float[Tensor, ""]:
    """Returns L_gate = mean_l |gamma_l|_1 / n_heads."""
    return head_gates.abs().mean()
