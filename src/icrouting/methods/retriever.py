"""A retriever: how likely a prompt and a library's prompt are of one task, by their frozen features."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

WIDTH, DROPOUT = 512, 0.2
N_PAIRS, LR, WEIGHT_DECAY, BATCH_SIZE, EPOCHS = 10_000, 1e-3, 0.01, 32, 15


def _new_head(n_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2 * n_features, WIDTH), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(WIDTH, 2)
    )


@torch.no_grad()
def same_task(
    weights: Float[Tensor, "n_weights"],
    queries: Float[Tensor, "n_queries n_features"],
    prompts: Float[Tensor, "n_prompts n_features"],
) -> Float[Tensor, "n_queries n_prompts"]:
    """Returns the probability that a query and a library prompt are of one task, given their features."""
    with torch.random.fork_rng(devices=[]):
        head = _new_head(prompts.shape[1]).eval()
    vector_to_parameters(weights, head.parameters())
    shape = len(queries), len(prompts), -1
    return head(torch.cat([queries[:, None].expand(shape), prompts.expand(shape)], -1)).softmax(-1)[
        ..., 1
    ]


def train_head(
    queries: Float[Tensor, "n_queries n_features"],
    prompts: Float[Tensor, "n_prompts n_features"],
    same: Bool[Tensor, "n_queries n_prompts"],
    rng: np.random.Generator,
) -> Float[Tensor, "n_weights"]:
    """Returns the head's weights, trained on as many pairs of one task as of two."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(int(rng.integers(2**31)))
        kinds = [which.nonzero()[torch.randperm(int(which.sum()))] for which in (same, ~same)]
        pairs = torch.cat([kind[: min(N_PAIRS // 2, *map(len, kinds))] for kind in kinds])
        head = _new_head(prompts.shape[1])
        optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        for _ in range(EPOCHS):
            for query, prompt in (
                batch.T for batch in pairs[torch.randperm(len(pairs))].split(BATCH_SIZE)
            ):
                logits = head(torch.cat([queries[query], prompts[prompt]], -1))
                loss = nn.functional.cross_entropy(logits, same[query, prompt].long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return parameters_to_vector(head.parameters()).detach()
