"""LoRA (Hu et al. 2022) on the query and value projections of all layers."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from icrouting.decoder.batches import pad
from icrouting.decoder.passes import next_token_logits
from icrouting.methods.adapters import RANK, injected, load_peft
from icrouting.methods.descent import descend, in_batches
from icrouting.methods.distilling import Lessons, lessons_of, mimicry
from icrouting.methods.lora import LoraBlockMore, Pairs, dropouts_of, folded
from icrouting.methods.tuning import BATCH_SIZE, AnsweredRow, answered, tune
from icrouting.runtime.progress import track

GRID = [{"lr": lr, "alpha": alpha} for alpha in (32, 64) for lr in (3e-4, 1e-4, 1e-3)]
# Where each family has them; in the others they are a part of one projection.
SEPARATE = ("q_proj", "v_proj")
FUSED = ("qkv_proj", "query_key_value", "c_attn")


class LoraQv(LoraBlockMore):
    """A low-rank update of every layer's query and value projections.

    What Hu et al. found best for their budget, and what most people mean by LoRA. It is trained on
    `--train-rows` rows a task by the cross-entropy of the answers, as `lora-block-more` is. Where a
    family has queries, keys and values in one projection, that whole projection is updated.
    """

    name = "lora-qv"
    grid = GRID

    def _targets(self) -> list[str]:
        """Returns the full names of the projections.

        Raises:
            ValueError: the model has neither these nor a fused one.
        """
        stack = self.decoder.stack
        for kinds in (SEPARATE, FUSED):
            # The stack's own alone: a model of images has attention beside it.
            chosen = {id(part) for name, part in stack.named_modules() if _last(name) in kinds}
            if chosen:
                named = self.decoder.base.named_modules()
                return [name for name, part in named if id(part) in chosen]
        model_type = stack.config.model_type
        raise ValueError(
            f"{self.name} looks for projections called {', '.join((*SEPARATE, *FUSED))}, and "
            f"{model_type!r} models have none"
        )

    def learn(self, rng: np.random.Generator) -> None:
        """Trains one adapter on the pooled rows; every layer runs in each step."""
        # Where peft is missing, that is said before anything is run.
        load_peft()
        pairs: Pairs = []
        held_pairs: Pairs = []
        for task in self.sources:
            pairs += [(task, row) for row in self._rows(task, rng)]
            held_pairs += [(task, row) for row in task.validation]
        rows = answered(self.decoder, pairs)
        held = answered(self.decoder, held_pairs)
        seed = int(rng.integers(2**31))
        self.choose(self.grid, partial(self._tuned, rows, held, seed))
        self.n_labelled = len(pairs) + len(held_pairs)
        self.n_trained = self.n_cached(self.sources[0])

    def _tuned(
        self,
        rows: Sequence[AnsweredRow[list[int]]],
        held: Sequence[AnsweredRow[list[int]]],
        seed: int,
        lr: float,
        alpha: int,
    ) -> dict[str, Tensor]:
        """Returns an adapter trained from a new start; `seed` is that of start and order."""
        model = self.decoder.base
        # peft draws the start, and dropout its masks, from the global generator.
        with torch.random.fork_rng(), injected(model, self._targets(), alpha, seed) as adapter:
            dropouts = dropouts_of(model)

            def logits_of(token_lists: list[list[int]]) -> Tensor:
                dropouts.train(torch.is_grad_enabled())
                return self._logits(token_lists)

            tune(
                list(adapter.values()),
                rows,
                held,
                logits_of,
                lr=lr,
                n_epochs=self._n_epochs(),
                rng=np.random.default_rng(seed),
            )
            return folded(adapter, alpha / RANK)

    def _logits(self, token_lists: Sequence[Sequence[int]]) -> Tensor:
        batch = pad(token_lists, self.decoder.pad_id).to(self.decoder.device)
        return next_token_logits(self.decoder.base, batch)


class LoraQvDistilled(LoraQv):
    """The same, taught by the few-shot prompts of the frozen model.

    The loss is the Kullback-Leibler divergence from what the model says of the next token behind
    demonstrations to what it says without; no label of the row itself is read but by the choice of
    the learning rate on validation rows. Of whole labels it is taught every place where an answer
    parts from others, as LIVE and M2IV are.
    """

    name = "lora-qv-distilled"

    def learn(self, rng: np.random.Generator) -> None:
        """Trains one adapter to answer as the model does behind demonstrations."""
        load_peft()
        lessons = lessons_of(self, rng)
        seed = int(rng.integers(2**31))
        self.choose(self.grid, partial(self._taught, lessons, seed))
        n_rows = [min(len(task.train), self.settings.train_rows) for task in self.sources]
        # Their labels are shown, in other rows' demonstrations.
        self.n_labelled = sum(n_rows) + self.n_validation
        self.n_trained = self.n_cached(self.sources[0])

    def _taught(self, lessons: Lessons, seed: int, lr: float, alpha: int) -> dict[str, Tensor]:
        """Returns an adapter trained from a new start; `seed` is that of start and order."""
        model = self.decoder.base
        rng = np.random.default_rng(seed)
        with torch.random.fork_rng(), injected(model, self._targets(), alpha, seed) as adapter:
            dropouts_of(model).train()
            optimizer = torch.optim.AdamW(list(adapter.values()), lr=lr, weight_decay=0.0)

            def loss_of(rows: Sequence[int]) -> Tensor:
                logits = self._logits([lessons.token_lists[row] for row in rows])
                return mimicry(logits, lessons, rows)

            n_epochs = self._n_epochs()
            for _ in track(range(n_epochs), "distilling", [1] * n_epochs, "epochs"):
                order = rng.permutation(len(lessons.labels)).tolist()
                descend(optimizer, in_batches(order, BATCH_SIZE), loss_of)
            return folded(adapter, alpha / RANK)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
