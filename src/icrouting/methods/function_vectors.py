"""Function Vectors (Todd et al. 2023): what the heads that matter write, added."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import (
    attention_of,
    branches_of,
    device_of,
    layers_of,
    output_of,
    stack_of,
)
from icrouting.decoder.hooks import edited_inputs, edited_last
from icrouting.decoder.scoring import counted_tokens
from icrouting.decoder.states import last_outputs, last_token_variants
from icrouting.methods.base import Context, Method
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import behind, episodes, few_shot
from icrouting.tasks.task import Example, Task

log = logging.getLogger(__name__)

N_PROMPTS = 100
N_SHUFFLED = 25
MIN_RIGHT = 20
# Heads to sum over, the published number first.
TOP_HEADS = (20, 10, 50)


class Trial(NamedTuple):
    """A training example of a task, and demonstrations that it is not one of."""

    task: Task
    query: Example
    demos: list[tuple[Task, Example]]


class FunctionVectors(Method):
    """A vector is added to one block's output at the last token.

    It is what the k heads that matter most write under demonstrations. A head's output is its mean
    over 100 few-shot prompts, those that the model answers rightly with its likeliest token
    (`right`; all of them if fewer than 20 are). It matters by `indirect_effects` on the first 25 of
    those prompts with their answers shuffled. Several tasks share the prompts; k and layer are
    chosen on validation rows.

    Differs: queries are training rows, each asked once, since validation rows choose.
    """

    name = "function-vectors"
    learned = ("vector", "layer", "effects", "right")
    cached = ("vector",)
    vector: Float[Tensor, "hidden_size"]
    layer: Tensor
    effects: Float[Tensor, "n_layers n_heads"]
    right: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Finds the heads and what they write; chooses k and layer."""
        trials = _trials(self.sources, self.settings.demos_per_class, rng)
        answers = [self._answer_token(trial) for trial in trials]

        # What the heads give is what the projection behind them is given.
        texts = [few_shot(*trial).text for trial in trials]
        projections = _projections(self.model)
        outputs, likeliest = last_outputs(self.decoder, projections, texts, edited_inputs)
        self.right = likeliest == torch.tensor(answers)
        used = self._used_trials()
        mean_outputs = torch.stack(outputs)[:, used].mean(1)
        n_heads = self.decoder.dims.n_heads
        means = mean_outputs.unflatten(-1, (n_heads, -1))

        # Shuffled answers keep the prompt's form and hide the task, so a head can bring it back.
        shuffled = []
        for index in used[:N_SHUFFLED]:
            text = _shuffled(trials[index], rng)
            shuffled.append((text, answers[index]))
        self.effects = indirect_effects(self.decoder, shuffled, means)
        self._choose_heads_and_layer(means)
        self.n_labelled = _n_rows(trials) + self.n_validation

    def applied(self, task: Task) -> Context:
        """Adds the vector to the state at each row's last token."""
        block = self.decoder.layers[int(self.layer)]

        def add(place: int, states: Tensor) -> Tensor:
            return states + self.vector.to(states)

        return edited_last(self.model, [block], add)

    def _answer_token(self, trial: Trial) -> int:
        """Returns the token that the right answer to a trial's query begins with."""
        prompt = trial.task.prompt(trial.query)
        options = trial.task.options(trial.query)
        tokens = counted_tokens(
            self.tokenizer, prompt, options, trial.task.spec.label_scoring, trial.task.joint
        )
        return tokens[trial.query.label][0]

    def _used_trials(self) -> list[int]:
        """Returns which trials count: those answered rightly, or all if they are few."""
        n_trials = len(self.right)
        right = self.right.nonzero()[:, 0].tolist()
        if len(right) >= MIN_RIGHT:
            return right
        log.info(
            "function vectors: %d of %d prompts are answered rightly: all are used",
            len(right),
            n_trials,
        )
        return list(range(n_trials))

    def _choose_heads_and_layer(self, means: Float[Tensor, "n_layers n_heads head_dim"]) -> None:
        """Chooses how many heads are summed, and where the sum is added."""
        n_layers = len(means)
        order = self.effects.flatten().argsort(descending=True, stable=True)
        # Heads are ranked over all layers together.
        by_head = written(self.model, means).flatten(0, 1)
        ranked = by_head[order]

        # The published third first; in shallow models two of these are one layer.
        depths = (n_layers // 3, n_layers // 4, n_layers // 2)
        layers = list(dict.fromkeys(depths))
        grid = [{"k": k, "layer": layer} for layer in layers for k in TOP_HEADS]

        def build(k: int, layer: int) -> dict[str, Tensor]:
            return {"vector": ranked[:k].sum(0), "layer": torch.tensor(layer)}

        self.choose(grid, build)


def _trials(sources: Sequence[Task], per_class: int, rng: np.random.Generator) -> list[Trial]:
    """Returns up to `N_PROMPTS` trials in random order, shared out among the tasks."""
    # Rounded up, so that the tasks have enough between them.
    share = -(-N_PROMPTS // len(sources))
    trials = []
    for task in sources:
        # Each query is asked once, so a task has no more trials than rows.
        n_trials = min(share, len(task.train))
        for demos, query in episodes(task, n_trials, per_class, rng):
            context = [(task, demo) for demo in demos]
            trials.append(Trial(task, query, context))
    order = rng.permutation(len(trials))
    return [trials[index] for index in order[:N_PROMPTS]]


def _n_rows(trials: Sequence[Trial]) -> int:
    """Returns how many rows are queries or demonstrations, each counted once."""
    rows = set()
    for trial in trials:
        rows.add(id(trial.query))
        for _, demo in trial.demos:
            rows.add(id(demo))
    return len(rows)


def _shuffled(trial: Trial, rng: np.random.Generator) -> str:
    """Returns the prompt with its answers permuted.

    They are permuted as words, since examples may differ in their options.
    """
    task = trial.task
    answers = rng.permutation([task.answer(demo) for _, demo in trial.demos])
    turns = []
    for (_, demo), answer in zip(trial.demos, answers, strict=True):
        turns.append((task.question(demo), str(answer)))
    return behind(task, trial.query, turns).text


def _projections(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Returns every layer's output projection, which mixes what its heads give."""
    n_layers = len(layers_of(model))
    return [output_of(model, layer) for layer in range(n_layers)]


@torch.no_grad()
def indirect_effects(
    decoder: Decoder,
    prompts: Sequence[tuple[str, int]],
    means: Float[Tensor, "n_layers n_heads head_dim"],
) -> Float[Tensor, "n_layers n_heads"]:
    """Returns how far an answer's probability rises when one head gives its mean.

    Prompts are averaged. Exact at the price of one pass per prompt, and of a variant of its last
    token for each head and one for none.

    Args:
        decoder: the frozen model and its tokenizer.
        prompts: texts, each with the token of its right answer.
        means: what each head gives in place of its output.
    """
    projections = _projections(decoder.model)
    patch = partial(_patched, means)
    # The last variant's head lies beyond the last layer, so that it is the plain prompt.
    n_variants = means[..., 0].numel() + 1
    rises = []
    for text, answer in track(prompts, "function vectors", [1] * len(prompts), "prompts"):
        (tokens,) = decoder.tokenize([text])
        groups = last_token_variants(
            decoder.model, tokens, n_variants, projections, patch, edited_inputs
        )
        parts = []
        for logits in groups:
            probabilities = logits.softmax(-1)[:, answer]
            parts.append(probabilities.cpu())
        patched, plain = torch.cat(parts).split([n_variants - 1, 1])
        rises.append(patched - plain)
    mean_rises = torch.stack(rises).mean(0)
    return mean_rises.view(means.shape[:2])


def _patched(means: Tensor, variants: Int[Tensor, "n"], layer: int, outputs: Tensor) -> Tensor:
    """Returns what a layer's heads give, with means where variants want them.

    Every variant has the mean in place of one head's output in one layer.
    """
    n_heads = means.shape[1]
    # Variants count through the heads of the first layer, then those of the second, and so on.
    rows = (variants // n_heads == layer).nonzero()[:, 0]
    heads = (variants % n_heads)[rows]
    patched = outputs.unflatten(-1, means.shape[1:]).clone()
    patched[rows, heads] = means[layer, heads].to(outputs)
    return patched.flatten(1)


@torch.no_grad()
def written(
    model: PreTrainedModel, means: Float[Tensor, "n_layers n_heads head_dim"]
) -> Float[Tensor, "n_layers n_heads hidden_size"]:
    """Returns each head's part of what all heads add to the residual stream.

    All give their `means`. The projection is run on one head at a time, less what it makes of none,
    so that its bias does not count and its weight may be stored in any way. Differs: a norm behind
    it scales each channel as it does for all heads.
    """
    n_heads = means.shape[1]
    # Granite multiplies what its branches give before it adds that to the residual stream.
    scale = getattr(stack_of(model).config, "residual_multiplier", 1.0)
    # A row for each head by itself, one for no head, and one for all together.
    single = torch.eye(n_heads)
    none = torch.zeros(1, n_heads)
    every = torch.ones(1, n_heads)
    masks = torch.cat([single, none, every])

    parts = []
    for layer, projection in enumerate(_projections(model)):
        masked = masks[..., None] * means[layer]
        inputs = masked.flatten(1)
        projected = projection(inputs.to(device_of(projection), model.dtype))
        bias = projected[-2].float()
        part = projected[:-2].float() - bias

        # A norm mixes the heads: its factors under all of them are taken for each.
        branch, _ = branches_of(model, layer)
        if branch is not attention_of(model, layer):
            together = projected[-1:]
            factors = branch(together).float() / together.float()
            part = part * factors.nan_to_num()
        parts.append(scale * part.cpu())
    return torch.stack(parts)
