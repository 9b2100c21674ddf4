"""ICV, in-context vectors (Liu et al. 2023): every MLP's output is turned."""

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
from icrouting.tasks.prompts import answered, balanced_demos, few_shot
from icrouting.tasks.task import Example, Task

# The published README's first.
STRENGTHS = (0.1, 0.05, 0.02, 0.2)


# Two texts; a direction is found from how the states at their last tokens differ.
TextPair = tuple[str, str]
Form = Callable[[Task, Sequence[Example]], list[TextPair]]


def _pair(task: Task, demos: Sequence[Example]) -> list[TextPair]:
    """Returns every demonstration without and with its answer, the published form."""
    pairs = []
    for demo in demos:
        # The direction is read at the answer's last token, not at the newline behind it.
        pairs.append((task.prompt(demo), answered(task, demo)))
    return pairs


def _few_minus_zero(task: Task, demos: Sequence[Example]) -> list[TextPair]:
    """Returns every demonstration's prompt alone and behind the others.

    Both end alike, so that the others alone make the difference.
    """
    pairs = []
    for place, demo in enumerate(demos):
        # By place, since two demonstrations may be equal.
        others = [*demos[:place], *demos[place + 1 :]]
        context = [(task, other) for other in others]
        behind_others = few_shot(task, demo, context)
        pairs.append((task.prompt(demo), behind_others.text))
    return pairs


FORMS: dict[str, Form] = {
    "pair": _pair,
    "few-minus-zero": _few_minus_zero,
}


class ICV(Method):
    """Every MLP's output is turned towards a direction, and keeps its norm.

    The edit is at every token. The direction is `icv_direction` of the changes of the last token's
    states, those of the embedding included while it is found. Strength and form (`FORMS`) are
    chosen on the validation slice; several tasks are pooled.

    Differs: texts are filled templates, where the published ones are rewritten sentences; the
    second form is ours; the edit is cast back to the model's dtype instead of to float16, and
    stands behind a post-norm.
    """

    name = "icv"
    learned = ("directions", "strength")
    cached = ("directions",)
    directions: Float[Tensor, "n_layers hidden_size"]
    strength: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Finds the directions, and chooses strength and form."""
        demos_by_task = [
            balanced_demos(task, self.settings.demos_per_class, rng) for task in self.sources
        ]

        # The strength has no part in a form's directions, and a form that is not tried costs none.
        @cache
        def directions(form: str) -> Float[Tensor, "n_layers hidden_size"]:
            return self._directions(form, demos_by_task)

        def build(strength: float, form: str) -> dict[str, Tensor]:
            return {"directions": directions(form), "strength": torch.tensor(strength)}

        grid = [{"strength": strength, "form": form} for strength in STRENGTHS for form in FORMS]
        self.choose(grid, build)
        n_demos = sum(len(demos) for demos in demos_by_task)
        self.n_labelled = n_demos + self.n_validation

    def applied(self, task: Task) -> Context:
        """Turns the output of every MLP."""
        mlps = []
        for layer in range(len(self.decoder.layers)):
            _, mlp = branches_of(self.model, layer)
            mlps.append(mlp)

        def turn(layer: int, output: Tensor) -> Tensor:
            direction = self.directions[layer].to(output.device)
            return turned(output, direction, float(self.strength))

        return edited(mlps, turn)

    def _directions(
        self, form: str, demos_by_task: Sequence[Sequence[Example]]
    ) -> Float[Tensor, "n_layers hidden_size"]:
        """Returns every layer's direction, from the demonstrations of each source."""
        pairs = []
        for task, demos in zip(self.sources, demos_by_task, strict=True):
            pairs += FORMS[form](task, demos)
        before = self._states([text for text, _ in pairs])
        after = self._states([text for _, text in pairs])
        direction = icv_direction(after - before)

        # The embedding's part stands first and is dropped: no MLP belongs to it.
        n_layers = len(self.decoder.layers)
        width = self.decoder.hidden_size
        return direction[-n_layers * width :].view(n_layers, width)

    def _states(self, texts: Sequence[str]) -> Float[Tensor, "n_texts width"]:
        """Returns the last token's states, embedding and blocks side by side."""
        modules = [self.decoder.base.get_input_embeddings(), *self.decoder.layers]
        states, _ = last_outputs(self.decoder, modules, texts)
        return torch.cat(states, 1)


def icv_direction(changes: Float[Tensor, "n_texts width"]) -> Float[Tensor, "width"]:
    """Returns the mean of changes plus their first principal direction, of unit norm.

    The direction points to where the change that lies farthest along it lies, as in the published
    code. Changes that do not differ, and a single one, have none: Differs: then it is the mean
    alone.
    """
    mean = changes.mean(0)
    coordinates, spreads, axes = torch.linalg.svd(changes - mean, full_matrices=False)
    if spreads[0] == 0:
        return mean
    # The decomposition leaves the sign of an axis open.
    along_first = coordinates[:, 0]
    farthest = along_first.abs().argmax()
    return mean + along_first[farthest].sign() * axes[0]


def turned(output: Tensor, direction: Float[Tensor, "hidden_size"], strength: float) -> Tensor:
    """Returns states turned towards a direction, of the same norms as before.

    A state x becomes |x| unit(unit(x) + strength (1 + max(0, cos(x, -u))) unit(u)), where u is the
    direction: the farther a state points away from it, the more it is turned.
    """
    states = output.float()
    cosines = cosine_similarity(states, -direction, dim=-1)
    against = cosines.clamp_min(0).unsqueeze(-1)
    step = strength * (1 + against) * normalize(direction, dim=-1)
    mixed = normalize(states, dim=-1) + step
    norms = states.norm(dim=-1, keepdim=True)
    rescaled = norms * normalize(mixed, dim=-1)
    return rescaled.to(output.dtype)
