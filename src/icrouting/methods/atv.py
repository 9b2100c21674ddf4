"""ATV, adaptive task vectors (Kang et al. 2025): a small network reads a prompt, and gives vectors.

Its control gives all prompts of a task the mean of what the network says of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from icrouting.decoder.batches import pad
from icrouting.decoder.hold import frozen
from icrouting.decoder.hooks import added, edited, edited_last
from icrouting.decoder.passes import next_token_logits
from icrouting.decoder.states import last_outputs
from icrouting.methods.base import Context, Method
from icrouting.methods.tuning import AnsweredRow, answer_partings, tune
from icrouting.routing.encoder import SentenceEncoder, load_encoder, query_texts
from icrouting.runtime.defaults import usual_defaults
from icrouting.tasks.task import Example, Task

# The width of a router's hidden layer.
WIDTH = 256
STRENGTH = 0.1
GRID = tuple({"lr": lr} for lr in (1e-3, 3e-4, 3e-3))
# Prompts by which the size of a layer's states is known.
N_SIZED = 64
# As ICR and its controls, one fit for all seeds, so that both methods here have the same network.
SEED = 0

Vectors = Float[Tensor, "batch n_layers hidden_size"]


@dataclass(frozen=True)
class _Row:
    """A training prompt, up to a place where its answer parts from other options.

    Attributes:
        tokens: the prompt's, and those of the answer before that place.
        n_prompt: how many of them are the prompt's, at whose last one the vectors are added.
        following: the tokens with which some option goes on.
        features: the prompt's.
    """

    tokens: list[int]
    n_prompt: int
    following: list[int]
    features: Float[Tensor, "n_features"]


class Atv(Method):
    """Each prompt gets vectors of its own, added to every block's output at its last token.

    A perceptron with one hidden layer predicts all vectors of a prompt from what a frozen sentence
    encoder says of it, which is what a router reads. Its last layer starts at zero, so an untrained
    one leaves the model unchanged. It is trained on up to `--train-rows` rows a task by the
    cross-entropy of the answers among the options, and ends where that is least on validation rows;
    the learning rate is chosen on them. Generated tokens are left alone.

    Not checked against the authors' code or figures. Differs: the published vectors are a linear
    map of a small language model's last state; a frozen encoder's features are what ICR's router
    reads, so that the two differ in what they do with the same. A layer's vectors are in units of a
    tenth of the root mean square of its states at the last token, so that a learning rate means the
    same in every layer and model. One fit serves all seeds.

    Attributes:
        hidden_weight: of the hidden layer, [width, n_features].
        hidden_bias: likewise, [width].
        vector_weight: of what gives the vectors, [n_layers, hidden_size, width].
        vector_bias: likewise, [n_layers, hidden_size].
        scales: what each layer's vectors are multiplied by, [n_layers].
    """

    name = "atv"
    draws = False
    learned = ("hidden_weight", "hidden_bias", "vector_weight", "vector_bias", "scales")
    cached = learned
    hidden_weight: Tensor
    hidden_bias: Tensor
    vector_weight: Tensor
    vector_bias: Tensor
    scales: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Trains a network for each learning rate, and keeps the best."""
        own_rng = np.random.default_rng(SEED)
        pairs: list[tuple[Task, Example]] = []
        held_pairs: list[tuple[Task, Example]] = []
        for task in self.sources:
            picked = own_rng.permutation(len(task.train))[: self.settings.train_rows]
            pairs += [(task, task.train[place]) for place in picked]
            held_pairs += [(task, row) for row in task.validation]
        if not pairs:
            raise ValueError(
                f"{self.name} learns from training rows: give at least one source task that has "
                "some"
            )
        rows = self._rows(pairs)
        held = self._rows(held_pairs)
        scales = STRENGTH * self._sizes(pairs, own_rng)
        self.choose(GRID, partial(self._trained, rows, held, scales))
        self.n_labelled = len(pairs) + len(held_pairs)
        self.n_trained = sum(vars(self)[name].numel() for name in self.learned)
        # These are measured, not trained.
        self.n_trained -= self.scales.numel()

    def depends_on(self) -> str:
        """Returns the fingerprint of the encoder."""
        return self._encoder().fingerprint

    @contextmanager
    def applied(self, task: Task) -> Iterator[None]:
        """Adds what a row's prompt is given at its last token, and at no generated one."""
        vectors = torch.empty(0)

        def add(layer: int, states: Tensor) -> Tensor:
            nonlocal vectors
            # In a step of a generation there is no prompt's last token.
            if not len(states):
                return states
            # All layers of a forward go by what its first one read.
            if layer == 0:
                vectors = self.vectors_of(answering.prompts())
            return added(states, vectors[:, layer])

        blocks = list(self.decoder.layers)
        with edited_last(self.model, blocks, add, in_steps=False) as answering:
            yield

    @usual_defaults()
    @torch.no_grad()
    def vectors_of(self, token_lists: Sequence[Sequence[int]]) -> Vectors:
        """Returns what is added for each prompt, given its tokens."""
        return predicted(self.tensors(), self._features(token_lists))

    def _encoder(self) -> SentenceEncoder:
        """Returns the encoder of the settings."""
        return load_encoder(self.settings.encoder)

    def _features(
        self, token_lists: Sequence[Sequence[int]]
    ) -> Float[Tensor, "n_prompts n_features"]:
        """Returns what the encoder says of prompts, which it reads back from their tokens."""
        return self._encoder()(query_texts(self.tokenizer, token_lists)).cpu()

    def _rows(self, pairs: Sequence[tuple[Task, Example]]) -> list[AnsweredRow[_Row]]:
        """Returns rows with the place of their answer among what may follow.

        Where a task scores whole labels, a row stands once for every place where its answer parts
        from other options.
        """
        # Neither encoders nor models read a list of no texts.
        if not pairs:
            return []
        token_lists = self.decoder.tokenize([task.prompt(example) for task, example in pairs])
        features = self._features(token_lists)
        places_by_row = answer_partings(self.decoder, pairs)
        rows = []
        for tokens, row_features, places in zip(token_lists, features, places_by_row, strict=True):
            for parting in places:
                read = [*tokens, *parting.beginning]
                row = _Row(read, len(tokens), parting.following, row_features)
                rows.append((row, parting.chosen))
        return rows

    def _sizes(
        self, pairs: Sequence[tuple[Task, Example]], rng: np.random.Generator
    ) -> Float[Tensor, "n_layers"]:
        """Returns the root mean square of each layer's states at the last token of some prompts."""
        picked = rng.permutation(len(pairs))[:N_SIZED]
        texts = []
        for place in picked:
            task, example = pairs[place]
            texts.append(task.prompt(example))
        states_by_layer, _ = last_outputs(self.decoder, list(self.decoder.layers), texts)
        return torch.stack([states.square().mean().sqrt() for states in states_by_layer])

    def _trained(
        self,
        rows: Sequence[AnsweredRow[_Row]],
        held: Sequence[AnsweredRow[_Row]],
        scales: Float[Tensor, "n_layers"],
        lr: float,
    ) -> dict[str, Tensor]:
        """Returns a trained network with its scales."""
        decoder = self.decoder
        n_features = len(rows[0][0].features)
        network = _start(n_features, len(decoder.layers), decoder.hidden_size)
        network = {name: nn.Parameter(start.to(decoder.device)) for name, start in network.items()}
        tensors: dict[str, Tensor] = {**network, "scales": scales.to(decoder.device)}
        with frozen(decoder.model):
            tune(
                list(network.values()),
                rows,
                held,
                partial(self._following_logits, tensors),
                lr=lr,
                n_epochs=self.settings.train_epochs,
                rng=np.random.default_rng(SEED),
            )
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def _following_logits(
        self, tensors: Mapping[str, Tensor], rows: Sequence[_Row]
    ) -> Float[Tensor, "batch n_following"]:
        """Returns the logits of what may follow each row, -inf where a row has less than others."""
        decoder = self.decoder
        features = torch.stack([row.features for row in rows]).to(decoder.device)
        vectors = predicted(tensors, features)
        batch = pad([row.tokens for row in rows], decoder.pad_id).to(decoder.device)
        positions = torch.tensor([row.n_prompt - 1 for row in rows])
        with _added_at(list(decoder.layers), positions, vectors):
            logits = next_token_logits(decoder.model, batch)
        n_following = max(len(row.following) for row in rows)
        following_logits = logits.new_full((len(rows), n_following), -torch.inf)
        for place, row in enumerate(rows):
            following_logits[place, : len(row.following)] = logits[place, row.following]
        return following_logits


