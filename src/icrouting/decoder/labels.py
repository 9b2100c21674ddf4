"""Labels: how likely whole answers are, read token by token behind prompts that are read once.

Options make a tree of tokens, and what several of them begin with is read once. A step reads one
token in every row, as `generate` does, so that whatever is attached to the model sees what it sees
there. A prompt's rows stand side by side, as beams do, and the cache stays one object, since a
routing is kept with it.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from icrouting.decoder.batches import Batch
from icrouting.decoder.families import CACHE
from icrouting.decoder.passes import last_position_only, read_batch

Tokens = Sequence[int]
# The first tokens of one or more labels.
Beginning = tuple[int, ...]


@dataclass(frozen=True)
class Parting:
    """A place in a label where other labels go on otherwise.

    Attributes:
        beginning: the label's tokens before it.
        following: the tokens with which some label goes on from there.
        chosen: the place of this label's among them.
    """

    beginning: list[int]
    following: list[int]
    chosen: int

    @property
    def token(self) -> int:
        """The token with which this label goes on."""
        return self.following[self.chosen]


def partings(labels: Sequence[Tokens], place: int) -> list[Parting]:
    """Returns where other labels part from the one at a place, in its order.

    It is the first token alone where all labels differ there, or where none parts from this one.
    """
    label = list(labels[place])
    parted = []
    for n_read in range(len(label)):
        beginning = label[:n_read]
        alike = [tokens for tokens in labels if list(tokens[:n_read]) == beginning]
        following = list(dict.fromkeys(tokens[n_read] for tokens in alike if len(tokens) > n_read))
        # A label that ends here is another way to go on.
        n_ways = len(following) + any(len(tokens) == n_read for tokens in alike)
        if n_ways > 1:
            parted.append(Parting(beginning, following, following.index(label[n_read])))
    return parted or [Parting([], [label[0]], 0)]


@dataclass
class _Rows:
    """What a model has read in every row, and where that is in the cache.

    Attributes:
        cache: keys and values of the rows.
        is_real: which of its columns are no padding.
        beginnings: by prompt, what each of its rows has read behind it; equally many for all.
    """

    cache: Cache
    is_real: Bool[Tensor, "n_rows kv_len"]
    beginnings: list[list[Beginning]]


@torch.no_grad()
def label_log_probs(
    model: PreTrainedModel,
    prefix_cache: Cache | None,
    batch: Batch,
    labels_by_row: Sequence[Sequence[Tokens]],
    token_budget: int,
) -> Float[Tensor, "batch n_labels"]:
    """Returns the summed log-probabilities of labels' tokens behind each row, in nats.

    Rows with fewer labels than others end in -inf.

    Args:
        model: the model.
        prefix_cache: what all rows go on from, which stays as it is; None for nothing.
        batch: the prompts.
        labels_by_row: the tokens of each row's labels.
        token_budget: tokens in the cache, over all rows; a prompt's labels are read in parts where
            they would take more.
    """
    n_labels = max(len(labels) for labels in labels_by_row)
    sums = torch.full((len(labels_by_row), n_labels), -torch.inf)
    n_before = 0 if prefix_cache is None else prefix_cache.get_seq_length()
    pieces = _pieces(batch, labels_by_row, n_before, token_budget, keeps_all(model))
    for places in pieces:
        piece = batch.picked(places)
        labels = [labels_by_row[place] for place in places]
        piece_sums = _sums(model, prefix_cache, piece, labels, token_budget).cpu()
        for place, row_labels, row_sums in zip(places, labels, piece_sums, strict=True):
            sums[place, : len(row_labels)] = row_sums[: len(row_labels)]
    return sums


def keeps_all(model: PreTrainedModel) -> bool:
    """Whether every layer attends to all that stands before a token.

    A sliding window counts padding too, so that tokens behind it would see less.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _pieces(
    batch: Batch,
    labels_by_row: Sequence[Sequence[Tokens]],
    n_before: int,
    token_budget: int,
    may_pad: bool,
) -> Iterator[list[int]]:
    """Yields the places of rows that are read together, without padding unless it does no harm."""
    lengths = batch.attention_mask.sum(1).tolist()
    n_rows_each = max(_width(labels) for labels in labels_by_row)
    longest_label = max(len(tokens) for labels in labels_by_row for tokens in labels)
    piece: list[int] = []
    for place, length in enumerate(lengths):
        n_tokens = n_before + max([length, *(lengths[other] for other in piece)]) + longest_label
        is_full = (len(piece) + 1) * n_rows_each * n_tokens > token_budget
        is_uneven = bool(piece) and length != lengths[piece[0]] and not may_pad
        if piece and (is_full or is_uneven):
            yield piece
            piece = []
        piece.append(place)
    yield piece


