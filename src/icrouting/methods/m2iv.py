"""M2IV (Li et al. 2025, arXiv 2504.04633): a vector added to every branch, distilled from few-shot prompting.

A re-implementation from descriptions: no official code was found, and the paper's own hyperparameters are unverified.
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
from icrouting.methods.distilling import BATCH_SIZE, Distilled, Lessons, distilled, lessons_of

LRS, W_SYNERGY, OFF_DIAGONAL, BANK = (1e-3, 5e-4, 1e-4), (0.1, 0.01, 0.0), 1e-3, 64


class M2IV(Distilled):
    """Every branch's output h, at every token, becomes h + a v, with a learned v and a per layer and branch.

    A re-implementation from descriptions, not checked against the authors' code or figures. Loss = mimicry of
    the frozen model behind demonstrations + w * synergy of the two branches + 0.5 * cross-entropy of the label.
    The learning rate of v and w are chosen on the validation rows. Over several tasks, rows are pooled. Differs:
    w and the rate start at 0.1 and 1e-3, not 1 and 1e-5; synergy is divided by the hidden size, or drowns the rest.
    """

    name = "m2iv"

    def learn(self, rng: np.random.Generator) -> None:
        """Runs the teacher once, and trains and chooses the vectors."""
        lessons, seed = lessons_of(self, rng), int(rng.integers(2**31))
        grid = [{"lr": lr, "w_synergy": weight} for weight in W_SYNERGY for lr in LRS]
        self.choose(grid, lambda lr, w_synergy: self._distilled(lessons, lr, w_synergy, seed))
        self._count(lessons)

    def _distilled(
        self, lessons: Lessons, lr: float, w_synergy: float, seed: int
    ) -> dict[str, Tensor]:
        branches = all_branches_of(self.model)
        bank: deque[Tensor] = deque(maxlen=BANK // BATCH_SIZE - 1)

        # Outputs are taken before the vectors are added: being the same in every row, these cancel in the synergy.
        def weighed(batch: Batch) -> Tensor:
            states = torch.stack(
                [last_of(out, batch.last).float().to(batch.last.device) for out in outputs]
            )
            views = states.unflatten(0, (-1, 2)).mean(0)  # [2, batch, hidden_size]
            attention, mlp = torch.cat([*bank, views], dim=1)
            bank.append(views.detach())
            return w_synergy * synergy(attention, mlp)

        extra, epochs = weighed if w_synergy else None, self.settings.train_epochs
        with recorded(branches) as outputs:
            return distilled(
                self,
                lessons,
                len(branches),
                self._edited,
                lr=lr,
                epochs=epochs,
                seed=seed,
                extra=extra,
            )

    def _edited(
        self, vectors: Float[Tensor, "n_places hidden_size"], strengths: Float[Tensor, "n_places"]
    ) -> Context:
        return edited(
            all_branches_of(self.model),
            lambda place, h: added(h, strengths[place] * vectors[place]),
        )


def synergy(
    attention: Float[Tensor, "n_rows hidden_size"], mlp: Float[Tensor, "n_rows hidden_size"]
) -> Float[Tensor, ""]:
    """Returns (sum_i (1 - M_ii)^2 + mu * sum_{i!=j} M_ij^2) / hidden_size, M the correlation of the two views.

    A view has a row per item, standardised per feature over the rows. M itself, hidden_size squared, is not built:
    |Za^T Zm|^2 = <Za Za^T, Zm Zm^T>, of n_rows squared.
    """
    n_rows, hidden_size = attention.shape
    centred = [view - view.mean(0) for view in (attention, mlp)]
    za, zm = (view / (view.square().mean(0) + 1e-12).sqrt() for view in centred)
    diagonal = (za * zm).mean(0)
    off_diagonal = ((za @ za.T) * (zm @ zm.T)).sum() / n_rows**2 - diagonal.square().sum()
    return ((1 - diagonal).square().sum() + OFF_DIAGONAL * off_diagonal) / hidden_size
