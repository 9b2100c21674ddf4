"""Learned task vectors in closed form: a linear map from the bare state to the few-shot one."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.hooks import edited_last
from icrouting.decoder.states import last_outputs
from icrouting.methods.base import Context, Method
from icrouting.tasks.prompts import balanced_demos, few_shot
from icrouting.tasks.task import Example, Task

# Places of the layers that are tried, as shares of the depth, and strengths of the ridge.
DEPTHS = (0.5, 0.7, 0.3, 0.85)
PENALTIES = (1.0, 0.1, 10.0)


class RidgeVectors(Method):
    """One block's output at the last token becomes a linear map of itself, fitted by ridge.

    The map takes the state of a bare prompt to the state of the same prompt behind demonstrations,
    5 per class, drawn anew for each of `--train-rows` rows; unlike Task Vectors' state, what comes
    out is another for each prompt. Layer and penalty are chosen on validation rows. The penalty is
    held against the mean square of the states, so that it means the same in every layer. After
    learned task vectors, of which the map is the linear form; it has no published code that it was
    compared with.

    Attributes:
        weight: of the map, [hidden_size, hidden_size].
        bias: likewise, [hidden_size].
        layer: the block whose output is mapped, [1].
    """

    name = "task-vectors-ridge"
    learned = ("weight", "bias", "layer")
    cached = ("weight", "bias")
    weight: Float[Tensor, "hidden_size hidden_size"]
    bias: Float[Tensor, "hidden_size"]
    layer: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Records states with and without demonstrations, and chooses a map."""
        bare_texts = []
        shown_texts = []
        for task in self.sources:
            for place in rng.permutation(len(task.train))[: self.settings.train_rows]:
                bare_texts.append(task.prompt(task.train[place]))
                shown_texts.append(self._behind_demos(task, int(place), rng))
        layers = self._layers()
        blocks = [self.decoder.layers[layer] for layer in layers]
        bare, _ = last_outputs(self.decoder, blocks, bare_texts)
        shown, _ = last_outputs(self.decoder, blocks, shown_texts)
        states = dict(zip(layers, zip(bare, shown, strict=True), strict=True))
        grid = [{"layer": layer, "penalty": each} for each in PENALTIES for layer in layers]
        self.choose(grid, partial(self._fitted, states))
        # Any training row may be a demonstration.
        n_train = sum(len(task.train) for task in self.sources)
        self.n_labelled = n_train + self.n_validation
        self.n_trained = 0

    def _behind_demos(self, task: Task, place: int, rng: np.random.Generator) -> str:
        """Returns a training row's prompt behind demonstrations that it is none of."""
        demos = balanced_demos(task, self.settings.demos_per_class, rng, exclude=[place])
        pairs: list[tuple[Task, Example]] = [(task, demo) for demo in demos]
        return few_shot(task, task.train[place], pairs).text

    def _layers(self) -> Sequence[int]:
        """Returns the layers to try; of a shallow model the depths may fall together."""
        n_layers = len(self.decoder.layers)
        return list(dict.fromkeys(int(depth * n_layers) for depth in DEPTHS))

    def _fitted(
        self, states: dict[int, tuple[Tensor, Tensor]], layer: int, penalty: float
    ) -> dict[str, Tensor]:
        bare, shown = states[layer]
        weight, bias = ridge(bare, shown, penalty)
        return {"weight": weight, "bias": bias, "layer": torch.tensor([layer])}

    def applied(self, task: Task) -> Context:
        """Maps the state at each row's last token, but in no step of a generation."""
        block = self.decoder.layers[int(self.layer)]

        def mapped(place: int, states: Tensor) -> Tensor:
            weight = self.weight.to(states.device)
            new_states = states.float() @ weight + self.bias.to(states.device)
            return new_states.to(states.dtype)

        return edited_last(self.model, [block], mapped, in_steps=False)


def ridge(
    inputs: Float[Tensor, "n hidden_size"],
    outputs: Float[Tensor, "n hidden_size"],
    penalty: float,
) -> tuple[Float[Tensor, "hidden_size hidden_size"], Float[Tensor, "hidden_size"]]:
    """Returns weight and bias of the linear map with the least squared error and penalty.

    What is penalised is the map's distance from the identity, so that many prompts more than few
    move it away from doing nothing. The bias is free.

    Args:
        inputs: what is mapped.
        outputs: to what.
        penalty: in units of n times the mean square of the centred inputs.
    """
    inputs = inputs.double()
    outputs = outputs.double()
    middle = inputs.mean(0)
    centred = inputs - middle
    moves = outputs - inputs
    mean_move = moves.mean(0)
    width = inputs.shape[1]
    strength = penalty * centred.square().sum() / width
    gram = centred.T @ centred + strength * torch.eye(width, dtype=torch.float64)
    change = torch.linalg.solve(gram, centred.T @ (moves - mean_move))
    weight = torch.eye(width, dtype=torch.float64) + change
    bias = mean_move - middle @ change
    return weight.float(), bias.float()
