"""I2CL, implicit in-context learning (Li et al. 2024): context vectors added to every branch, with trained scalars."""

from collections.abc import Sequence

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
from icrouting.methods.settings import Settings
from icrouting.methods.tuning import answered
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import balanced_demos, demonstration
from icrouting.tasks.task import Example, Task

WEIGHT_DECAY, WARM_UP, BATCH_SIZE = 1e-3, 0.05, 2
GRID = [
    {"lr": lr, "noise": noise} for lr in (1e-2, 3e-3) for noise in (1e-3, 0.0)
]  # as published, then others
FIRST_LAMBDA, FIRST_BETA = 0.1, 1.0
PUBLISHED_EPOCHS = 100
Scalars = Float[Tensor, "n_branches 2"]


class I2CL(Method):
    """Every branch gives beta * output + lambda * vector, at every token and layer.

    The vectors are means over demonstrations, each run alone, of the branch's output at its last token; the
    two scalars per branch are calibrated on the same demonstrations, with a learning rate and a noise that are chosen
    on validation rows. Several tasks are pooled. Differs: the model keeps its dtype, where the published code runs
    in float32; edits are computed in float32.
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
        return [f"I2CL is calibrated for {epochs} epochs (published: {PUBLISHED_EPOCHS})."]

    def learn(self, rng: np.random.Generator) -> None:
        """Records the vectors and calibrates the scalars."""
        per_class = self.settings.demos_per_class
        demos = [
            (task, demo) for task in self.sources for demo in balanced_demos(task, per_class, rng)
        ]
        shown = [
            demonstration(*demo) for demo in demos
        ]  # each ends with a newline, where the output is taken
        self.vectors = mean_last_outputs(self.decoder, all_branches_of(self.model), shown)
        grid = GRID if all(task.validation for task in self.sources) else GRID[:1]
        self.choose(grid, lambda lr, noise: self._calibrated(demos, rng, lr, noise))
        self.n_labelled, self.n_trained = len(demos) + self.n_validation, self.scalars.numel()

    def applied(self, task: Task) -> Context:
        """Edits every branch."""
        return self._edited(self.scalars.to(self.decoder.device))

    def _edited(
        self, scalars: Scalars, noise: float = 0.0, draws: torch.Generator | None = None
    ) -> Context:
        vectors = self.vectors.to(scalars.device)

        def edit(place: int, output: Tensor) -> Tensor:
            injected, own = scalars[place].to(output.device)
            changed = own * output.float() + injected * vectors[place].to(output.device)
            if noise:
                size = changed.detach().norm(dim=-1, keepdim=True) * noise
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
        token_lists, labels = zip(*answered(decoder, demos), strict=True)
        scalars = torch.tensor(
            [[FIRST_LAMBDA, FIRST_BETA]] * len(self.vectors), device=decoder.device
        )
        scalars.requires_grad_()
        n_steps = self.settings.i2cl_epochs * max(1, len(demos) // BATCH_SIZE)
        optimizer = torch.optim.AdamW([scalars], lr=lr, weight_decay=WEIGHT_DECAY)
        schedule = get_cosine_schedule_with_warmup(
            optimizer, max(1, round(WARM_UP * n_steps)), n_steps
        )
        draws, losses = torch.Generator().manual_seed(int(rng.integers(2**31))), []
        with frozen(decoder.model), self._edited(scalars, noise, draws), torch.enable_grad():
            for _ in track(range(n_steps), "i2cl", [1] * n_steps, "steps"):
                rows = rng.permutation(len(demos))[:BATCH_SIZE]
                batch = pad([token_lists[row] for row in rows], decoder.pad_id).to(decoder.device)
                target = torch.tensor([labels[row] for row in rows], device=decoder.device)
                loss = nn.functional.cross_entropy(next_token_logits(decoder.model, batch), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
        return {
            "vectors": self.vectors,
            "scalars": scalars.detach().cpu(),
            "losses": torch.tensor(losses),
        }