def _sums(
    model: PreTrainedModel,
    prefix_cache: Cache | None,
    batch: Batch,
    labels_by_row: Sequence[Sequence[Tokens]],
    token_budget: int,
) -> Float[Tensor, "batch n_labels"]:
    """Returns what `label_log_probs` does, for rows that are read together."""
    goes_on = any(len(tokens) > 1 for labels in labels_by_row for tokens in labels)
    logits, cache = read_batch(model, batch, prefix_cache, use_cache=goes_on)
    everything = [list(range(len(labels))) for labels in labels_by_row]
    n_labels = max(len(labels) for labels in labels_by_row)
    sums = torch.zeros(len(labels_by_row), n_labels, device=logits.device)
    first: list[list[Beginning]] = [[()] for _ in labels_by_row]
    _add(sums, logits, first, labels_by_row, everything)
    if not goes_on:
        return sums
    assert cache is not None, "a pass that uses a cache gives it"
    is_real = batch.attention_mask
    # Also what stood before the batch: a shared context, virtual tokens.
    n_before = cache.get_seq_length() - is_real.shape[1]
    is_real = torch.cat([is_real.new_ones(len(is_real), n_before), is_real], 1)
    parts = [everything]
    if len(labels_by_row) == 1:
        labels = labels_by_row[0]
        n_tokens = is_real.shape[1] + max(len(tokens) for tokens in labels)
        parts = [[part] for part in _parts(labels, token_budget // n_tokens)]
    layers = cache.layers
    for number, part in enumerate(parts, start=1):
        # The object stays, and a step puts new tensors in the place of those that it holds.
        if number < len(parts):
            cache.layers = copy.deepcopy(layers)
        else:
            cache.layers = layers
        _read_on(model, _Rows(cache, is_real, first), labels_by_row, part, sums)
    return sums


def _read_on(
    model: PreTrainedModel,
    rows: _Rows,
    labels_by_row: Sequence[Sequence[Tokens]],
    chosen: Sequence[Sequence[int]],
    sums: Float[Tensor, "n_prompts n_labels"],
) -> None:
    """Adds the log-probabilities of all tokens but the first to the sums of the chosen labels."""
    longest = 0
    for labels, places in zip(labels_by_row, chosen, strict=True):
        longest = max([longest, *(len(labels[place]) for place in places)])
    for n_read in range(1, longest):
        beginnings = []
        for labels, places in zip(labels_by_row, chosen, strict=True):
            beginnings.append(_beginnings([labels[place] for place in places], n_read))
        rows, input_ids = _stepped(rows, beginnings, filling=labels_by_row[0][0][0])
        positions = rows.is_real.sum(1, keepdim=True) - 1
        with last_position_only(model, torch.ones_like(input_ids, dtype=torch.bool)):
            output = model(
                input_ids=input_ids,
                attention_mask=rows.is_real.long(),
                position_ids=positions,
                use_cache=True,
                **{CACHE: rows.cache},
            )
        _add(sums, output.logits, rows.beginnings, labels_by_row, chosen)


def _stepped(
    rows: _Rows, beginnings: Sequence[list[Beginning]], filling: int
) -> tuple[_Rows, Tensor]:
    """Returns rows that go on to beginnings one token longer, and that token of each.

    A prompt with fewer of them than others repeats one, or the filling where it has none.
    """
    n_rows_each = max(len(wanted) for wanted in beginnings)
    rows_before = []
    tokens = []
    filled = []
    start = 0
    for wanted, before in zip(beginnings, rows.beginnings, strict=True):
        wanted = wanted or [(*before[0], filling)]
        wanted = (wanted * n_rows_each)[:n_rows_each]
        for beginning in wanted:
            rows_before.append(start + before.index(beginning[:-1]))
            tokens.append([beginning[-1]])
        filled.append(wanted)
        start += len(before)
    # On the processor, which layers on any device take.
    selected = torch.tensor(rows_before, device="cpu")
    if rows_before != list(range(start)):
        rows.cache.batch_select_indices(selected)
    is_real = rows.is_real[selected.to(rows.is_real.device)]
    is_real = torch.cat([is_real, is_real.new_ones(len(is_real), 1)], 1)
    input_ids = torch.tensor(tokens, device=is_real.device)
    return _Rows(rows.cache, is_real, filled), input_ids


def _add(
    sums: Float[Tensor, "n_prompts n_labels"],
    logits: Float[Tensor, "n_rows vocab"],
    beginnings: Sequence[Sequence[Beginning]],
    labels_by_row: Sequence[Sequence[Tokens]],
    chosen: Sequence[Sequence[int]],
) -> None:
    """Adds to each chosen label the log-probability of the token behind its beginning."""
    n_read = len(beginnings[0][0])
    rows = []
    tokens = []
    prompts = []
    columns = []
    start = 0
    for prompt, (before, labels, places) in enumerate(
        zip(beginnings, labels_by_row, chosen, strict=True)
    ):
        row_of = {
            beginning: start + place for place, beginning in reversed(list(enumerate(before)))
        }
        for place in places:
            if len(labels[place]) > n_read:
                rows.append(row_of[tuple(labels[place][:n_read])])
                tokens.append(labels[place][n_read])
                prompts.append(prompt)
                columns.append(place)
        start += len(before)
    log_probs = logits.float().log_softmax(-1)
    picked = log_probs[torch.tensor(rows), torch.tensor(tokens)]
    sums[torch.tensor(prompts), torch.tensor(columns)] += picked


def _beginnings(labels: Sequence[Tokens], n_read: int) -> list[Beginning]:
    """Returns the different beginnings of `n_read` tokens that a label goes on from."""
    longer = [tuple(tokens[:n_read]) for tokens in labels if len(tokens) > n_read]
    return list(dict.fromkeys(longer))


def _width(labels: Sequence[Tokens]) -> int:
    """Returns the most rows that a step has for a prompt with these labels."""
    longest = max(len(tokens) for tokens in labels)
    widths = [len(_beginnings(labels, n_read)) for n_read in range(1, longest)]
    return max([1, *widths])


def _parts(labels: Sequence[Tokens], most_rows: int) -> list[list[int]]:
    """Returns labels' places in parts, none with a step of more rows than `most_rows`."""
    # Sorted, so that labels with a beginning in common come into one part.
    order = sorted(range(len(labels)), key=lambda place: tuple(labels[place]))
    parts: list[list[int]] = [[]]
    for place in order:
        longer = [*parts[-1], place]
        if parts[-1] and _width([labels[other] for other in longer]) > most_rows:
            parts.append([place])
        else:
            parts[-1] = longer
    return parts
