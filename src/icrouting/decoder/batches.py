"""Batches: token lists of mixed lengths, padded on the right, sized by a token budget."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Token lists as one rectangle, padded on the right; `rows` are their positions in the list they came from."""

    rows: list[int]
    input_ids: Int[Tensor, "batch q_len"]
    attention_mask: Bool[Tensor, "batch q_len"]

    @property
    def last(self) -> Int[Tensor, "batch"]:
        """Position of each row's last real token."""
        return self.attention_mask.sum(1) - 1

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(self.rows, self.input_ids.to(device), self.attention_mask.to(device))


def pad(token_lists: Sequence[Sequence[int]], pad_id: int, rows: list[int] | None = None) -> Batch:
    """Returns token lists as one batch, padded on the right."""
    input_ids = pad_sequence(
        [torch.tensor(tokens, dtype=torch.long) for tokens in token_lists], True, pad_id
    )
    lengths = torch.tensor(list(map(len, token_lists)))
    attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return Batch(
        rows if rows is not None else list(range(len(token_lists))), input_ids, attention_mask
    )


def attended(
    read: Shaped[Tensor, "batch q_len *width"], mask: Any, n_seen: int = 0
) -> Bool[Tensor, "batch q_len"]:
    """Returns which tokens behind `n_seen` cached ones are real, from any mask that `generate` or a user may give."""
    q_len = read.shape[1]
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or (
        mask.ndim == 4 and mask.shape[-1] < n_seen + q_len
    ):  # a static cache's, of a window's width
        return torch.ones(read.shape[:2], dtype=torch.bool, device=read.device)
    if mask.ndim == 4:  # [batch, 1, q_len, kv_len]: a token is real if any token sees it
        seen = mask if mask.dtype == torch.bool else mask == 0
        mask = seen[:, 0, :, n_seen : n_seen + q_len].any(1)
    first = max(0, min(n_seen, mask.shape[1] - q_len))
    mask = mask[:, first : first + q_len].bool().expand(len(read), -1)
    return mask | ~mask.any(1, keepdim=True)  # a row without any real token is read as it stands


def by_length(
    token_lists: Sequence[Sequence[int]], budget: int, n_cached: int = 0
) -> Iterator[list[int]]:
    """Yields groups of row numbers of similar length, longest first, each at most `budget` tokens padded.

    So are the `n_cached` tokens that each row has before it. A row longer than the budget makes a group of its own.
    """
    order = sorted(range(len(token_lists)), key=lambda row: -len(token_lists[row]))
    while order:
        size = max(1, budget // max(1, n_cached, len(token_lists[order[0]])))
        yield order[:size]
        order = order[size:]


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with; any will do, since padding is masked."""
    return next(
        (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0
    )


def context_length(model: PreTrainedModel) -> int | None:
    """The longest prompt a model was built for, in tokens; None where its config names none."""
    return getattr(model.config, "max_position_embeddings", None)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int | None = None
) -> list[list[int]]:
    """Returns the token lists of texts; ValueError on an empty text or one longer than `limit` tokens."""
    if tokenizer("a").input_ids[-1] in tokenizer.all_special_ids:
        raise ValueError(
            "this tokenizer closes every text with a special token: load it with add_eos_token=False"
        )
    token_lists = tokenizer(list(texts), padding=False, truncation=False).input_ids
    for text, tokens in zip(texts, token_lists, strict=True):
        if not tokens:
            raise ValueError("expected a prompt with at least one token, got an empty text")
        if limit is not None and len(tokens) > limit:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens is longer than the model's context of {limit}: "
                f"shorten it or use fewer demonstrations (it begins {text[:60]!r})"
            )
    return token_lists


def finite_rows(
    is_finite: Bool[Tensor, "batch"], texts: Sequence[str], what: str, skip: bool
) -> list[int]:
    """Returns the rows of a batch whose values are finite; ValueError names others, unless `skip` leaves them out."""
    odd = [text for text, fine in zip(texts, is_finite.tolist(), strict=True) if not fine]
    if odd:
        named = f"NaN or infinity in the {what} of {len(odd)} of {len(texts)} prompts (one ends {odd[0][-60:]!r})"
        if not skip:
            raise ValueError(
                f"{named}: load the model in float32 or bfloat16, or leave such prompts out (skip_nan)"
            )
        log.warning("left out: %s", named)
    return is_finite.nonzero()[:, 0].tolist()
