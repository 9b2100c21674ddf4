"""LoRA (Hu et al. 2022) as in the paper's table 8: rank 32, last block or head."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from icrouting.decoder.families import base_of
from icrouting.decoder.partial import entering_states, late_entry
from icrouting.fitting.trunk import TrunkState, pad_states
from icrouting.methods.adapters import RANK, injected, load_peft
from icrouting.methods.base import Context, Method
from icrouting.methods.tuning import AnsweredRow, answered, tune
from icrouting.tasks.prompts import balanced_demos
from icrouting.tasks.task import Example, Task

EPOCHS = 20
# The paper names neither. Alphas over the rank are powers of two, so folding the scale into B
# loses nothing.
GRID = [{"lr": lr, "alpha": alpha} for alpha in (32, 64, 16) for lr in (3e-4, 1e-3, 1e-4)]

Pairs = list[tuple[Task, Example]]
States = Sequence[AnsweredRow[TrunkState]]


class LoraBlock(Method):
    """A low-rank update of every linear module of the last block.

    It is trained on as many examples as an in-context prompt holds, 5 per class of every task
    (paper, table 8), so 95 over its five tasks; the loss is that of the answers, and training ends
    where it is least on validation rows. Differs: the paper says "the token classification head of
    the last layer", and its parameter counts fit neither this nor the head (`LoraHead`); alpha,
    learning rate and epochs, which it does not name, are chosen on validation rows. Experts that
    are fused into one weight get no update.
    """

    name = "lora-block"

    def learn(self, rng: np.random.Generator) -> None:
        """Trains one adapter on the pooled rows; lower layers run once per row."""
        # Where peft is missing, that is said before anything is run.
        load_peft()
        pairs: Pairs = []
        held_pairs: Pairs = []
        for task in self.sources:
            pairs += [(task, row) for row in self._rows(task, rng)]
            held_pairs += [(task, row) for row in task.validation]
        if not pairs:
            raise ValueError("LoRA learns from labelled rows: give at least one source task")
        states = self._states(pairs)
        held_states = self._states(held_pairs)
        # One seed for all settings, so that they differ in nothing else.
        seed = int(rng.integers(2**31))
        self.choose(GRID, partial(self._trained, states, held_states, seed))
        self.n_labelled = len(pairs) + len(held_pairs)
        self.n_trained = self.n_cached(self.sources[0])

    def applied(self, task: Task) -> Context:
        """Puts the adapter into the model."""
        # The scale is folded into B, so alpha equals the rank here.
        return injected(self.decoder.base, self._targets(), RANK, self.adapter)

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
        linear = [part for part in block.modules() if isinstance(part, nn.Linear | Conv1D)]
        return _names(self.model, linear)

    def _states(self, pairs: Pairs) -> States:
        """Returns what enters the last block for every row, and the row's answer.

        The states are kept off the accelerator.
        """
        rows = answered(self.decoder, pairs)
        last_layer = len(self.decoder.layers) - 1
        token_lists = [tokens for tokens, _ in rows]
        entering = entering_states(self.decoder, token_lists, last_layer)
        states = []
        for (tokens, answer), hidden in zip(rows, entering, strict=True):
            # Only the training of a router reads the entropy.
            state = TrunkState(tokens, hidden.cpu(), entropy=0.0)
            states.append((state, answer))
        return states

    def _trained(
        self, states: States, held_states: States, seed: int, lr: float, alpha: int
    ) -> dict[str, Tensor]:
        """Returns an adapter trained from a new start; `seed` is that of start and order."""
        decoder = self.decoder
        model = decoder.base
        # peft draws the start, and dropout its masks, from the global generator.
        with torch.random.fork_rng(), injected(model, self._targets(), alpha, seed) as adapter:
            dropouts = dropouts_of(model)
            with late_entry(model, len(decoder.layers) - 1) as entry:

                def logits_of(batch_states: list[TrunkState]) -> Tensor:
                    # Rows that are held back are read without gradients, and without dropout.
                    is_training = torch.is_grad_enabled()
                    dropouts.train(is_training)
                    batch, hidden = pad_states(batch_states, decoder.pad_id)
                    return entry(batch.to(decoder.device), hidden)

                tune(
                    list(adapter.values()),
                    states,
                    held_states,
                    logits_of,
                    lr=lr,
                    n_epochs=self._n_epochs(),
                    rng=np.random.default_rng(seed),
                )
            return folded(adapter, alpha / RANK)


class LoraHead(LoraBlock):
    """The same at the vocabulary head, the other reading of the paper.

    Tied embeddings keep their own weights.
    """

    name = "lora-head"

    def _targets(self) -> list[str]:
        return _names(self.model, [self.decoder.base.get_output_embeddings()])


class LoraBlockMore(LoraBlock):
    """The same in the last block, on as many rows as the other trained methods see.

    These are ICR's own data (section 6).
    """

    name = "lora-block-more"

    def _rows(self, task: Task, rng: np.random.Generator) -> Sequence[Example]:
        picked = rng.permutation(len(task.train))[: self.settings.train_rows]
        return [task.train[i] for i in picked]

    def _n_epochs(self) -> int:
        return self.settings.train_epochs


def _names(model: nn.Module, modules: Sequence[nn.Module | None]) -> list[str]:
    """Returns the full names of some of a model's modules, in the model's order."""
    # Modules are told apart by identity: equal ones stand in every block.
    ids = {id(module) for module in modules}
    named = base_of(model).named_modules()
    return [name for name, part in named if id(part) in ids]


def dropouts_of(model: nn.Module) -> nn.ModuleList:
    """Returns the dropouts of a model's adapter, to be turned on and off together."""
    parts = [part for name, part in model.named_modules() if name.endswith(".lora_dropout")]
    return nn.ModuleList(parts)


def folded(adapter: dict[str, nn.Parameter], scale: float) -> dict[str, Tensor]:
    """Returns an adapter's weights, those of B scaled, off the accelerator."""
    folded = {}
    for name, weight in adapter.items():
        factor = scale if ".lora_B." in name else 1.0
        folded[name] = (weight.detach() * factor).cpu()
    return folded
