"""Task Vectors (Hendel et al. 2023): a state under demonstrations, kept."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hooks import edited_last
from icrouting.decoder.scoring import option_ids, score
from icrouting.decoder.states import last_token_variants, mean_last_outputs
from icrouting.methods.base import Context, Method
from icrouting.tasks.prompts import balanced_demos, few_shot, zero_shot
from icrouting.tasks.task import Example, Task

N_DUMMIES = 2


class TaskVectors(Method):
    """One block's output at the last token is replaced by a fixed state.

    It is what the block gave under demonstrations, a mean over two dummy queries behind 5
    demonstrations per class; the layer is the best on the validation slice, the earliest of equals.
    Over several tasks, states and validation slices are pooled.
    """

    name = "task-vectors"
    learned = ("vectors", "accuracies")
    vectors: Float[Tensor, "n_layers hidden_size"]
    accuracies: Float[Tensor, "n_layers"]

    def learn(self, rng: np.random.Generator) -> None:
        """Records the states and chooses the layer."""
        validation = [(task, example) for task in self.sources for example in task.validation]
        if not validation:
            raise ValueError(
                "task vectors choose their layer on validation rows: give 5 training rows or more"
            )

        # All texts are drawn before any is run: the draws stand in one place.
        texts_by_task = []
        n_demos = 0
        for task in self.sources:
            demos = balanced_demos(task, self.settings.demos_per_class, rng)
            texts_by_task.append(_dummy_texts(task, demos, rng))
            n_demos += len(demos)

        # A mean of means, so that every task weighs the same.
        blocks = list(self.decoder.layers)
        states = [mean_last_outputs(self.decoder, blocks, texts) for texts in texts_by_task]
        self.vectors = torch.stack(states).mean(0)

        self.accuracies = sweep(self.decoder, validation, self.vectors)
        self.tried = [
            {"layer": layer, "accuracy": accuracy}
            for layer, accuracy in enumerate(self.accuracies.tolist())
        ]
        self.n_labelled = len(validation) + n_demos

    @property
    def layer(self) -> int:
        """The layer whose output is replaced: the earliest of the best."""
        return int(self.accuracies.argmax())

    def n_cached(self, task: Task) -> int:
        """Returns the size of one state."""
        return self.vectors.shape[-1]

    def applied(self, task: Task) -> Context:
        """Replaces the state at each row's last token, but in no step of a generation."""
        vector = self.vectors[self.layer]
        block = self.decoder.layers[self.layer]

        def replace(place: int, states: Tensor) -> Tensor:
            return vector.to(states)

        return edited_last(self.model, [block], replace, in_steps=False)


def _dummy_texts(task: Task, demos: Sequence[Example], rng: np.random.Generator) -> list[str]:
    """Returns few-shot texts whose dummy queries are no demonstrations.

    Where the demonstrations leave no row over, any training row may be a dummy query.
    """
    # By identity, since two rows may read alike.
    demo_ids = {id(demo) for demo in demos}
    spare = [example for example in task.train if id(example) not in demo_ids]
    if not spare:
        spare = list(task.train)
    context = [(task, demo) for demo in demos]
    order = rng.permutation(len(spare))
    texts = []
    for index in order[:N_DUMMIES]:
        prompt = few_shot(task, spare[index], context)
        texts.append(prompt.text)
    return texts


@torch.no_grad()
def sweep(
    decoder: Decoder,
    items: Sequence[tuple[Task, Example]],
    vectors: Float[Tensor, "n_layers hidden_size"],
    kept: float = 0.0,
) -> Float[Tensor, "n_layers"]:
    """Returns the accuracy on labelled items with each layer's vector in force.

    Exact at the price of one pass per item and one token per layer, since the tokens before the
    last do not depend on the vector. Where a task scores whole labels, items are scored anew under
    each layer's vector.

    Args:
        decoder: the frozen model and its tokenizer.
        items: examples, each with the task it is of.
        vectors: one for each layer, tried one at a time.
        kept: how much of the layer's state stays: at 0 the vector replaces it, at 1 it is added.
    """
    blocks = list(decoder.layers)
    n_layers = len(vectors)
    hits = torch.zeros(n_layers)

    def replace(variants: Int[Tensor, "n"], layer: int, states: Tensor) -> Tensor:
        # Variant number i differs from the plain prompt at layer i alone.
        rows = (variants == layer).nonzero()[:, 0]
        vector = vectors[layer].to(states.device)
        mixed = kept * states[rows].float() + vector
        replaced = states.clone()
        replaced[rows] = mixed.to(states.dtype)
        return replaced

    for task, example in items:
        if task.spec.label_scoring != "first":
            hits += _right_by_layer(decoder, task, example, vectors, kept)
            continue
        prompt = task.prompt(example)
        ids = option_ids(decoder.tokenizer, prompt, task.options(example), task.joint)
        (tokens,) = decoder.tokenize([prompt])
        right = []
        for logits in last_token_variants(decoder.model, tokens, n_layers, blocks, replace):
            option_logits = logits[:, ids]
            # What is not finite is no answer, so it cannot be right.
            is_answer = option_logits.isfinite().all(1)
            right.append(((option_logits.argmax(1) == example.label) & is_answer).cpu())
        hits += torch.cat(right)
    return hits / max(1, len(items))


def _right_by_layer(
    decoder: Decoder,
    task: Task,
    example: Example,
    vectors: Float[Tensor, "n_layers hidden_size"],
    kept: float,
) -> Bool[Tensor, "n_layers"]:
    """Returns under which layers' vectors the best whole label is the right one."""
    right = []
    for block, vector in zip(decoder.layers, vectors, strict=True):

        def mix(place: int, states: Tensor, vector: Tensor = vector) -> Tensor:
            mixed = kept * states.float() + vector.to(states.device)
            return mixed.to(states.dtype)

        with edited_last(decoder.model, [block], mix, in_steps=False):
            scores = score(
                decoder,
                [zero_shot(task, example)],
                task.options(example),
                label_scoring=task.spec.label_scoring,
                finite_only=False,
            )
        is_answer = bool(scores.isfinite().all())
        right.append(is_answer and int(scores.argmax()) == example.label)
    return torch.tensor(right)