class AtvAveraged(Atv):
    """The same network, but all prompts of a task are given one and the same vectors.

    They are the mean of what the network gives the task's training prompts, of which it reads the
    first `--train-rows` and no label. What ATV has beyond this control, its reading each prompt
    gives; what this one has beyond zero-shot, a vector for the task gives. The network is that of
    ATV itself: it is trained and chosen without averaging.
    """

    name = "atv-averaged"

    def validated(self) -> float:
        """Returns the accuracy without averaging, so that ATV's own network is chosen."""
        adaptive = Atv(self.settings)
        adaptive.take(self.in_force(), self.decoder, self.sources)
        return adaptive.validated()

    def n_cached(self, task: Task) -> int:
        """Returns the size of the task's vectors; the network is not needed any more."""
        return self.vector_bias.numel()

    def applied(self, task: Task) -> Context:
        """Adds the task's vectors at each row's last token, and at no generated one."""
        vectors = self.mean_vectors(task)

        def add(layer: int, states: Tensor) -> Tensor:
            return added(states, vectors[layer])

        return edited_last(self.model, list(self.decoder.layers), add, in_steps=False)

    @usual_defaults()
    @torch.no_grad()
    def mean_vectors(self, task: Task) -> Float[Tensor, "n_layers hidden_size"]:
        """Returns what is added for every prompt of a task.

        Raises:
            ValueError: the task has no training prompts.
        """
        rows = task.train[: self.settings.train_rows]
        if not rows:
            raise ValueError(
                f"{self.name} gives all prompts of a task the mean over its training prompts, and "
                f"{task.name!r} has none: give it some, which need no labels, or use {Atv.name}"
            )
        token_lists = self.decoder.tokenize([task.prompt(row) for row in rows])
        return mean_predicted(self.tensors(), self._features(token_lists))


