"""Task Vectors (Hendel et al. 2023): the last token's state under demonstrations, put in its place without."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from icrouting.batches import by_length, context_length, pad, pad_id_of, tokenize
from icrouting.edits import edited, last_of, last_tokens, recorded
from icrouting.families import CACHE, device_of, layers_of
from icrouting.methods.base import Method
from icrouting.prompts import balanced_demos, few_shot
from icrouting.scoring import last_position_only, next_token_logits, option_ids
from icrouting.tasks import Example, Task

N_DUMMIES = 2
TOKEN_BUDGET = 4096


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
            raise ValueError("task vectors choose their layer on validation rows: give 5 training rows or more")
        per_class = self.settings.demos_per_class
        states = [_states(self.model, self.tokenizer, task, per_class, rng) for task in self.sources]
        self.vectors = torch.stack(states).mean(0)
        self.accuracies = sweep(self.model, self.tokenizer, validation, self.vectors)

    @property
    def layer(self) -> int:
        """The layer whose output is replaced: the best on validation, the earliest of equals."""
        return int(self.accuracies.argmax())

    def n_cached(self, task: Task) -> int:
        """Returns the size of one state."""
        return self.vectors.shape[-1]

    @contextmanager
    def applied(self, task: Task) -> Iterator[None]:
        """Replaces the state at each row's last token."""
        with last_tokens(self.model) as positions:

            def replace(place: int, hidden: Tensor) -> Tensor:
                hidden = hidden.clone()
                rows = torch.arange(len(hidden), device=hidden.device)
                hidden[rows, positions(hidden).to(hidden.device)] = self.vectors[self.layer].to(hidden)
                return hidden

            with edited([layers_of(self.model)[self.layer]], replace):
                yield


@torch.no_grad()
def _states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, per_class: int, rng: np.random.Generator
) -> Float[Tensor, "n_layers hidden_size"]:
    """Returns every block's output at the last token of a few-shot prompt, mean over dummy queries."""
    demos = [(task, demo) for demo in balanced_demos(task, per_class, rng)]
    used = {id(demo) for _, demo in demos}
    spare = [example for example in task.train if id(example) not in used] or list(task.train)
    dummies = [spare[i] for i in rng.permutation(len(spare))[:N_DUMMIES]]
    texts = [few_shot(task, dummy, demos).text for dummy in dummies]
    token_lists = tokenize(tokenizer, texts, context_length(model))
    batch = pad(token_lists, pad_id_of(tokenizer)).to(device_of(model))
    with recorded(list(layers_of(model))) as outputs:
        next_token_logits(model, batch)
        return torch.stack([last_of(output, batch.last).float().mean(0).cpu() for output in outputs])


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[tuple[Task, Example]],
    vectors: Float[Tensor, "n_layers hidden_size"],
) -> Float[Tensor, "n_layers"]:
    """Returns the accuracy on labelled items with each layer's vector in its place.

    Exact at the price of one prefill: all tokens but the last do not depend on the vector, so they are kept in
    a cache and only the last one runs once per layer.
    """
    prompts = [task.prompt(example) for task, example in items]
    ids = [option_ids(tokenizer, prompt, task.options(x)) for prompt, (task, x) in zip(prompts, items, strict=True)]
    token_lists, hits = tokenize(tokenizer, prompts, context_length(model)), torch.zeros(len(vectors))
    for group in by_length(token_lists, TOKEN_BUDGET):
        step = _kept_prefill(model, [token_lists[i] for i in group], pad_id_of(tokenizer))
        for layer, vector in enumerate(vectors):
            with edited(
                [layers_of(model)[layer]], lambda _, hidden, vector=vector: vector.to(hidden).expand_as(hidden)
            ):
                logits = step()
            guesses = [int(row[ids[i]].argmax()) for row, i in zip(logits, group, strict=True)]
            hits[layer] += sum(guess == items[i][1].label for guess, i in zip(guesses, group, strict=True))
    return hits / max(1, len(items))


def _kept_prefill(model: PreTrainedModel, token_lists: Sequence[list[int]], pad_id: int):
    """Returns a function that runs the last token of every row anew and gives its logits, [batch, vocab]."""
    # Turned round before and after, it is padded on the left.
    batch = pad([tokens[::-1] for tokens in token_lists], pad_id).to(device_of(model))
    ids, mask = batch.input_ids.flip(1), batch.attention_mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()

    def run(columns: slice) -> Float[Tensor, "batch vocab"]:
        with last_position_only(model, mask[:, columns]):
            output = model(
                input_ids=ids[:, columns],
                attention_mask=mask[:, : columns.stop].long(),
                position_ids=positions[:, columns],
                use_cache=True,
                **{CACHE: cache},
            )
        return output.logits.float().cpu()

    def step() -> Float[Tensor, "batch vocab"]:
        logits = run(slice(-1, None))
        cache.crop(-1)
        return logits

    if ids.shape[1] > 1:
        run(slice(-1))
    return step
