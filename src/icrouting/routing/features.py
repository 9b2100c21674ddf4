"""Features of a query, E(x): what the router reads of a prompt (section 3).

The paper's features are a sentence encoder's. The backbone's own hidden state entering the first
routed layer needs no second model, no second tokenizer and no further pass: routing starts where it
is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.config import HIDDEN
from icrouting.decoder.decoder import Decoder
from icrouting.routing.blinded import BLINDED, Read
from icrouting.routing.encoder import load_encoder, query_texts

Scale = tuple[Float[Tensor, "n_features"], Float[Tensor, "n_features"]]


@dataclass(frozen=True)
class Features:
    """What the router reads of a prompt: `n_features` numbers.

    Attributes:
        n_features: how many.
        fingerprint: identifies what computes them.
        reads_hidden: whether `read` needs hidden states.
        read: gives them, [batch, n_features] in float32, from prompts' tokens and the states that
            enter the first routed layer, [q_len, hidden_size] each; those may be missing unless
            `reads_hidden`.
    """

    n_features: int
    fingerprint: str
    reads_hidden: bool
    read: Read

    def scale(self, features: Float[Tensor, "n_queries n_features"]) -> Scale:
        """Returns the mean and standard deviation that training takes out of its queries' features.

        A backbone's channels differ in size by orders of magnitude; a sentence encoder's vectors
        are scaled as it is.
        """
        if not self.reads_hidden:
            return torch.zeros(self.n_features), torch.ones(self.n_features)
        mean = features.mean(0)
        std = features.std(0, correction=0)
        # A channel that only rounding moves says nothing; divided by infinity it is left out.
        rounding = torch.finfo(torch.bfloat16).eps * mean.abs()
        return mean, std.masked_fill(std <= rounding, torch.inf)


def features_of(name: str, decoder: Decoder, device: str) -> Features:
    """Returns the features that `FitConfig.encoder` names; a sentence encoder runs on `device`.

    Differs: "hidden", the state at the prompt's last token, is not in the paper. Nor are the
    controls: "constant:" before a name stands for ones in its features' place, "random:" for a
    fixed normal draw per prompt.
    """
    # "pinned:minilm" and paths may hold a colon too.
    prefix, _, sighted = name.partition(":")
    if prefix in BLINDED:
        n_features = features_of(sighted, decoder, device).n_features
        return Features(n_features, name, False, BLINDED[prefix](n_features))
    if name == HIDDEN:
        return Features(decoder.hidden_size, HIDDEN, True, _last_states)
    encoder = load_encoder(name, device)

    def read(token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Tensor:
        return encoder(query_texts(decoder.tokenizer, token_lists))

    return Features(encoder.n_features, encoder.fingerprint, False, read)


def sentence_encoder(name: str) -> str | None:
    """Returns the sentence encoder in what `FitConfig.encoder` names, None where there is none."""
    prefix, _, sighted = name.partition(":")
    if prefix in BLINDED:
        return sentence_encoder(sighted)
    return None if name == HIDDEN else name


def _last_states(token_lists: Sequence[Sequence[int]], hidden: Sequence[Tensor]) -> Tensor:
    # The last token alone has read the whole prompt.
    return torch.stack([states[-1].float() for states in hidden])
