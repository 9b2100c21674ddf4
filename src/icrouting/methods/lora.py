"""LoRA (Hu et al. 2022) as the paper's table 8 has it: rank 32, in the last block or at the vocabulary head."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from icrouting.decoder.families import base_of, device_of, layers_of
from icrouting.decoder.partial import entering_states, late_entry
from icrouting.fitting.trunk import TrunkState, pad_states
from icrouting.methods.adapters import RANK, injected, load_peft
from icrouting.methods.base import Context, Method
from icrouting.methods.tuning import answered, tune
from icrouting.tasks.prompts import balanced_demos
from icrouting.tasks.task import Example, Task

EPOCHS = 20
# The paper names neither. Alphas over the rank are powers of two, so folding the scale into B loses nothing.
GRID = [{"lr": lr, "alpha": alpha} for alpha in (32, 64, 16) for lr in (3e-4, 1e-3, 1e-4)]
States = Sequence[tuple[TrunkState, int]]


class LoraBlock(Method):
    """A low-rank update of every linear module of the last block, trained on the answers of a few examples.

    As many examples as an in-context prompt holds, 5 per class of every task (paper, table 8), so 95 over its
    five tasks; training ends where the loss on validation rows is least. Differs: the paper says "the token
    classification head of the last layer", and its parameter counts fit neither this nor the head (`LoraHead`);
    alpha, learning rate and epochs, which it does not name, are chosen on validation rows. Experts that are
    fused into one weight get no update.
    """

    name = "lora-block"

    def learn(self, rng: np.random.Generator) -> None:
        """Trains one adapter on the pooled rows; the layers below the last one run once per row."""
        load_peft()
        pairs = [(task, row) for task in self.sources for row in self._rows(task, rng)]
        held = [(task, row) for task in self.sources for row in task.validation]
        if not pairs:
            raise ValueError("LoRA learns from labelled rows: give at least one source task")
        groups = [self._states(group) for group in (pairs, held)]
        self.choose(GRID, partial(self._trained, *groups, int(rng.integers(2**31))))
        self.n_labelled, self.n_trained = len(pairs) + len(held), self.n_cached(self.sources[0])

    def applied(self, task: Task) -> Context:
        """Puts the adapter into the model."""
        return injected(self.decoder.model, self._targets(), RANK, self.adapter)

    def n_cached(self, task: Task) -> int:
        """Returns the size of the adapter."""
        return sum(tensor.numel() for tensor in self.adapter.values())

    def tensors(self) -> dict[str, Tensor]:
        """Returns A and B of every module by peft's names, alpha / rank folded into B."""
        return self.adapter

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `tensors` gave."""
        self.adapter = tensors

    def _rows(self, task: Task, rng: np.random.Generator) -> Sequence[Example]:
        return balanced_demos(task, self.settings.demos_per_class, rng)

    def _n_epochs(self) -> int:
        return EPOCHS

    def _targets(self) -> list[str]:
        block = self.decoder.layers[-1]
        return _names(
            self.model, [part for part in block.modules() if isinstance(part, nn.Linear | Conv1D)]
        )

    def _states(self, pairs: Sequence[tuple[Task, Example]]) -> States:
        """Returns what enters the last block for every row, kept off the accelerator, and the row's answer."""
        rows, last = answered(self.decoder, pairs), len(self.decoder.layers) - 1
        hidden = entering_states(self.decoder, [tokens for tokens, _ in rows], last)
        kept = [
            TrunkState(tokens, states.cpu(), 0.0)
            for (tokens, _), states in zip(rows, hidden, strict=True)
        ]
        return [(state, answer) for state, (_, answer) in zip(kept, rows, strict=True)]

    def _trained(
        self, rows: States, held: States, seed: int, lr: float, alpha: int
    ) -> dict[str, Tensor]:
        base, rng = self.decoder.model, np.random.default_rng(seed)
        with torch.random.fork_rng(), injected(base, self._targets(), alpha, seed) as adapter:
            dropouts = nn.ModuleList(
                part for name, part in base.named_modules() if name.endswith(".lora_dropout")
            )
            with late_entry(base, len(layers_of(base)) - 1) as entry:

                def logits_of(states: list[TrunkState]) -> Tensor:
                    dropouts.train(torch.is_grad_enabled())
                    batch, hidden = pad_states(states, self.decoder.pad_id)
                    return entry(batch.to(device_of(base)), hidden)

                tune(
                    list(adapter.values()),
                    rows,
                    held,
                    logits_of,
                    lr=lr,
                    n_epochs=self._n_epochs(),
                    rng=rng,
                )
            scale = {name: alpha / RANK if ".lora_B." in name else 1.0 for name in adapter}
            return {name: (weight.detach() * scale[name]).cpu() for name, weight in adapter.items()}


class LoraHead(LoraBlock):
    """The same at the vocabulary head, the other reading of the paper; tied embeddings keep their own weights."""

    name = "lora-head"

    def _targets(self) -> list[str]:
        return _names(self.model, [self.decoder.model.get_output_embeddings()])


class LoraBlockMore(LoraBlock):
    """The same in the last block, on as many rows as the other trained methods see, ICR's own data (section 6)."""

    name = "lora-block-more"

    def _rows(self, task: Task, rng: np.random.Generator) -> Sequence[Example]:
        return [task.train[i] for i in rng.permutation(len(task.train))[: self.settings.train_rows]]

    def _n_epochs(self) -> int:
        return self.settings.train_epochs


def _names(model: nn.Module, modules: Sequence[nn.Module | None]) -> list[str]:
    return [
        name
        for name, part in base_of(model).named_modules()
        if any(part is module for module in modules)
    ]
