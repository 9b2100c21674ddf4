"""Task Vectors (Hendel et al. 2023): the last token's state under demonstrations, put in its place without."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hooks import edited_last
from icrouting.decoder.scoring import option_ids
from icrouting.decoder.states import last_token_variants, mean_last_outputs
from icrouting.methods.base import Context, Method
from icrouting.tasks.prompts import balanced_demos, few_shot
from icrouting.tasks.task import Example, Task

N_DUMMIES = 2


class TaskVectors(Method):
    """One block's output at the last token is replaced by what it was under demonstrations.

    The state is a mean over two dummy queries behind 5 demonstrations per class; the layer is the best on the
    validation slice, the earliest of equals. Over several tasks, states and validation slices are pooled.
    """

    name = "task-vectors"
    learned = ("vectors", "accuracies")

    def learn(self, rng: np.random.Generator) -> None:
        """Records the states and chooses the layer."""
        validation = [(task, example) for task in self.sources for example in task.validation]
        if not validation:
            raise ValueError(
                "task vectors choose their layer on validation rows: give 5 training rows or more"
            )
        shown = [_few_shot_texts(task, self.settings.demos_per_class, rng) for task in self.sources]
        texts, n_demos = [texts for texts, _ in shown], sum(n_demos for _, n_demos in shown)
        blocks = list(self.decoder.layers)
        states = [mean_last_outputs(self.decoder, blocks, prompts) for prompts in texts]
        self.vectors = torch.stack(states).mean(0)
        self.accuracies = sweep(self.decoder, validation, self.vectors)
        self.tried = [
            {"layer": layer, "accuracy": found}
            for layer, found in enumerate(self.accuracies.tolist())
        ]
        self.n_labelled = len(validation) + n_demos

    @property
    def layer(self) -> int:
        """The layer whose output is replaced: the best on validation, the earliest of equals."""
        return int(self.accuracies.argmax())

    def n_cached(self, task: Task) -> int:
        """Returns the size of one state."""
        return self.vectors.shape[-1]

    def applied(self, task: Task) -> Context:
        """Replaces the state at each row's last token, but in no step of a generation."""
        vector, block = self.vectors[self.layer], self.decoder.layers[self.layer]
        return edited_last(self.model, [block], lambda _, states: vector.to(states), in_steps=False)


def _few_shot_texts(task: Task, per_class: int, rng: np.random.Generator) -> tuple[list[str], int]:
    """Returns the dummy queries behind demonstrations, none of which they are, and the number of those."""
    demos = [(task, demo) for demo in balanced_demos(task, per_class, rng)]
    used = {id(demo) for _, demo in demos}
    spare = [example for example in task.train if id(example) not in used] or list(task.train)
    return [
        few_shot(task, spare[i], demos).text for i in rng.permutation(len(spare))[:N_DUMMIES]
    ], len(demos)


@torch.no_grad()
def sweep(
    decoder: Decoder,
    items: Sequence[tuple[Task, Example]],
    vectors: Float[Tensor, "n_layers hidden_size"],
    kept: float = 0.0,
) -> Float[Tensor, "n_layers"]:
    """Returns the accuracy on labelled items with each layer's vector in its place, or added to `kept` of its state.

    Exact at the price of one pass per item and one token per layer, since the tokens before the last do not depend
    on the vector.
    """
    hits = torch.zeros(len(vectors))

    def replace(group: Int[Tensor, "n"], layer: int, states: Tensor) -> Tensor:
        replaced, rows = states.clone(), (group == layer).nonzero()[:, 0]
        replaced[rows] = (kept * states[rows].float() + vectors[layer].to(states.device)).to(
            states.dtype
        )
        return replaced

    for task, example in items:
        prompt = task.prompt(example)
        ids = option_ids(decoder.tokenizer, prompt, task.options(example))
        (tokens,) = decoder.tokenize([prompt])
        found = last_token_variants(
            decoder.model, tokens, len(vectors), list(decoder.layers), replace
        )
        hits += torch.cat([(logits[:, ids].argmax(1) == example.label).cpu() for logits in found])
    return hits / max(1, len(items))
