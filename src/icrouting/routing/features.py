"""Features of a query, E(x), and the routing that the router reads from them (section 3).

The paper's features are a sentence encoder's. The backbone's own hidden state entering the first routed layer
needs no second model, no second tokenizer and no further pass: routing starts where it is read.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.config import HIDDEN
from icrouting.decoder.decoder import Decoder
from icrouting.routing.encoder import load_encoder, query_texts

Scale = tuple[Float[Tensor, "n_features"], Float[Tensor, "n_features"]]


@dataclass(frozen=True)
class Features:
    """What the router reads of a prompt: `n_features` numbers; `fingerprint` identifies what computes them.

    `read` gives them, [batch, n_features] in float32, from prompts' tokens and the states that enter the first routed
    layer, [q_len, hidden_size] each; those may be missing unless `reads_hidden`.
    """

    n_features: int
    fingerprint: str
    reads_hidden: bool
    read: Callable[[Sequence[Sequence[int]], Sequence[Tensor]], Tensor]

    def scale(self, features: Float[Tensor, "n_queries n_features"]) -> Scale:
        """Returns the mean and standard deviation that training takes out of its queries' features.

        A backbone's channels differ in size by orders of magnitude; a sentence encoder's vectors are scaled as it is.
        """
        if not self.reads_hidden:
            return torch.zeros(self.n_features), torch.ones(self.n_features)
        mean, std = features.mean(0), features.std(0, correction=0)
        # A channel that only rounding moves says nothing; divided by infinity it is left out.
        return mean, std.masked_fill(std <= torch.finfo(torch.bfloat16).eps * mean.abs(), torch.inf)


# Controls: features of the width of others that say nothing of the prompt, or only which one it is.
_BLIND: dict[str, Callable[[Sequence[int], int], Tensor]] = {
    "constant": lambda tokens, n_features: torch.ones(n_features),
    "random": lambda tokens, n_features: torch.randn(  # the same draw for the same prompt
        n_features, generator=torch.Generator().manual_seed(zlib.crc32(repr(list(tokens)).encode()))
    ),
}


def features_of(name: str, decoder: Decoder, device: str) -> Features:
    """Returns the features that `FitConfig.encoder` names; a sentence encoder runs on `device`.

    Differs: "hidden", the state at the prompt's last token, is not in the paper. Nor are the controls: "constant:"
    before a name stands for ones in its features' place, "random:" for a fixed normal draw per prompt.
    """
    kind, _, masked = name.partition(":")
    if kind in _BLIND:
        width, blind = features_of(masked, decoder, device).n_features, _BLIND[kind]
        return Features(
            width,
            name,
            False,
            lambda lists, _: torch.stack([blind(tokens, width) for tokens in lists]),
        )
    if name == HIDDEN:
        width = decoder.hidden_size
        return Features(
            width, HIDDEN, True, lambda _, hidden: torch.stack([row[-1].float() for row in hidden])
        )
    encoder = load_encoder(name, device)
    return Features(
        encoder.n_features,
        encoder.fingerprint,
        False,
        lambda tokens, _: encoder(query_texts(decoder.tokenizer, tokens)),
    )
