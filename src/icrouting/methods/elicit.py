"""ELICIT (Wang et al. 2025): task vectors that each prompt retrieves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from icrouting.decoder.hooks import added, edited_last
from icrouting.decoder.states import mean_last_outputs
from icrouting.methods.base import Method
from icrouting.methods.retriever import same_task, train_head
from icrouting.methods.task_vectors import sweep
from icrouting.routing.encoder import SentenceEncoder, load_encoder, query_texts
from icrouting.runtime.defaults import usual_defaults
from icrouting.tasks.prompts import episodes, few_shot
from icrouting.tasks.task import Task

N_PROMPTS = 10
N_TOP = 10
N_ROWS = 100
# The published setting first.
WEIGHTS = (2.0, 1.0, 0.5)
RECALLS = (0.8, 0.7, 0.9)
GRID = [{"weight": weight, "recall": recall} for weight in WEIGHTS for recall in RECALLS]
# Without a retriever, recall means nothing: one setting for each weight.
WEIGHTS_ONLY = GRID[:: len(RECALLS)]


@dataclass(frozen=True)
class _Texts:
    """A source task's prompts for the library, and its queries for the retriever."""

    prompts: list[str]
    queries: list[str]


class Elicit(Method):
    """A retrieved state, times `weight`, is added at the prompt's last token.

    It is added after one block. The library holds 10 few-shot prompts per source task with the
    last-token states of all layers, and the layer at which a task's mean state does best on its
    validation rows. A retriever says how likely a prompt and a library prompt are of one task. If
    none reaches the threshold, the prompt is left alone; else the mean of the 10 likeliest states
    is added at their most frequent layer ("soft" in the published code). Generated tokens are left
    alone. With one source task there is no retriever: an added mean task vector remains.

    Differs: a frozen encoder (`Settings.encoder`) under the published head, which needs a higher
    learning rate (published: SimCSE RoBERTa, trained along); pairs are always (query, library
    prompt); queries are training rows outside the library (published: by hand); 5 demonstrations
    per class, not 16; weight and recall are searched.

    Attributes:
        states: last-token states of the library's prompts, [n_prompts, n_layers, hidden_size].
        layers: where each of them is added, [n_prompts].
        features: the encoder's of the library's prompts, [n_prompts, n_features]; empty without a
            retriever.
        head: the retriever's weights, [n_weights]; empty without a retriever.
        threshold: the least probability that the likeliest library prompt must have.
        weight: what the added state is multiplied by.
    """

    name = "elicit"
    learned = ("states", "layers", "features", "head", "threshold", "weight")
    cached = ("states", "features", "head")
    states: Tensor
    layers: Tensor
    features: Tensor
    head: Tensor
    threshold: Tensor
    weight: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Fills the library, trains the retriever, and chooses on validation rows."""
        if not self.sources or not all(task.validation for task in self.sources):
            raise ValueError(
                "ELICIT chooses layers on validation rows: give 5 training rows or more per source "
                "task"
            )
        self.n_labelled = sum(len(task.validation) for task in self.sources)
        library = [self._texts(task, rng) for task in self.sources]
        prompts = [prompt for texts in library for prompt in texts.prompts]
        states = self._states(prompts)
        if len(library) > 1:
            queries = [texts.queries for texts in library]
            retriever, likelihoods = self._retriever(prompts, queries, rng)
            grid = GRID
        else:
            retriever = {"features": torch.zeros(0, 0), "head": torch.zeros(0)}
            # Every prompt counts as likely then, so it reaches this threshold.
            likelihoods = torch.zeros(1)
            grid = WEIGHTS_ONLY
        layers_by_weight: dict[float, Tensor] = {}

        def build(weight: float, recall: float) -> dict[str, Tensor]:
            # Layers do not depend on the recall, and finding them takes a pass per row.
            if weight not in layers_by_weight:
                layers_by_weight[weight] = self._best_layers(states, weight)
            return {
                "states": states,
                "layers": layers_by_weight[weight],
                "weight": torch.tensor(weight),
                **retriever,
                "threshold": likelihoods.quantile(1 - recall, interpolation="lower"),
            }

        self.choose(grid, build)

    def depends_on(self) -> str:
        """Returns the fingerprint of the retriever's encoder, if there is one."""
        return load_encoder(self.settings.encoder).fingerprint if len(self.head) else ""

    @torch.no_grad()
    @usual_defaults()
    def retrieved(
        self, texts: Sequence[str]
    ) -> tuple[Float[Tensor, "batch hidden_size"], Int[Tensor, "batch"]]:
        """Returns what is added for each prompt, and where: -1 leaves a prompt alone."""
        likelihoods = torch.ones(len(texts), len(self.states))
        if len(self.head):
            features = load_encoder(self.settings.encoder)(texts)
            likelihoods = same_task(self.head, features, self.features)
        top = likelihoods.topk(N_TOP)
        n_layers = self.states.shape[1]
        # Each of the likeliest votes for its layer.
        votes = nn.functional.one_hot(self.layers[top.indices], n_layers)
        layers = votes.sum(1).argmax(1)
        states = self.states[top.indices, layers[:, None]]
        vectors = self.weight * states.mean(1)
        likeliest = top.values[:, 0]
        return vectors, layers.masked_fill(likeliest < self.threshold, -1)

    @contextmanager
    def applied(self, task: Task) -> Iterator[None]:
        """Adds what a row's prompt retrieves at its last token, and at no generated one."""
        vectors = torch.empty(0)
        layers = torch.empty(0)

        def add(layer: int, states: Tensor) -> Tensor:
            nonlocal vectors, layers
            # In a step of a generation there is no prompt's last token.
            if not len(states):
                return states
            # All layers of a forward go by what its first one retrieved.
            if layer == 0:
                texts = query_texts(self.tokenizer, answering.prompts())
                vectors, layers = self.retrieved(texts)
            is_here = layers == layer
            if not is_here.any():
                return states
            is_edited = is_here.to(states.device)[:, None]
            return torch.where(is_edited, added(states, vectors), states)

        blocks = list(self.decoder.layers)
        with edited_last(self.model, blocks, add, in_steps=False) as answering:
            yield

    def _texts(self, task: Task, rng: np.random.Generator) -> _Texts:
        """Returns a task's prompts, and queries made of rows that none of them shows."""
        drawn = list(episodes(task, N_PROMPTS, self.settings.demos_per_class, rng))
        prompts = []
        shown_ids: set[int] = set()
        for demos, query in drawn:
            pairs = [(task, demo) for demo in demos]
            prompts.append(few_shot(task, query, pairs).text)
            # Rows are told apart by identity: two may read the same.
            shown_ids.update(id(row) for row in (*demos, query))
        self.n_labelled += len(shown_ids)
        # A small task shows all its rows; then they are queries too.
        unseen = [row for row in task.train if id(row) not in shown_ids] or list(task.train)
        n_rows = min(N_ROWS, self.settings.train_rows)
        queries = []
        for i in rng.permutation(len(unseen))[:n_rows]:
            row = unseen[i]
            # With the template and without it, so that the head does not go by the template alone.
            queries += [task.prompt(row), " ".join(row.fields.values())]
        return _Texts(prompts, queries)

    def _states(self, prompts: Sequence[str]) -> Float[Tensor, "n_prompts n_layers hidden_size"]:
        """Returns the last-token states of every prompt, after each block."""
        blocks = list(self.decoder.layers)
        states = []
        for prompt in prompts:
            # The mean over one prompt is its state.
            states.append(mean_last_outputs(self.decoder, blocks, [prompt]))
        return torch.stack(states)

    def _best_layers(
        self, states: Float[Tensor, "n_prompts n_layers hidden_size"], weight: float
    ) -> Int[Tensor, "n_prompts"]:
        """Returns where each prompt's task's mean state does best, or first of equals."""
        best_layers = []
        for task, task_states in zip(self.sources, states.split(N_PROMPTS), strict=True):
            rows = [(task, row) for row in task.validation]
            vectors = weight * task_states.mean(0)
            accuracies = sweep(self.decoder, rows, vectors, kept=1.0)
            for layer, accuracy in enumerate(accuracies.tolist()):
                setting = {"library of": task.name, "weight": weight, "layer": layer}
                self.tried.append({**setting, "accuracy": accuracy})
            best_layers.append(accuracies.argmax())
        return torch.stack(best_layers).repeat_interleave(N_PROMPTS)

    def _retriever(
        self, prompts: Sequence[str], queries: Sequence[Sequence[str]], rng: np.random.Generator
    ) -> tuple[dict[str, Tensor], Float[Tensor, "n_pairs"]]:
        """Returns the retriever, and what it says of pairs that are of one task.

        The pairs are of validation prompts and library prompts; it says how likely it finds it that
        they are of one task.

        Args:
            prompts: The library's, in the order of the sources.
            queries: Queries that train the head, by source.
            rng: Seeds the training.
        """
        encoder = load_encoder(self.settings.encoder)
        # The threshold has to hold for prompts that trained nothing.
        held_queries = []
        for task in self.sources:
            held_queries.append([task.prompt(row) for row in task.validation])
        prompts = self._as_read(prompts)
        queries = [self._as_read(texts) for texts in queries]
        held_queries = [self._as_read(texts) for texts in held_queries]
        owners = torch.arange(len(self.sources)).repeat_interleave(N_PROMPTS)
        prompt_features = encoder(prompts)
        query_features, same = _read(encoder, queries, owners)
        held_features, held_same = _read(encoder, held_queries, owners)
        head = train_head(query_features, prompt_features, same, rng)
        # Every row makes two queries.
        self.n_labelled += len(query_features) // 2
        self.n_trained = len(head)
        likelihoods = same_task(head, held_features, prompt_features)
        return {"features": prompt_features, "head": head}, likelihoods[held_same]

    def _as_read(self, texts: Sequence[str]) -> list[str]:
        """Returns texts as the encoder reads them in use: chats without their special tokens."""
        if not any(task.spec.chat for task in self.sources):
            return list(texts)
        return query_texts(self.tokenizer, self.decoder.tokenize(texts))


def _read(
    encoder: SentenceEncoder, by_task: Sequence[Sequence[str]], owners: Int[Tensor, "n_prompts"]
) -> tuple[Float[Tensor, "n_queries n_features"], Bool[Tensor, "n_queries n_prompts"]]:
    """Returns the features of queries, and which library prompts are of their task.

    Args:
        encoder: The sentence encoder.
        by_task: The queries of each task.
        owners: The number of each library prompt's task.
    """
    n_queries = torch.tensor([len(texts) for texts in by_task])
    tasks = torch.arange(len(by_task)).repeat_interleave(n_queries)
    texts = [text for task_texts in by_task for text in task_texts]
    is_same_task = tasks[:, None] == owners
    return encoder(texts), is_same_task
