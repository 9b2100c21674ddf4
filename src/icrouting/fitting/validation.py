"""Validation: how a router in training answers rows that it does not learn from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.config import FitConfig
from icrouting.decoder.batches import by_length, finite_rows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import LateEntry
from icrouting.fitting.queries import Query
from icrouting.fitting.trunk import pad_states
from icrouting.routing.attachment import Attachment
from icrouting.routing.router import Router
from icrouting.runtime.processes import mine, total

# A training is looked at as often as this, but not before so many steps.
LOOKS = 20
STEPS_BETWEEN_LOOKS = 10
# Logits go over the vocabulary, so that a batch is bounded by its rows, too.
_BATCH_ROWS = 64
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Look:
    """What a router did on the validation rows.

    Attributes:
        step: steps that it had taken.
        loss: mean cross-entropy of the right option among the options, in nats.
        accuracy: share of rows whose right option scored highest.
        n_rows: how many rows these were, where folds of them were judged; else 0.
    """

    step: int
    loss: float
    accuracy: float
    n_rows: int = 0

    def named(self) -> dict[str, float]:
        """Returns loss and accuracy by the names that `training.jsonl` has for them."""
        return {"validation_loss": self.loss, "validation_accuracy": self.accuracy}


class Watch:
    """Which router of a training did best on validation queries, and whether to go on.

    It is judged by its loss, which says more than the accuracy of few rows. Without `patience` it
    is looked at, and no router is kept.

    Attributes:
        every: steps from one look to the next.
        looks: one entry each time that the router was judged, the untrained one's first.
        best: weights of the best router so far, by name; without `patience` there are none.
    """

    def __init__(self, queries: Sequence[Query], patience: int, n_steps: int):
        self._has_queries = bool(queries)
        self._patience = patience
        self._n_steps = n_steps
        self.every = max(STEPS_BETWEEN_LOOKS, math.ceil(n_steps / LOOKS))
        self.looks: list[Look] = []
        self.best: dict[str, Tensor] = {}

    @property
    def best_look(self) -> Look | None:
        """The first look of the least loss; None before any."""
        return min(self.looks, key=lambda look: look.loss, default=None)

    @property
    def kept_step(self) -> int | None:
        """After how many steps the router was that is kept; None where the last one is."""
        best_look = self.best_look
        return best_look.step if self.best and best_look else None

    @property
    def is_over(self) -> bool:
        """Whether the loss has not fallen for `patience` looks."""
        best_look = self.best_look
        if not self._patience or best_look is None:
            return False
        n_waited = len(self.looks) - 1 - self.looks.index(best_look)
        return n_waited >= self._patience

    def is_due(self, step: int) -> bool:
        """Whether the router is to be judged after so many steps, and was not yet."""
        if not self._has_queries or (self.looks and self.looks[-1].step >= step):
            return False
        return step % self.every == 0 or step == self._n_steps

    def add(self, look: Look, router: Router) -> None:
        """Notes what a router did, and keeps its weights if it is the best so far."""
        self.looks.append(look)
        if self._patience and self.best_look is look:
            # Clones, since training goes on in place.
            self.best = {name: value.clone() for name, value in router.state_dict().items()}

    def summary(self) -> str:
        """Returns the last look in a few words, for a bar; empty before any."""
        if not self.looks:
            return ""
        look = self.looks[-1]
        return f"validation loss {look.loss:.3f}, accuracy {look.accuracy:.0%}"


@torch.no_grad()
def answered(
    queries: Sequence[Query],
    router: Router,
    decoder: Decoder,
    entry: LateEntry,
    attachment: Attachment,
    config: FitConfig,
) -> tuple[float, float]:
    """Returns a router's loss and accuracy on queries, from their trunk's states.

    Alpha has the scale that it is used with, not that of the step. All processes take part.

    Args:
        queries: what is asked.
        router: decides the routing.
        decoder: the frozen model.
        entry: runs its late layers.
        attachment: routes them.
        config: settings.

    Raises:
        ValueError: logits are not finite, unless `skip_nan` leaves such queries out.
    """
    # Of each query: its loss, whether it was answered rightly, and whether at all.
    figures = torch.zeros(len(queries), 3, dtype=torch.float64)
    places = mine(range(len(queries)))
    token_lists = [queries[place].state.tokens for place in places]
    for group in by_length(token_lists, _BATCH_TOKENS):
        for start in range(0, len(group), _BATCH_ROWS):
            batch = [places[number] for number in group[start : start + _BATCH_ROWS]]
            batch_queries = [queries[place] for place in batch]
            figures[batch] = _figures(batch_queries, router, decoder, entry, attachment, config)
    return _over_rows(queries, total(figures))


def _over_rows(
    queries: Sequence[Query], figures: Float[Tensor, "n_queries 3"]
) -> tuple[float, float]:
    """Returns the mean loss of the examples, and the share of them that were answered rightly.

    An example with several queries is right where all of them are, and its losses add up.
    """
    figures_by_row: dict[int, list[list[float]]] = {}
    for query, of_query in zip(queries, figures.tolist(), strict=True):
        figures_by_row.setdefault(query.row, []).append(of_query)
    losses = []
    rights = []
    for of_row in figures_by_row.values():
        if all(is_answered for _, _, is_answered in of_row):
            losses.append(sum(loss for loss, _, _ in of_row))
            rights.append(all(is_right for _, is_right, _ in of_row))
    if not losses:
        raise ValueError("no validation row has finite logits: load the model in float32")
    return sum(losses) / len(losses), sum(rights) / len(rights)


def _figures(
    queries: Sequence[Query],
    router: Router,
    decoder: Decoder,
    entry: LateEntry,
    attachment: Attachment,
    config: FitConfig,
) -> Float[Tensor, "n_queries 3"]:
    """Returns of each query of a batch its loss, and 1 where it is right, and where it is finite.

    What is not finite has zeros.
    """
    features = torch.stack([query.features for query in queries])
    routing = router(features.to(decoder.device)).scaled(config.final_alpha_scale)
    batch, hidden = pad_states([query.state for query in queries], decoder.pad_id)
    attachment.route(routing, batch.last if config.bias_rows == "last" else None)
    logits = entry(batch.to(decoder.device), hidden).cpu()
    texts = [query.text for query in queries]
    finite = finite_rows(logits.isfinite().all(-1), texts, "logits", config.skip_nan)
    figures = torch.zeros(len(queries), 3, dtype=torch.float64)
    for row in finite:
        option_logits = logits[row, queries[row].option_ids].float()
        label = queries[row].label
        figures[row, 0] = -option_logits.log_softmax(-1)[label]
        figures[row, 1] = float(option_logits.argmax() == label)
        figures[row, 2] = 1.0
    return figures
