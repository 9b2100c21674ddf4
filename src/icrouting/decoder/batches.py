"""Batches: token lists of mixed lengths, padded on the right, sized by a token budget."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from icrouting.decoder.texts import texts_of

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

    def alone(self, place: int) -> "Batch":
        """Returns one row as a batch of its own, without padding."""
        return self.picked([place])

    def picked(self, places: list[int]) -> "Batch":
        """Returns some rows as a batch, without padding that none of them needs."""
        n_tokens = int(self.attention_mask[places].sum(1).max())
        rows = [self.rows[place] for place in places]
        input_ids = self.input_ids[places, :n_tokens]
        return Batch(rows, input_ids, self.attention_mask[places, :n_tokens])

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


def knows_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer knows more than special tokens.

    One that transformers makes up for a folder without its files does not.
    """
    return len(tokenizer) > len(set(tokenizer.all_special_ids))


def context_length(model: nn.Module) -> int | None:
    """Returns the longest prompt a model was built for, in tokens.

    None where its config names none. A model of images and text names it beside its text's sizes.
    """
    config: PretrainedConfig = model.config  # pyright: ignore[reportAssignmentType]
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int | None = None
) -> list[list[int]]:
    """Returns the token lists of texts.

    What a tokenizer puts before a text is read once where the text brings it, as one made by a chat
    template does.

    Raises:
        TypeError: it is no list of texts.
        ValueError: a text is empty or longer than `limit` tokens, or the tokenizer closes texts.
    """
    texts = texts_of(texts)
    # A tokenizer refuses an empty list of texts.
    if not texts:
        return []
    whole_lists = encoded(tokenizer, texts)
    beginning = _beginning(tokenizer, texts, whole_lists)
    token_lists: list[list[int]] = []
    for text, whole in zip(texts, whole_lists, strict=True):
        tokens = _begun_once(whole, beginning)
        token_lists.append(tokens)
        if not tokens:
            raise ValueError("expected a prompt with at least one token, got an empty text")
        if limit is not None and len(tokens) > limit:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens is longer than the model's context of {limit}: "
                f"shorten it or use fewer demonstrations (it begins {text[:60]!r})"
            )
    return token_lists


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of texts as a tokenizer gives them, those that it puts before them too.

    Another thread may have the same tokenizer pad meanwhile, whose padding would pass for text: it
    is left out by the mask.
    """
    encoding = tokenizer(list(texts), padding=False, truncation=False, return_attention_mask=True)
    token_lists = []
    for tokens, mask in zip(encoding.input_ids, encoding.attention_mask, strict=True):
        if 0 in mask:
            tokens = [token for token, is_text in zip(tokens, mask, strict=True) if is_text]
        token_lists.append(tokens)
    return token_lists


def fits(tokenizer: PreTrainedTokenizerBase, text: str, room: int) -> bool:
    """Whether a text has `room` tokens at most."""
    # A token takes a byte or more, but for two before the text: most texts need no tokenizer.
    if len(text.encode()) + 2 <= room:
        return True
    (tokens,) = tokenize(tokenizer, [text])
    return len(tokens) <= room


def _beginning(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], whole_lists: list[list[int]]
) -> list[int]:
    """Returns the tokens that a tokenizer puts before every text.

    Seen on a text that is there, since a vocabulary may lack the letters of any other.

    Raises:
        ValueError: it puts a token behind texts, where no answer could follow.
    """
    # The shortest costs least, but an empty one does not tell the two ends apart.
    place = min(range(len(texts)), key=lambda row: len(texts[row]) or math.inf)
    whole = whole_lists[place]
    bare = tokenizer(texts[place], add_special_tokens=False).input_ids
    n_added = max(0, len(whole) - len(bare))
    n_before = n_added
    while n_before > 0 and whole[n_before : n_before + len(bare)] != bare:
        n_before -= 1
    if n_before < n_added:
        raise ValueError(
            "this tokenizer closes every text with a special token: "
            "load it with add_eos_token=False"
        )
    return whole[:n_before]


def _begun_once(tokens: list[int], beginning: list[int]) -> list[int]:
    """Returns a text's tokens without what was put before a beginning that it brought itself."""
    n_before = len(beginning)
    if n_before and tokens[n_before : 2 * n_before] == beginning:
        return tokens[n_before:]
    return tokens


def finite_rows(
    is_finite: Bool[Tensor, "batch"], texts: Sequence[str], what: str, skip: bool | None
) -> list[int]:
    """Returns the rows of a batch whose values are finite.

    Args:
        is_finite: whether each row's values are.
        texts: the prompt of each row.
        what: what the values are, as the message is to name them.
        skip: whether to leave other rows out, with a warning; None where nobody is asked.

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
            otherwise = "" if skip is None else ", or leave such prompts out (skip_nan)"
            raise ValueError(f"{message}: load the model in float32 or bfloat16{otherwise}")
        log.warning("left out: %s", message)
    return [row for row, fine in enumerate(flags) if fine]
