"""Blinded features: as wide as others, they say nothing of the prompt, or only which one it is.

Routers that are fitted on them are controls: what they lose to a router with sight, sight gives. A
name in `FitConfig.encoder`, and so in a saved router, asks for them by a prefix.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Read = Callable[[Sequence[Sequence[int]], Sequence[Tensor]], Float[Tensor, "batch n_features"]]


def constant(n_features: int) -> Read:
    """Returns what reads ones from every prompt."""

    def read(token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Tensor:
        return torch.ones(len(token_lists), n_features)

    return read


def random(n_features: int) -> Read:
    """Returns what reads a normal draw from every prompt, the same one from the same tokens."""

    def draw(tokens: Sequence[int]) -> Float[Tensor, "n_features"]:
        # A digest of the tokens: the same draw for a prompt in every process.
        seed = zlib.crc32(repr(list(tokens)).encode())
        return torch.randn(n_features, generator=torch.Generator().manual_seed(seed))

    def read(token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Tensor:
        return torch.stack([draw(tokens) for tokens in token_lists])

    return read


# By the prefix before the name of the features whose width they take.
BLINDED: dict[str, Callable[[int], Read]] = {"constant": constant, "random": random}