def predicted(
    tensors: Mapping[str, Tensor], features: Float[Tensor, "batch n_features"]
) -> Vectors:
    """Returns the vectors that a network gives prompts, scaled.

    Args:
        tensors: the network's and its scales, by the names of `Atv.learned`.
        features: of the prompts.
    """
    return _vectors(tensors, _hidden(tensors, features))


def mean_predicted(
    tensors: Mapping[str, Tensor], features: Float[Tensor, "batch n_features"]
) -> Float[Tensor, "n_layers hidden_size"]:
    """Returns the mean of `predicted` over prompts.

    What stands behind the hidden layer is linear, so that layer is averaged, which is smaller.
    """
    hidden = _hidden(tensors, features).mean(0, keepdim=True)
    return _vectors(tensors, hidden)[0]


def _hidden(tensors: Mapping[str, Tensor], features: Tensor) -> Float[Tensor, "batch width"]:
    return nn.functional.gelu(features @ tensors["hidden_weight"].mT + tensors["hidden_bias"])


def _vectors(tensors: Mapping[str, Tensor], hidden: Float[Tensor, "batch width"]) -> Vectors:
    weight = tensors["vector_weight"]
    flat = hidden @ weight.flatten(0, 1).mT
    vectors = flat.unflatten(1, weight.shape[:2]) + tensors["vector_bias"]
    return tensors["scales"][:, None] * vectors


def _start(n_features: int, n_layers: int, hidden_size: int) -> dict[str, Tensor]:
    """Returns an untrained network, whose vectors are zero."""
    # Drawn on the CPU, so that every device starts from the same network.
    generator = torch.Generator().manual_seed(SEED)
    uniform = torch.rand(WIDTH, n_features, generator=generator)
    # As torch draws linear layers.
    bound = n_features**-0.5
    return {
        "hidden_weight": (2 * uniform - 1) * bound,
        "hidden_bias": torch.zeros(WIDTH),
        "vector_weight": torch.zeros(n_layers, hidden_size, WIDTH),
        "vector_bias": torch.zeros(n_layers, hidden_size),
    }


def _added_at(blocks: Sequence[nn.Module], positions: Tensor, vectors: Vectors) -> Any:
    """Inside, each row's vectors are added to the blocks' outputs at its position."""

    def add(layer: int, hidden: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        columns = positions.to(hidden.device)
        moved = hidden.clone()
        moved[rows, columns] = added(hidden[rows, columns], vectors[:, layer])
        return moved

    return edited(blocks, add)
