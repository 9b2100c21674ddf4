"""ELICIT (Wang et al. 2025): a library of task vectors, and a retriever that picks some for each prompt, or none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
from icrouting.tasks.prompts import episodes, few_shot
from icrouting.tasks.task import Task

N_PROMPTS, N_TOP, N_ROWS = 10, 10, 100
GRID = [
    {"weight": weight, "recall": recall} for weight in (2.0, 1.0, 0.5) for recall in (0.8, 0.7, 0.9)
]


class Elicit(Method):
    """The state at the prompt's last token, after one block, gets `weight` times a retrieved state added.

    The library holds 10 few-shot prompts per source task with the last-token states of all layers, and the layer
    at which a task's mean state does best on its validation rows. A retriever says how likely a prompt and a
    library prompt are of one task. If none reaches the threshold, the prompt is left alone; else the mean of the 10
    likeliest states is added at their most frequent layer ("soft" in the published code). Generated tokens are left
    alone. With one source task there is no retriever: an added mean task vector remains.

    Differs: a frozen encoder (`Settings.encoder`) under the published head, which needs a higher learning rate
    (published: SimCSE RoBERTa, trained along); pairs are always (query, library prompt); queries are training rows
    outside the library (published: by hand); 5 demonstrations per class, not 16; weight and recall are searched.
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
        """Fills the library, trains the retriever, and chooses layers, weight and recall on validation rows."""
        if not self.sources or not all(task.validation for task in self.sources):
            raise ValueError(
                "ELICIT chooses layers on validation rows: give 5 training rows or more per source task"
            )
        self.n_labelled = sum(len(task.validation) for task in self.sources)
        library = [self._prompts(task, rng) for task in self.sources]
        texts, blocks = (
            [text for shown, _ in library for text in shown],
            list(self.decoder.layers),
        )
        states = torch.stack([mean_last_outputs(self.decoder, blocks, [text]) for text in texts])
        retriever, likely = {"features": torch.zeros(0, 0), "head": torch.zeros(0)}, torch.zeros(1)
        if len(library) > 1:
            retriever, likely = self._retriever(texts, [queries for _, queries in library], rng)
        layers: dict[float, Tensor] = {}

        def build(weight: float, recall: float) -> dict[str, Tensor]:
            if weight not in layers:
                layers[weight] = self._best_layers(states, weight)
            own = {
                "states": states,
                "layers": layers[weight],
                "weight": torch.tensor(weight),
                **retriever,
            }
            return {**own, "threshold": likely.quantile(1 - recall, interpolation="lower")}

        self.choose(
            GRID if len(library) > 1 else GRID[::3], build
        )  # recall means nothing without a retriever

    def depends_on(self) -> str:
        """Returns the fingerprint of the retriever's encoder, if there is one."""
        return load_encoder(self.settings.encoder).fingerprint if len(self.head) else ""

    @torch.no_grad()
    def retrieved(
        self, texts: Sequence[str]
    ) -> tuple[Float[Tensor, "batch hidden_size"], Int[Tensor, "batch"]]:
        """Returns what is added for each prompt, and at which layer: -1 where the prompt is left alone."""
        likely = torch.ones(len(texts), len(self.states))
        if len(self.head):
            likely = same_task(self.head, load_encoder(self.settings.encoder)(texts), self.features)
        top = likely.topk(N_TOP)
        layers = (
            nn.functional.one_hot(self.layers[top.indices], self.states.shape[1]).sum(1).argmax(1)
        )
        vectors = self.weight * self.states[top.indices, layers[:, None]].mean(1)
        return vectors, layers.masked_fill(top.values[:, 0] < self.threshold, -1)

    @contextmanager
    def applied(self, task: Task) -> Iterator[None]:
        """Adds at each row's last token what its tokens retrieve, but in no step of a generation."""
        kept: list[Tensor] = []

        def add(layer: int, states: Tensor) -> Tensor:
            if layer == 0 and len(states):
                kept[:] = self.retrieved(query_texts(self.tokenizer, now.prompts()))
            if not len(states) or not (is_here := kept[1] == layer).any():
                return states
            return torch.where(is_here.to(states.device)[:, None], added(states, kept[0]), states)

        with edited_last(self.model, list(self.decoder.layers), add, in_steps=False) as now:
            yield

    def _prompts(self, task: Task, rng: np.random.Generator) -> tuple[list[str], list[str]]:
        """Returns the library's prompts of a task, and queries for the retriever, of rows that none of them shows."""
        drawn = list(episodes(task, N_PROMPTS, self.settings.demos_per_class, rng))
        used = {id(row) for demos, query in drawn for row in (*demos, query)}
        self.n_labelled += len(used)
        unused = [row for row in task.train if id(row) not in used] or list(task.train)
        rows = [
            unused[i] for i in rng.permutation(len(unused))[: min(N_ROWS, self.settings.train_rows)]
        ]
        queries = [
            text for row in rows for text in (task.prompt(row), " ".join(row.fields.values()))
        ]
        return [
            few_shot(task, query, [(task, demo) for demo in demos]).text for demos, query in drawn
        ], queries

    def _best_layers(self, states: Tensor, weight: float) -> Int[Tensor, "n_prompts"]:
        """Returns for each library prompt where its task's mean state does best, the earliest of equals."""
        found = []
        for task, own in zip(self.sources, states.split(N_PROMPTS), strict=True):
            rows = [(task, row) for row in task.validation]
            accuracies = sweep(self.decoder, rows, weight * own.mean(0), kept=1.0)
            of = {"library of": task.name, "weight": weight}
            self.tried += [
                {**of, "layer": layer, "accuracy": one}
                for layer, one in enumerate(accuracies.tolist())
            ]
            found.append(accuracies.argmax())
        return torch.stack(found).repeat_interleave(N_PROMPTS)

    def _retriever(
        self, texts: Sequence[str], queries: Sequence[Sequence[str]], rng: np.random.Generator
    ) -> tuple[dict[str, Tensor], Float[Tensor, "n_pairs"]]:
        """Returns the retriever, and how likely it finds validation prompts and library prompts of their own task."""
        encoder = load_encoder(self.settings.encoder)
        held = [[task.prompt(row) for row in task.validation] for task in self.sources]
        owners, features = torch.arange(len(held)).repeat_interleave(N_PROMPTS), encoder(texts)
        read, same = zip(*(_read(encoder, each, owners) for each in (queries, held)), strict=True)
        head = train_head(read[0], features, same[0], rng)
        self.n_labelled, self.n_trained = self.n_labelled + len(read[0]) // 2, len(head)
        return {"features": features, "head": head}, same_task(head, read[1], features)[same[1]]


def _read(
    encoder: SentenceEncoder, by_task: Sequence[Sequence[str]], owners: Int[Tensor, "n_prompts"]
) -> tuple[Float[Tensor, "n_queries n_features"], Bool[Tensor, "n_queries n_prompts"]]:
    """Returns the features of queries, and which library prompts are of their task."""
    tasks = torch.arange(len(by_task)).repeat_interleave(
        torch.tensor([len(texts) for texts in by_task])
    )
    return encoder([text for texts in by_task for text in texts]), tasks[:, None] == owners
