"""Iterative Vectors (Liu and Deng 2025): what demonstrations change in attention outputs, taken while it is added."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from icrouting.decoder.batches import pad
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import all_branches_of, device_of
from icrouting.decoder.hooks import added, edited, edited_last, recorded
from icrouting.decoder.passes import next_token_logits
from icrouting.methods.base import Context, Method
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import demonstration, episodes
from icrouting.tasks.task import Example, Task

N_EPISODES, REFRESH, SHOTS = 200, 10, 1
# The default of the published code first; its own grid has .1, .3, .5, .7 and .9 for both.
GRID = [
    {"strength": s, "extraction_strength": e}
    for s, e in product((1.0, 0.9, 0.5, 0.1), (0.1, 0.5, 0.9))
]


@dataclass(frozen=True)
class Episode:
    """Tokens of demonstrations and a query, and their io positions: the token before each answer, the query's last.

    `rows` says whose vector belongs to each io position: row 0 is the query's, every other a class's.
    """

    tokens: list[int]
    positions: list[int]
    rows: list[int]


class IterativeVectors(Method):
    """A vector is added to what every attention branch gives at the prompt's last token.

    It is the mean, over episodes of one demonstration per class and a query, of what the demonstrations change
    there. Every 10 episodes the mean so far comes into force at all io positions, and later changes contain it.
    Over several tasks, which take turns, the query's vector is pooled and every class keeps its own.

    Differs: the query's vector alone is used, on the bare prompt (published: all, on 1-shot prompts); the shared
    template; 12 settings, by accuracy (published: 100, up to 4 shots, by macro-F1); the query alone is read at its
    io position (the published code reads the token before it); no test row is looked at (the published code's
    "train" is the test split); `Settings.train_rows` bounds the published 200 episodes.
    """

    name = "iterative-vectors"
    learned = ("vectors", "strength")
    vectors: Tensor
    strength: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Extracts the vectors at every extraction strength, and chooses on the validation rows."""
        n_each = -(-min(N_EPISODES, self.settings.train_rows) // len(self.sources))
        *firsts, n_rows = np.cumsum(
            [1, *(task.train_labels.max(initial=0) + 1 for task in self.sources)]
        ).tolist()
        turns = zip(*(episodes(task, n_each, SHOTS, rng) for task in self.sources), strict=True)
        drawn = [each for turn in turns for each in zip(self.sources, firsts, turn, strict=True)]
        shown = [_episode(self.decoder, task, first, *each) for task, first, each in drawn]
        alone = [
            _episode(self.decoder, task, first, [], query) for task, first, (_, query) in drawn
        ]
        dims = len(self.decoder.layers), self.decoder.hidden_size
        plain, found = [outputs_at(self.model, query, torch.zeros(1, *dims)) for query in alone], {}
        used = {id(row) for _, _, (demos, query) in drawn for row in (*demos, query)}

        def build(strength: float, extraction_strength: float) -> dict[str, Tensor]:
            if extraction_strength not in found:
                found[extraction_strength] = extract(
                    self.model, shown, plain, extraction_strength, n_rows
                )
            return {"vectors": found[extraction_strength], "strength": torch.tensor(strength)}

        self.choose(GRID, build)
        self.n_labelled = len(used) + self.n_validation

    def n_cached(self, task: Task) -> int:
        """Returns the size of the query's vectors, which alone are used."""
        return self.vectors[0].numel()

    def applied(self, task: Task) -> Context:
        """Adds the query's vectors at each row's last token, in float32."""
        vectors, attention = self.strength * self.vectors[0], all_branches_of(self.model)[::2]
        return edited_last(
            self.model, attention, lambda layer, h: added(h, vectors[layer]), in_steps=False
        )


def _episode(
    decoder: Decoder,
    task: Task,
    first_row: int,
    demos: Sequence[Example],
    query: Example,
) -> Episode:
    """Returns an episode of a task whose first class has row `first_row`."""
    contexts = accumulate((demonstration(task, demo) for demo in demos), initial="")
    texts = [
        context + task.prompt(row) for context, row in zip(contexts, (*demos, query), strict=True)
    ]
    token_lists = decoder.tokenize(texts)
    whole = token_lists[-1]
    if any(whole[: len(tokens)] != tokens for tokens in token_lists):
        raise ValueError(
            f"the prompts of {task.name!r} merge with their answers in tokens: end its template with ':'"
        )
    rows = [*(first_row + demo.label for demo in demos), 0]
    return Episode(whole, [len(tokens) - 1 for tokens in token_lists], rows)


@torch.no_grad()
def outputs_at(
    model: PreTrainedModel, episode: Episode, vectors: Float[Tensor, "n_rows n_layers hidden_size"]
) -> Float[Tensor, "n_positions n_layers hidden_size"]:
    """Returns what attention gives at an episode's io positions, with their rows' vectors added there."""

    def add(layer: int, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[0, episode.positions] = added(
            output[0, episode.positions], vectors[episode.rows, layer]
        )
        return changed

    # What is read includes what was added: hooks run in the order in which they came.
    with edited(attention := all_branches_of(model)[::2], add), recorded(attention) as outputs:
        next_token_logits(model, pad([episode.tokens], 0).to(device_of(model)))
    return torch.stack([output[0, episode.positions].float().cpu() for output in outputs], 1)


def extract(
    model: PreTrainedModel,
    shown: Sequence[Episode],
    plain: Sequence[Tensor],
    strength: float,
    n_rows: int,
) -> Float[Tensor, "n_rows n_layers hidden_size"]:
    """Returns each row's mean change against `plain`, the query alone, with `strength` times the mean so far added."""
    total, counts = torch.zeros(n_rows, *plain[0].shape[1:]), torch.zeros(n_rows, 1, 1)
    vectors = torch.zeros_like(total)
    for number in track(range(len(shown)), "iterative-vectors", [1] * len(shown), "episodes"):
        change, whose = (
            outputs_at(model, shown[number], strength * vectors) - plain[number],
            shown[number].rows,
        )
        for row in set(whose):
            total[row] += change[torch.tensor(whose) == row].mean(0)
            counts[row] += 1
        if number % REFRESH == 0:
            vectors = total / counts.clamp(min=1)  # a row without a demonstration yet adds nothing
    return total / counts.clamp(min=1)
