"""M2IV (Li et al. 2025, arXiv 2504.04633): distilled vectors in every branch.

A re-implementation from descriptions: no official code was found, and the paper's own
hyperparameters are unverified.
"""

from collections import deque

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.batches import Batch
from icrouting.decoder.families import all_branches_of
from icrouting.decoder.hooks import added, edited, recorded
from icrouting.decoder.states import last_of
from icrouting.methods.base import Context
from icrouting.methods.distilling import (
    BATCH_SIZE,
    Distilled,
    Lessons,
    Strengths,
    Vectors,
    distilled,
    lessons_of,
)

LRS = (1e-3, 5e-4, 1e-4)
W_SYNERGY = (0.1, 0.01, 0.0)
# The weight of M's elements off the diagonal, mu.
OFF_DIAGONAL = 1e-3
# Rows that the synergy is taken over: those of the batch and of the batches before it.
BANK = 64


class M2IV(Distilled):
    """Every branch's output h becomes h + a v, at every token.

    Every branch of every layer learns its v and its a. A re-implementation from descriptions, not
    checked against the authors' code or figures. Loss = mimicry of the frozen model behind
    demonstrations + w * synergy of the two branches + 0.5 * cross-entropy of the label. The
    learning rate of v and w are chosen on the validation rows. Over several tasks, rows are pooled.
    Differs: w and the rate start at 0.1 and 1e-3, not 1 and 1e-5; synergy is divided by the hidden
    size, or drowns the rest.
    """

    name = "m2iv"

    def learn(self, rng: np.random.Generator) -> None:
        """Runs the teacher once, and trains and chooses the vectors."""
        lessons = lessons_of(self, rng)
        seed = int(rng.integers(2**31))
        grid = [{"lr": lr, "w_synergy": weight} for weight in W_SYNERGY for lr in LRS]
        self.choose(grid, lambda lr, w_synergy: self._distilled(lessons, lr, w_synergy, seed))
        self._count(lessons)

    def _distilled(
        self, lessons: Lessons, lr: float, w_synergy: float, seed: int
    ) -> dict[str, Tensor]:
        branches = all_branches_of(self.model)
        earlier_views: deque[Tensor] = deque(maxlen=BANK // BATCH_SIZE - 1)

        def weighted_synergy(batch: Batch) -> Tensor:
            states = []
            for output in outputs:
                last_states = last_of(output, batch.last).float()
                states.append(last_states.to(batch.last.device))
            # A layer's two branches come one after the other.
            by_layer = torch.stack(states).unflatten(0, (-1, 2))
            views = by_layer.mean(0)  # [2, batch, hidden_size]
            attention, mlp = torch.cat([*earlier_views, views], dim=1)
            # Of earlier batches only the values count, since their graphs are gone.
            earlier_views.append(views.detach())
            return w_synergy * synergy(attention, mlp)

        # The outputs are those before the vectors are added: being the same in every row, these
        # cancel in the synergy.
        with recorded(branches) as outputs:
            return distilled(
                self,
                lessons,
                len(branches),
                self._edited,
                lr=lr,
                epochs=self.settings.train_epochs,
                seed=seed,
                extra=weighted_synergy if w_synergy else None,
            )

    def _edited(self, vectors: Vectors, strengths: Strengths) -> Context:
        def edit(place: int, output: Tensor) -> Tensor:
            return added(output, strengths[place] * vectors[place])

        return edited(all_branches_of(self.model), edit)


def synergy(
    attention: Float[Tensor, "n_rows hidden_size"], mlp: Float[Tensor, "n_rows hidden_size"]
) -> Float[Tensor, ""]:
    """Returns (sum_i (1 - M_ii)^2 + mu * sum_{i!=j} M_ij^2) / hidden_size.

    M is the correlation of the two views, which have a row per item and are standardised per
    feature over the rows. M itself, hidden_size squared, is not built:
    |Za^T Zm|^2 = <Za Za^T, Zm Zm^T>, of n_rows squared.
    """
    n_rows, hidden_size = attention.shape
    za = _standardised(attention)
    zm = _standardised(mlp)
    diagonal = (za * zm).mean(0)
    products = (za @ za.T) * (zm @ zm.T)
    all_squares = products.sum() / n_rows**2
    off_diagonal = all_squares - diagonal.square().sum()
    misfit = (1 - diagonal).square().sum()
    return (misfit + OFF_DIAGONAL * off_diagonal) / hidden_size


def _standardised(view: Float[Tensor, "n_rows hidden_size"]) -> Float[Tensor, "n_rows hidden_size"]:
    centred = view - view.mean(0)
    variance = centred.square().mean(0)
    # The tiny number keeps a feature that never varies at nought.
    return centred / (variance + 1e-12).sqrt()
