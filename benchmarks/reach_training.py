"""How `reach` trains a router on one task: see `benchmarks.reach`."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.reach_parts import Parts, World, scores_of
from icrouting.config import FitConfig
from icrouting.fitting.queries import Query
from icrouting.fitting.training import Trainer
from icrouting.fitting.validation import Look
from icrouting.report.calibrated import without_prior
from icrouting.routing.router import Router

# Share of a batch in the running mean of the task's log-probabilities.
MEAN_RATE = 0.03
# Step of plain gradient descent on the free bias: AdamW's rate would move it by hundredths.
BIAS_RATE = 0.3
# Batches of an epoch whose rows are sorted by length, so that less of them is padding.
SORTED_TOGETHER = 5
PATIENCE = 3


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to fit alpha and gamma on a task's own training rows.

    Attributes:
        changes: settings that differ from `FitConfig`'s defaults.
        target: what is learned: the labels, the few-shot model's distribution over the options, or
            that with its mean over the training rows taken away.
        prior: what is done about the options' prior: nothing ("kept"), a free bias beside the
            option scores trained along ("learned"), or the loss on log-probabilities less their
            running mean ("taken").
        reads: what the router reads of a prompt; "constant" routes all prompts alike.
        layers: the routed ones, "late" or "all" but the first, whose queries tell nothing apart.
        times: how many times the usual steps, stopped early on rows apart.
    """

    changes: dict = dataclasses.field(default_factory=dict)
    target: Literal["labels", "teacher", "calibrated teacher"] = "labels"
    prior: Literal["kept", "learned", "taken"] = "kept"
    reads: Literal["encoder", "hidden", "constant"] = "encoder"
    layers: Literal["late", "all"] = "late"
    times: int = 1


VARIANTS = {
    "default": Variant(),
    "taken": Variant(prior="taken"),
    "lr-3e-4": Variant({"lr": 3e-4}),
    "constant": Variant(reads="constant"),
    "teacher": Variant(target="teacher"),
    "learned-prior": Variant(prior="learned"),
    "taken-lr-3e-4": Variant({"lr": 3e-4}, prior="taken"),
    "taken-constant": Variant(prior="taken", reads="constant"),
    "calibrated-teacher": Variant(target="calibrated teacher", prior="taken"),
    "rank-16": Variant({"rank": 16}),
    "hidden": Variant(reads="hidden"),
    "long": Variant(times=3),
    "all-layers": Variant(layers="all"),
}
# Several times as dear as the others.
DEAR = ("all-layers",)


def config_of(variant: Variant, base: FitConfig, n_steps: int) -> FitConfig:
    """Returns the settings that a variant fits with."""
    config = dataclasses.replace(
        base,
        epochs=1,
        min_steps=n_steps * variant.times,
        patience=PATIENCE if variant.times > 1 else 0,
    )
    return dataclasses.replace(config, **variant.changes)


class Diagnosed(Trainer):
    """A training that is asked the rows apart and the test rows as it goes.

    Attributes:
        parts: queries by name, asked every `every` steps.
        targets: distribution over the options that each training row is to have.
        prior: see `Variant`.
        every: steps from one look to the next.
        looks: by step, the scores of each of the parts.
        seconds_looking: what the looks took.
        option_prior: the running mean ("taken") or the free bias ("learned"), by option.
    """

    def begin(self, parts: Mapping[str, Sequence[Query]], targets: Tensor, prior: str, every: int):
        """Says what is trained for and what is asked; to be called before `run`."""
        self.parts = parts
        self.targets = targets
        self.prior = prior
        self.every = every
        self.looks: dict[int, dict[str, Tensor]] = {}
        self.seconds_looking = 0.0
        self.option_prior: Tensor | None = None

    def _judge(self, entry, attachment):
        if self.step in self.looks or (self.step % self.every and self.step < self.n_steps):
            return
        start = time.perf_counter()

        def route(queries):
            features = torch.stack([query.features for query in queries])
            routing = self.router(features.to(self.decoder.device))
            attachment.routing = routing.scaled(self.config.final_alpha_scale)

        look = {}
        for name, queries in self.parts.items():
            scores = scores_of(queries, self.decoder, entry, route)
            if self.prior == "learned" and self.option_prior is not None:
                scores = scores + self.option_prior.cpu()[: scores.shape[1]]
            look[name] = scores
        self.looks[self.step] = look
        self.seconds_looking += time.perf_counter() - start
        if self.watch._patience:
            labels = [query.answer for query in self.parts["held"]]
            loss = loss_of(look["held"], labels, is_taken=self.prior == "taken")
            # The accuracy stops nothing.
            self.watch.add(Look(self.step, loss, 0.0), self.router)

    def _rows(self):
        epoch, position = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        order = torch.randperm(len(self.queries), generator=generator).tolist()
        size = self.config.batch_size
        n_together = size * SORTED_TOGETHER
        block = position // SORTED_TOGETHER * n_together
        together = order[block : block + n_together]
        together.sort(key=lambda row: len(self.queries[row].state.tokens))
        start = position % SORTED_TOGETHER * size
        return together[start : start + size]

    def _cross_entropy(self, logits, queries):
        """Returns the cross-entropy of the targets among the options, the prior seen to."""
        n_options = self.targets.shape[1]
        ids = torch.full((len(queries), n_options), -1)
        for place, query in enumerate(queries):
            ids[place, : len(query.option_ids)] = torch.tensor(query.option_ids)
        ids = ids.to(logits.device)
        is_padding = ids < 0
        option_logits = logits.gather(1, ids.clamp_min(0)).masked_fill(is_padding, -torch.inf)
        targets = self.targets[[query.row for query in queries]].to(logits.device)
        log_probs = option_logits.log_softmax(1)
        if self.prior == "taken":
            mean = self._follow_mean(log_probs.detach(), is_padding)
            log_probs = (log_probs - mean).log_softmax(1)
        elif self.prior == "learned":
            if self.option_prior is None:
                self.option_prior = torch.zeros(n_options, device=logits.device)
            log_probs = (option_logits + self.option_prior).log_softmax(1)
            excess = log_probs.detach().exp() - targets
            self.option_prior = self.option_prior - BIAS_RATE * excess.mean(0)
        return -(targets * log_probs.masked_fill(is_padding, 0.0)).sum(1).mean()

    def _follow_mean(self, log_probs: Tensor, is_padding: Tensor) -> Tensor:
        """Returns the running mean of log-probabilities, of which a batch has become part."""
        n_rows = (~is_padding).sum(0)
        mean = log_probs.masked_fill(is_padding, 0.0).sum(0) / n_rows.clamp_min(1)
        if self.option_prior is None:
            self.option_prior = mean
        # An option that no row of the batch has stays where it was.
        moved = self.option_prior + MEAN_RATE * (mean - self.option_prior)
        self.option_prior = torch.where(n_rows > 0, moved, self.option_prior)
        return self.option_prior


