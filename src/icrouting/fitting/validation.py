"""Validation: how a router in training answers rows that it does not learn from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icrouting.config import FitConfig
from icrouting.decoder.batches import by_length, finite_rows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.partial import LateEntry
from icrouting.fitting.losses import option_loss
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
    """

    step: int
    loss: float
    accuracy: float

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
    # Loss, right answers, and queries.
    sums = torch.zeros(3, dtype=torch.float64)
    queries = mine(queries)
    token_lists = [query.state.tokens for query in queries]
    for group in by_length(token_lists, _BATCH_TOKENS):
        for start in range(0, len(group), _BATCH_ROWS):
            rows = group[start : start + _BATCH_ROWS]
            batch_queries = [queries[row] for row in rows]
            sums += _sums(batch_queries, router, decoder, entry, attachment, config)
    loss, n_right, n_queries = total(sums).tolist()
    if not n_queries:
        raise ValueError("no validation row has finite logits: load the model in float32")
    return loss / n_queries, n_right / n_queries


def _sums(
    queries: Sequence[Query],
    router: Router,
    decoder: Decoder,
    entry: LateEntry,
    attachment: Attachment,
    config: FitConfig,
) -> Float[Tensor, "3"]:
    """Returns loss and right answers, summed over a batch, and its size."""
    features = torch.stack([query.features for query in queries])
    attachment.routing = router(features.to(decoder.device)).scaled(config.final_alpha_scale)
    batch, hidden = pad_states([query.state for query in queries], decoder.pad_id)
    logits = entry(batch.to(decoder.device), hidden).cpu()
    texts = [query.text for query in queries]
    finite = finite_rows(logits.isfinite().all(-1), texts, "logits", config.skip_nan)
    if not finite:
        return torch.zeros(3, dtype=torch.float64)
    logits = logits[finite]
    ids = [torch.tensor(queries[row].option_ids) for row in finite]
    option_ids = pad_sequence(ids, batch_first=True, padding_value=-1)
    labels = torch.tensor([queries[row].label for row in finite])
    scores = logits.gather(1, option_ids.clamp_min(0)).masked_fill(option_ids < 0, -torch.inf)
    n_right = (scores.argmax(1) == labels).sum()
    loss = option_loss(logits, option_ids, labels) * len(finite)
    return torch.tensor([loss.item(), n_right.item(), len(finite)], dtype=torch.float64)
