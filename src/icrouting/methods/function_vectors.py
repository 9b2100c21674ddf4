"""Function Vectors (Todd et al. 2023): what the heads that matter write under demonstrations, added without."""

import logging
from collections.abc import Sequence
from functools import partial

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
from icrouting.decoder.scoring import option_ids
from icrouting.decoder.states import last_outputs, last_token_variants
from icrouting.methods.base import Context, Method
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import episodes, few_shot
from icrouting.tasks.task import Example, Task

log = logging.getLogger(__name__)
N_PROMPTS, N_SHUFFLED, MIN_RIGHT = 100, 25, 20
TOP_HEADS = (20, 10, 50)
Trial = tuple[
    Task, Example, list[tuple[Task, Example]]
]  # a training example, and demonstrations that it is not of


class FunctionVectors(Method):
    """A vector is added to one block's output at the last token: what the k heads that matter most write there.

    A head's output is its mean over 100 few-shot prompts, those that the model answers rightly with its likeliest
    token (`right`; all of them if fewer than 20 are). It matters by `indirect_effects` on the first 25 of those
    prompts with their answers shuffled. Several tasks share the prompts; k and layer are chosen on validation rows.

    Differs: queries are training rows, each asked once, since validation rows choose.
    """

    name = "function-vectors"
    learned = ("vector", "layer", "effects", "right")
    cached = ("vector",)
    vector: Float[Tensor, "hidden_size"]
    layer: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Finds the heads and what they write; chooses k and layer."""
        trials = _trials(self.sources, self.settings.demos_per_class, rng)
        asked = [
            (task.prompt(query), task.options(query), query.label) for task, query, _ in trials
        ]
        answers = [
            option_ids(self.tokenizer, prompt, options)[label] for prompt, options, label in asked
        ]
        texts, projections = [few_shot(*trial).text for trial in trials], _projections(self.model)
        given, likeliest = last_outputs(self.decoder, projections, texts, edited_inputs)
        self.right = likeliest == torch.tensor(answers)
        kept = self.right.nonzero()[:, 0].tolist()
        if len(kept) < MIN_RIGHT:
            log.info(
                "function vectors: %d of %d prompts are answered rightly: all are used",
                len(kept),
                len(trials),
            )
            kept = list(range(len(trials)))
        means = torch.stack(given)[:, kept].mean(1).unflatten(-1, (self.decoder.dims.n_heads, -1))
        shuffled = [(_shuffled(trials[i], rng), answers[i]) for i in kept[:N_SHUFFLED]]
        self.effects = indirect_effects(self.decoder, shuffled, means)
        ranks = self.effects.flatten().argsort(descending=True, stable=True)
        ranked, n_layers = written(self.model, means).flatten(0, 1)[ranks], len(means)
        layers = dict.fromkeys((n_layers // 3, n_layers // 4, n_layers // 2))
        grid = [{"k": k, "layer": layer} for layer in layers for k in TOP_HEADS]
        self.choose(
            grid, lambda k, layer: {"vector": ranked[:k].sum(0), "layer": torch.tensor(layer)}
        )
        self.n_labelled = len(
            {id(row) for _, query, demos in trials for row in (query, *(demo for _, demo in demos))}
        )
        self.n_labelled += self.n_validation

    def applied(self, task: Task) -> Context:
        """Adds the vector to the state at each row's last token."""
        block = self.decoder.layers[int(self.layer)]
        return edited_last(self.model, [block], lambda _, states: states + self.vector.to(states))


def _trials(sources: Sequence[Task], per_class: int, rng: np.random.Generator) -> list[Trial]:
    each, trials = -(-N_PROMPTS // len(sources)), []
    for task in sources:
        asked = episodes(task, min(each, len(task.train)), per_class, rng)
        trials += [(task, query, [(task, demo) for demo in demos]) for demos, query in asked]
    return [trials[i] for i in rng.permutation(len(trials))[:N_PROMPTS]]


def _shuffled(trial: Trial, rng: np.random.Generator) -> str:
    """The prompt with its answers permuted, as words: examples may differ in their options."""
    task, query, demos = trial
    answers = rng.permutation([task.answer(demo) for _, demo in demos])
    lines = [
        f"{task.prompt(demo)} {answer}\n" for (_, demo), answer in zip(demos, answers, strict=True)
    ]
    return "".join(lines) + task.prompt(query)


def _projections(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [output_of(model, layer) for layer in range(len(layers_of(model)))]


@torch.no_grad()
def indirect_effects(
    decoder: Decoder,
    prompts: Sequence[tuple[str, int]],
    means: Float[Tensor, "n_layers n_heads head_dim"],
) -> Float[Tensor, "n_layers n_heads"]:
    """Returns how far the probability of a prompt's answer token rises, on average, when one head gives its mean.

    Exact at the price of one pass per prompt, and of a variant of its last token for each head and one for none.
    """
    n, patch, rises = means[..., 0].numel() + 1, partial(_patched, means), []
    for text, answer in track(prompts, "function vectors", [1] * len(prompts), "prompts"):
        (tokens,) = decoder.tokenize([text])
        found = last_token_variants(
            decoder.model, tokens, n, _projections(decoder.model), patch, edited_inputs
        )
        probabilities = torch.cat([logits.softmax(-1)[:, answer].cpu() for logits in found])
        rises.append(
            probabilities[:-1] - probabilities[-1]
        )  # the last one's head lies beyond the last layer
    return torch.stack(rises).mean(0).view(means.shape[:2])


def _patched(means: Tensor, patches: Int[Tensor, "n"], layer: int, given: Tensor) -> Tensor:
    """What a layer's heads give, with the mean in place of one head's output in each patch that is this layer's."""
    rows, heads = (patches // len(means[0]) == layer).nonzero()[:, 0], patches % len(means[0])
    patched = given.unflatten(-1, means.shape[1:]).clone()
    patched[rows, heads[rows]] = means[layer, heads[rows]].to(given)
    return patched.flatten(1)


@torch.no_grad()
def written(
    model: PreTrainedModel, means: Float[Tensor, "n_layers n_heads head_dim"]
) -> Float[Tensor, "n_layers n_heads hidden_size"]:
    """Returns what every head adds to the residual stream when all give their means: its part of the projection.

    The projection is run on one head at a time, less what it makes of none, so that its bias does not count and
    its weight may be stored in any way. Differs: a norm behind it scales each channel as it does for all heads.
    """
    n_heads, parts = means.shape[1], []
    scale = getattr(stack_of(model).config, "residual_multiplier", 1.0)  # Granite's
    shown = torch.cat([torch.eye(n_heads), torch.zeros(1, n_heads), torch.ones(1, n_heads)])[
        ..., None
    ]  # and all
    for layer, projection in enumerate(_projections(model)):
        mixed = projection((shown * means[layer]).flatten(1).to(device_of(projection), model.dtype))
        part, branch = mixed[:-2].float() - mixed[-2].float(), branches_of(model, layer)[0]
        if branch is not attention_of(model, layer):
            part = part * (branch(mixed[-1:]).float() / mixed[-1:].float()).nan_to_num()
        parts.append(scale * part.cpu())
    return torch.stack(parts)
