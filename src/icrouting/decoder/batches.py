"""Batches: token lists of mixed lengths, padded on the right, sized by a token budget."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Token lists as one rectangle, padded on the right.

    `rows` are their positions in the list they came from.
    """

    rows: list[int]
    input_ids: Int[Tensor, "batch q_len"]
    attention_mask: Bool[Tensor, "batch q_len"]

    @property
    def last(self) -> Int[Tensor, "batch"]:
        """Position of each row's last real token."""
        return self.attention_mask.sum(1) - 1

    def to(self, device: torch.device) -> "Batch":
        """Returns the same batch on another device."""
        return Batch(self.rows, self.input_ids.to(device), self.attention_mask.to(device))


def pad(token_lists: Sequence[Sequence[int]], pad_id: int, rows: list[int] | None = None) -> Batch:
    """Returns token lists as one batch, padded on the right.

    Args:
        token_lists: the lists, none of them empty.
        pad_id: the token to pad with.
        rows: the lists' positions in the list they came from; None numbers them from 0.
    """
    if rows is None:
        rows = list(range(len(token_lists)))
    # On the processor, whatever device new tensors go to: the batch is moved as a whole.
    unpadded = [torch.tensor(tokens, dtype=torch.long, device="cpu") for tokens in token_lists]
    input_ids = pad_sequence(unpadded, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(tokens) for tokens in token_lists], device="cpu")
    attention_mask = torch.arange(input_ids.shape[1], device="cpu") < lengths[:, None]
    return Batch(rows, input_ids, attention_mask)


def attended(
    tokens: Shaped[Tensor, "batch q_len *width"], mask: Any, n_seen: int = 0
) -> Bool[Tensor, "batch q_len"]:
    """Returns which tokens of a pass are real.

    Args:
        tokens: the ids or the embeddings that the pass reads.
        mask: any attention mask that `generate` or a user may give, or None.
        n_seen: the cached tokens that stand before them.
    """
    n_rows, q_len = tokens.shape[:2]
    # Models with windowed layers take a mask for each kind of layer; a window says less.
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or _is_of_a_window(mask, n_seen + q_len):
        return torch.ones(n_rows, q_len, dtype=torch.bool, device=tokens.device)
    if mask.ndim == 4:
        # [batch, 1, q_len, kv_len]: a token is real if any token sees it.
        is_seen = mask if mask.dtype == torch.bool else mask == 0
        mask = is_seen[:, 0, :, n_seen : n_seen + q_len].any(1)
    # A mask may or may not cover the cached tokens too.
    first = max(0, min(n_seen, mask.shape[1] - q_len))
    is_real = mask[:, first : first + q_len].bool().expand(n_rows, -1)
    # A row without any real token is read as it stands.
    return is_real | ~is_real.any(1, keepdim=True)


def _is_of_a_window(mask: Tensor, kv_len: int) -> bool:
    """Whether a mask is a static cache's of a window's width, which leaves tokens out."""
    return mask.ndim == 4 and mask.shape[-1] < kv_len


def by_length(
    token_lists: Sequence[Sequence[int]], budget: int, n_cached: int = 0
) -> Iterator[list[int]]:
    """Yields groups of row numbers of similar length, longest first.

    Each is at most `budget` tokens padded, and so are the `n_cached` tokens that each row has
    before it. A row longer than the budget makes a group of its own.
    """
    order = sorted(range(len(token_lists)), key=lambda row: -len(token_lists[row]))
    while order:
        longest = len(token_lists[order[0]])
        group_size = max(1, budget // max(1, n_cached, longest))
        yield order[:group_size]
        order = order[group_size:]


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token to pad with; any will do, since padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        # Some tokenizers have none, some a list of them.
        if isinstance(token, int):
            return token
    return 0


def context_length(model: nn.Module) -> int | None:
    """Returns the longest prompt a model was built for, in tokens.

    None where its config names none.
    """
    return getattr(model.config, "max_position_embeddings", None)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int | None = None
) -> list[list[int]]:
    """Returns the token lists of texts.

    Raises:
        ValueError: a text is empty or longer than `limit` tokens, or the tokenizer closes texts.
    """
    # Behind a closing token no answer could follow.
    if tokenizer("a").input_ids[-1] in tokenizer.all_special_ids:
        raise ValueError(
            "this tokenizer closes every text with a special token: "
            "load it with add_eos_token=False"
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
    """Returns the rows of a batch whose values are finite.

    Args:
        is_finite: whether each row's values are.
        texts: the prompt of each row.
        what: what the values are, as the message is to name them.
        skip: whether to leave other rows out, with a warning.

    Raises:
        ValueError: a row has other values, and is not to be left out.
    """
    flags = is_finite.tolist()
    odd_texts = [text for text, fine in zip(texts, flags, strict=True) if not fine]
    if odd_texts:
        message = (
            f"NaN or infinity in the {what} of {len(odd_texts)} of {len(texts)} prompts "
            f"(one ends {odd_texts[0][-60:]!r})"
        )
        if not skip:
            raise ValueError(
                f"{message}: load the model in float32 or bfloat16, "
                "or leave such prompts out (skip_nan)"
            )
        log.warning("left out: %s", message)
    return [row for row, fine in enumerate(flags) if fine]