def loss_of(scores: Tensor, labels: Sequence[int], *, is_taken: bool = False) -> float:
    """Returns the mean cross-entropy of labels in nats, the options' mean taken away or not."""
    if is_taken:
        scores = torch.from_numpy(without_prior(scores.numpy()))
    log_probs = scores.log_softmax(1)
    return -log_probs[range(len(labels)), list(labels)].mean().item()


def targets_of(parts: Parts, target: str) -> Tensor:
    """Returns the distribution over the options that each training row is to have."""
    teacher = parts.traces["scores"]
    if target == "labels":
        return torch.nn.functional.one_hot(
            torch.tensor(parts.labels("train")), teacher.shape[1]
        ).float()
    if target == "calibrated teacher":
        teacher = torch.from_numpy(without_prior(teacher.double().numpy())).float()
    return teacher.softmax(1)


def _read_as(reads: str, parts: dict[str, list[Query]]) -> dict[str, list[Query]]:
    """Returns queries with the features that a variant's router reads."""
    if reads == "encoder":
        return parts
    hidden = torch.stack([query.state.hidden[-1].float() for query in parts["train"]])
    mean = hidden.mean(0)
    std = hidden.std(0).clamp_min(1e-6)
    changed = {}
    for name, queries in parts.items():
        changed[name] = []
        for query in queries:
            features = torch.ones_like(query.features)
            if reads == "hidden":
                features = (query.state.hidden[-1].float() - mean) / std
            changed[name].append(dataclasses.replace(query, features=features))
    return changed


def fit(world: World, parts: Parts, name: str, n_steps: int, every: int) -> dict:
    """Returns what a variant's router answers on rows apart and on test rows, look by look."""
    start = time.perf_counter()
    variant = VARIANTS[name]
    config = config_of(variant, world.config, n_steps)
    layers = world.late
    by_part = {"train": parts.train, "held": parts.held, "test": parts.test}
    # Before the states of another layer take the place of those it reads.
    by_part = _read_as(variant.reads, by_part)
    if variant.layers == "all":
        layers = tuple(range(1, world.decoder.dims.n_layers))
        by_part = {part: world.entering(each, 1) for part, each in by_part.items()}
    queries = by_part.pop("train")
    router = Router(
        len(queries[0].features),
        len(layers),
        world.decoder.dims.n_heads,
        config.rank,
        config.hidden_width,
        torch.Generator().manual_seed(config.seed),
    ).to(world.decoder.device)
    pids = world.pids_of(parts, layers, config.rank)
    prepared = time.perf_counter()
    trainer = Diagnosed(world.decoder, pids, router, queries, config)
    trainer.begin(by_part, targets_of(parts, variant.target), variant.prior, every)
    trainer.run()
    training = time.perf_counter() - prepared - trainer.seconds_looking
    return {
        "n_steps": trainer.step,
        "losses": [round(entry["ce"], 4) for entry in trainer.log],
        "option_prior": None if trainer.option_prior is None else trainer.option_prior.tolist(),
        "looks": {
            step: {part: as_lists(scores) for part, scores in look.items()}
            for step, look in trainer.looks.items()
        },
        "seconds_preparing": round(prepared - start, 1),
        "seconds_training": round(training, 1),
        "seconds_looking": round(trainer.seconds_looking, 1),
    }


def as_lists(scores: Tensor) -> list[list[float]]:
    """Returns each row's scores; what pads rows with fewer options is left out."""
    return [[round(score, 4) for score in row if score > -torch.inf] for row in scores.tolist()]
