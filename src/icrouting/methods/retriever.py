"""A retriever: how likely two prompts are of one task, by their frozen features."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from icrouting.methods.descent import descend

WIDTH = 512
DROPOUT = 0.2
N_PAIRS = 10_000
LR = 1e-3
WEIGHT_DECAY = 0.01
BATCH_SIZE = 32
EPOCHS = 15


def _new_head(n_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2 * n_features, WIDTH),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(WIDTH, 2),
    )


@torch.no_grad()
def same_task(
    weights: Float[Tensor, "n_weights"],
    queries: Float[Tensor, "n_queries n_features"],
    prompts: Float[Tensor, "n_prompts n_features"],
) -> Float[Tensor, "n_queries n_prompts"]:
    """Returns the probability that a query and a library prompt are of one task.

    Args:
        weights: The head's, as `train_head` returns them.
        queries: Features of the queries.
        prompts: Features of the library's prompts.
    """
    # A new head draws its first weights, which are overwritten and no caller's business.
    with torch.random.fork_rng(devices=[]):
        head = _new_head(prompts.shape[1]).eval()
    vector_to_parameters(weights, head.parameters())
    shape = (len(queries), len(prompts), -1)
    pairs = torch.cat([queries[:, None].expand(shape), prompts.expand(shape)], -1)
    probabilities = head(pairs).softmax(-1)
    return probabilities[..., 1]


def train_head(
    queries: Float[Tensor, "n_queries n_features"],
    prompts: Float[Tensor, "n_prompts n_features"],
    same: Bool[Tensor, "n_queries n_prompts"],
    rng: np.random.Generator,
) -> Float[Tensor, "n_weights"]:
    """Returns the head's weights, trained on as many pairs of one task as of two.

    Args:
        queries: Features of the queries.
        prompts: Features of the library's prompts.
        same: Which of them are of one task.
        rng: Seeds the choice of pairs, the head's start, its dropout and the order of pairs.
    """
    with torch.random.fork_rng(devices=[]):
        # Dropout and the head's start know no generator but the global one.
        torch.manual_seed(int(rng.integers(2**31)))
        pairs = _balanced_pairs(same)
        head = _new_head(prompts.shape[1])
        optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

        def loss_of(batch: Int[Tensor, "batch 2"]) -> Tensor:
            query, prompt = batch.T
            pair_features = torch.cat([queries[query], prompts[prompt]], -1)
            logits = head(pair_features)
            is_same = same[query, prompt].long()
            return nn.functional.cross_entropy(logits, is_same)

        descend(optimizer, _shuffled_batches(pairs), loss_of)
    return parameters_to_vector(head.parameters()).detach()


def _balanced_pairs(same: Bool[Tensor, "n_queries n_prompts"]) -> Int[Tensor, "n_pairs 2"]:
    """Returns the indices of random pairs, those of one task before as many of two."""
    shuffled_by_kind = []
    for is_kind in (same, ~same):
        order = torch.randperm(int(is_kind.sum()))
        shuffled_by_kind.append(is_kind.nonzero()[order])
    # Most pairs are of two tasks: a head that always said so would mostly be right.
    n_of_each = min(N_PAIRS // 2, *map(len, shuffled_by_kind))
    return torch.cat([shuffled[:n_of_each] for shuffled in shuffled_by_kind])


def _shuffled_batches(pairs: Int[Tensor, "n_pairs 2"]) -> Iterator[Int[Tensor, "batch 2"]]:
    # One stream of random numbers feeds the orders and the dropout, so no epoch is drawn ahead.
    for _ in range(EPOCHS):
        order = torch.randperm(len(pairs))
        yield from pairs[order].split(BATCH_SIZE)
