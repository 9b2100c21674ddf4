"""I2CL, implicit in-context learning (Li et al. 2024): a vector in every branch."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from icrouting.decoder.batches import pad
from icrouting.decoder.families import all_branches_of
from icrouting.decoder.hold import frozen
from icrouting.decoder.hooks import edited
from icrouting.decoder.passes import next_token_logits
from icrouting.decoder.states import mean_last_outputs
from icrouting.methods.base import Context, Method
from icrouting.methods.descent import descend
from icrouting.methods.settings import Settings
from icrouting.methods.tuning import answered
from icrouting.runtime.pages import counted
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import balanced_demos, demonstration
from icrouting.tasks.task import Example, Task

WEIGHT_DECAY = 1e-3
WARM_UP = 0.05
BATCH_SIZE = 2
FIRST_LAMBDA = 0.1
FIRST_BETA = 1.0
# The published setting first.
GRID = [
    {"lr": 1e-2, "noise": 1e-3},
    {"lr": 1e-2, "noise": 0.0},
    {"lr": 3e-3, "noise": 1e-3},
    {"lr": 3e-3, "noise": 0.0},
]
PUBLISHED_EPOCHS = 100

Scalars = Float[Tensor, "n_branches 2"]


class I2CL(Method):
    """Every branch gives beta * output + lambda * vector, at every token and layer.

    The vectors are means over demonstrations, each run alone, of the branch's output at its last
    token; the two scalars per branch are calibrated on the same demonstrations, with a learning
    rate and a noise that are chosen on validation rows. Several tasks are pooled. Differs: the
    model keeps its dtype, where the published code runs in float32; edits are computed in float32.
    """

    name = "i2cl"
    learned = ("vectors", "scalars", "losses")
    cached = ("vectors", "scalars")
    scalars: Scalars

    @classmethod
    def cuts(cls, settings: Settings) -> list[str]:
        """Returns a sentence if the calibration is shorter than the published one."""
        epochs = settings.i2cl_epochs
        if epochs >= PUBLISHED_EPOCHS:
            return []
        return [
            f"I2CL is calibrated for {counted(epochs, 'epoch')} (published: {PUBLISHED_EPOCHS})."
        ]

    def learn(self, rng: np.random.Generator) -> None:
        """Records the vectors and calibrates the scalars."""
        demos: list[tuple[Task, Example]] = []
        for task in self.sources:
            drawn = balanced_demos(task, self.settings.demos_per_class, rng)
            demos += [(task, demo) for demo in drawn]
        # Each text ends with a newline, where the output is taken.
        texts = [demonstration(task, demo) for task, demo in demos]
        self.vectors = mean_last_outputs(self.decoder, all_branches_of(self.model), texts)
        # Where a task has nothing to choose on, the published setting is taken.
        can_choose = all(task.validation for task in self.sources)
        grid = GRID if can_choose else GRID[:1]
        self.choose(grid, partial(self._calibrated, demos, rng))
        self.n_labelled = len(demos) + self.n_validation
        self.n_trained = self.scalars.numel()

    def applied(self, task: Task) -> Context:
        """Edits every branch."""
        return self._edited(self.scalars.to(self.decoder.device))

    def _edited(
        self, scalars: Scalars, noise: float = 0.0, draws: torch.Generator | None = None
    ) -> Context:
        vectors = self.vectors.to(scalars.device)

        def edit(place: int, output: Tensor) -> Tensor:
            vector_scale, output_scale = scalars[place].to(output.device)
            vector = vectors[place].to(output.device)
            changed = output_scale * output.float() + vector_scale * vector
            if noise:
                # A share of each token's output, and a constant to the gradient.
                size = changed.detach().norm(dim=-1, keepdim=True) * noise
                # Drawn on the CPU, so that every device sees the same noise.
                draw = torch.randn(changed.shape, generator=draws)
                changed = changed + draw.to(changed.device) * size
            return changed.to(output.dtype)

        return edited(all_branches_of(self.model), edit)

    def _calibrated(
        self,
        demos: Sequence[tuple[Task, Example]],
        rng: np.random.Generator,
        lr: float,
        noise: float,
    ) -> dict[str, Tensor]:
        """Returns what is learned with scalars that are trained anew."""
        decoder = self.decoder
        rows = answered(decoder, demos)
        first = [[FIRST_LAMBDA, FIRST_BETA]] * len(self.vectors)
        scalars = torch.tensor(first, device=decoder.device, requires_grad=True)
        n_steps = self.settings.i2cl_epochs * max(1, len(rows) // BATCH_SIZE)
        n_warm_up = max(1, round(WARM_UP * n_steps))
        optimizer = torch.optim.AdamW([scalars], lr=lr, weight_decay=WEIGHT_DECAY)
        schedule = get_cosine_schedule_with_warmup(optimizer, n_warm_up, n_steps)
        noise_draws = torch.Generator().manual_seed(int(rng.integers(2**31)))
        # As published, every step draws its rows anew instead of going through all of them.
        batches = []
        for _ in range(n_steps):
            order = rng.permutation(len(rows))
            batches.append(order[:BATCH_SIZE].tolist())

        def loss_of(batch_rows: list[int]) -> Tensor:
            token_lists = [rows[i][0] for i in batch_rows]
            answers = [rows[i][1] for i in batch_rows]
            batch = pad(token_lists, decoder.pad_id).to(decoder.device)
            logits = next_token_logits(decoder.model, batch)
            target = torch.tensor(answers, device=decoder.device)
            return nn.functional.cross_entropy(logits, target)

        steps = track(batches, "i2cl", [1] * n_steps, "steps")
        with frozen(decoder.model), self._edited(scalars, noise, noise_draws):
            losses = descend(optimizer, steps, loss_of, schedule)
        return {
            "vectors": self.vectors,
            "scalars": scalars.detach().cpu(),
            "losses": torch.stack(losses).cpu(),
        }
