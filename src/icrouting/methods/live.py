"""LIVE, learnable in-context vectors (Peng et al. 2024): a distilled one a layer."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.hooks import edited
from icrouting.methods.base import Context
from icrouting.methods.distilling import Distilled, Strengths, Vectors, distilled, lessons_of

# The published rate first.
LRS = (1e-3, 5e-3, 5e-4, 1e-4)
# The share of the epochs in a shorter training, which may suit few rows.
SHORTER = 0.3


class Live(Distilled):
    """Every block's output h becomes (h + a v) |h| / |h + a v|, at every token.

    Every layer learns its v and its a. The vectors are taught to give, on the bare prompt, what the
    frozen model gives behind 5 demonstrations per class. Learning rate of v, and all or three
    tenths of the epochs, are chosen on the validation rows; the first setting is that of the
    published commands for VQAv2. Over several tasks, rows are pooled. Differs: the published recipe
    has 8,000 queries of random demonstrations, in batches of 64; see also `distilling`.
    """

    name = "live"

    def learn(self, rng: np.random.Generator) -> None:
        """Runs the teacher once, and trains and chooses the vectors."""
        lessons = lessons_of(self, rng)
        seed = int(rng.integers(2**31))
        n_layers = len(self.decoder.layers)

        def build(lr: float, epochs: int) -> dict[str, Tensor]:
            return distilled(self, lessons, n_layers, self._edited, lr=lr, epochs=epochs, seed=seed)

        self.choose(self._grid(), build)
        self._count(lessons)

    def _grid(self) -> list[dict[str, Any]]:
        """Returns the settings in the order in which they are tried."""
        all_epochs = self.settings.train_epochs
        fewer_epochs = max(1, round(SHORTER * all_epochs))
        grid = []
        # One epoch cannot be shortened: then there is one duration.
        for epochs in dict.fromkeys((all_epochs, fewer_epochs)):
            for lr in LRS:
                grid.append({"lr": lr, "epochs": epochs})
        return grid

    def _edited(self, vectors: Vectors, strengths: Strengths) -> Context:
        def edit(layer: int, hidden: Tensor) -> Tensor:
            return turned(hidden, vectors[layer], strengths[layer])

        return edited(list(self.decoder.layers), edit)


def turned(
    hidden: Tensor, vector: Float[Tensor, "hidden_size"], strength: Float[Tensor, ""]
) -> Tensor:
    """Returns hidden states moved along a vector, each brought back to its norm."""
    # In half precision the squares of a sink's state would overflow.
    before = hidden.float()
    moved = before + (strength * vector).to(hidden.device)
    # A state that is moved to nought stays there, instead of becoming no number.
    tiny = torch.finfo(torch.float32).tiny
    norm = before.norm(dim=-1, keepdim=True)
    moved_norm = moved.norm(dim=-1, keepdim=True).clamp_min(tiny)
    return (moved * (norm / moved_norm)).to(hidden.dtype)
