"""ICV, in-context vectors (Liu et al. 2023): what an answer changes, turned into every MLP's output."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from icrouting.decoder.families import branches_of
from icrouting.decoder.hooks import edited
from icrouting.decoder.states import last_outputs
from icrouting.methods.base import Context, Method
from icrouting.tasks.prompts import balanced_demos, demonstration, few_shot
from icrouting.tasks.task import Example, Task

STRENGTHS = (0.1, 0.05, 0.02, 0.2)  # the published README's first
Demos = Sequence[tuple[Task, Example]]


def _pair(task: Task, demos: Demos) -> list[tuple[str, str]]:
    """Every demonstration without and with its answer, the published form."""
    return [(task.prompt(demo), demonstration(task, demo).removesuffix("\n")) for _, demo in demos]


def _few_minus_zero(task: Task, demos: Demos) -> list[tuple[str, str]]:
    """Every demonstration's prompt alone and behind the other demonstrations, so that both end alike."""
    others = [[*demos[:i], *demos[i + 1 :]] for i in range(len(demos))]
    return [
        (task.prompt(demo), few_shot(task, demo, rest).text)
        for (_, demo), rest in zip(demos, others, strict=True)
    ]


FORMS: dict[str, Callable[[Task, Demos], list[tuple[str, str]]]] = {
    "pair": _pair,
    "few-minus-zero": _few_minus_zero,
}


class ICV(Method):
    """Every MLP's output is turned towards a direction at every token, and keeps its norm.

    The direction is `icv_direction` of the changes of the last token's states, those of the embedding included
    while it is found. Strength and form (`FORMS`) are chosen on the validation slice; several tasks are pooled.

    Differs: texts are filled templates, where the published ones are rewritten sentences; the second form is ours;
    the edit is cast back to the model's dtype instead of to float16, and stands behind a post-norm.
    """

    name = "icv"
    learned = ("directions", "strength")
    cached = ("directions",)
    directions: Float[Tensor, "n_layers hidden_size"]
    strength: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Finds the directions, and chooses strength and form."""
        drawn = [
            (task, balanced_demos(task, self.settings.demos_per_class, rng))
            for task in self.sources
        ]

        @cache
        def directions(form: str) -> Float[Tensor, "n_layers hidden_size"]:
            texts = [
                pair
                for task, demos in drawn
                for pair in FORMS[form](task, [(task, demo) for demo in demos])
            ]
            before, after = (self._states(side) for side in zip(*texts, strict=True))
            n_layers, width = len(self.decoder.layers), self.decoder.hidden_size
            return icv_direction(after - before)[-n_layers * width :].view(n_layers, width)

        grid = [{"strength": strength, "form": form} for strength in STRENGTHS for form in FORMS]
        self.choose(
            grid,
            lambda strength, form: {
                "directions": directions(form),
                "strength": torch.tensor(strength),
            },
        )
        self.n_labelled = sum(len(demos) for _, demos in drawn) + self.n_validation

    def applied(self, task: Task) -> Context:
        """Turns the output of every MLP."""

        def edit(layer: int, output: Tensor) -> Tensor:
            return turned(output, self.directions[layer].to(output.device), float(self.strength))

        return edited(
            [branches_of(self.model, layer)[1] for layer in range(len(self.decoder.layers))], edit
        )

    def _states(self, texts: Sequence[str]) -> Float[Tensor, "n_texts width"]:
        """The last token's states, embedding and blocks side by side."""
        modules = [self.decoder.model.get_input_embeddings(), *self.decoder.layers]
        return torch.cat(last_outputs(self.decoder, modules, texts)[0], 1)


def icv_direction(changes: Float[Tensor, "n_texts width"]) -> Float[Tensor, "width"]:
    """Returns the mean of changes plus their first principal direction, of unit norm.

    The direction points to where the change that lies farthest along it lies, as in the published code. Changes
    that do not differ, and a single one, have none: Differs: then it is the mean alone.
    """
    mean = changes.mean(0)
    places, spread, axes = torch.linalg.svd(changes - mean, full_matrices=False)
    if spread[0] == 0:
        return mean
    return mean + places[places[:, 0].abs().argmax(), 0].sign() * axes[0]


def turned(output: Tensor, direction: Float[Tensor, "hidden_size"], strength: float) -> Tensor:
    """Returns states x of the same norms, |x| unit(unit(x) + strength (1 + max(0, cos(x, -u))) unit(u))."""
    states = output.float()
    against = 1 + cosine_similarity(states, -direction, dim=-1).clamp_min(0).unsqueeze(-1)
    mixed = normalize(states, dim=-1) + strength * against * normalize(direction, dim=-1)
    return (states.norm(dim=-1, keepdim=True) * normalize(mixed, dim=-1)).to(output.dtype)
