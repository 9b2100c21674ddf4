"""LIVE, learnable in-context vectors (Peng et al. 2024): one vector a layer, distilled from few-shot prompting."""

from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.hooks import edited
from icrouting.methods.base import Context
from icrouting.methods.distilling import Distilled, distilled, lessons_of

LRS = 1e-3, 5e-3, 5e-4, 1e-4


class Live(Distilled):
    """Every block's output h, at every token, becomes (h + a v) |h| / |h + a v|, with a learned v and a per layer.

    The vectors are taught to give, on the bare prompt, what the frozen model gives behind 5 demonstrations per
    class. Learning rate of v, and all or three tenths of the epochs, are chosen on the validation rows; the first
    setting is that of the published commands for VQAv2. Over several tasks, rows are pooled. Differs: the
    published recipe has 8,000 queries of random demonstrations, in batches of 64; see also `distilling`.
    """

    name = "live"

    def learn(self, rng: np.random.Generator) -> None:
        """Runs the teacher once, and trains and chooses the vectors."""
        lessons, layers = lessons_of(self, rng), list(self.decoder.layers)
        all_epochs = self.settings.train_epochs
        durations = dict.fromkeys((all_epochs, max(1, round(0.3 * all_epochs))))
        grid = [{"lr": lr, "epochs": epochs} for epochs in durations for lr in LRS]
        self.choose(
            grid,
            partial(
                distilled, self, lessons, len(layers), self._edited, seed=int(rng.integers(2**31))
            ),
        )
        self._count(lessons)

    def _edited(
        self, vectors: Float[Tensor, "n_layers hidden_size"], strengths: Float[Tensor, "n_layers"]
    ) -> Context:
        return edited(
            list(self.decoder.layers),
            lambda layer, h: turned(h, vectors[layer], strengths[layer]),
        )


def turned(
    hidden: Tensor, vector: Float[Tensor, "hidden_size"], strength: Float[Tensor, ""]
) -> Tensor:
    """Returns hidden states moved along a vector and brought back to the norm that each token's had."""
    before = hidden.float()
    moved = before + (strength * vector).to(hidden.device)
    tiny = torch.finfo(torch.float32).tiny
    length = moved.norm(dim=-1, keepdim=True).clamp_min(tiny)
    return (moved * (before.norm(dim=-1, keepdim=True) / length)).to(hidden.dtype)
