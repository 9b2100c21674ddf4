"""A study: a router on its model, and the test rows that are asked, once for all analyses."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.analysing.config import AnalysisConfig
from icrouting.analysing.passes import Traces, routed_passes, traces_of
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids
from icrouting.evaluation.items import draw_items
from icrouting.icr import InContextRouter
from icrouting.routing.reader import Reader
from icrouting.routing.router import Routing
from icrouting.tasks.prompts import Prompt, balanced_demos, few_shot, zero_shot
from icrouting.tasks.task import Example, Task

N_RESAMPLES = 1000
# Stands in the place of a task where each of them weighs alike.
MEAN = "mean over tasks"


@dataclass(frozen=True)
class Item:
    """A test row as it is asked.

    Attributes:
        task: the name of its task.
        query: its zero-shot prompt.
        few_shot: the same behind demonstrations of the task.
        label: the place of the right option.
        option_ids: the first token of each option; None where these do not tell the options apart.
    """

    task: str
    query: Prompt
    few_shot: Prompt
    label: int
    option_ids: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Study:
    """A router on its model, the tasks, and their test rows as items; what is costly is kept.

    Every prompt is routed at strength 1, whether the router's gate would let it in or not: what is
    looked at is the router.

    Attributes:
        icr: the router.
        decoder: the model that it routes.
        tasks: the tasks, by name.
        items: the test rows of all tasks.
        config: what is asked for.
    """

    icr: InContextRouter
    decoder: Decoder
    tasks: dict[str, Task]
    items: list[Item]
    config: AnalysisConfig

    @classmethod
    def of(
        cls,
        icr: InContextRouter,
        decoder: Decoder,
        tasks: Sequence[Task],
        config: AnalysisConfig,
    ) -> "Study":
        """Returns the study of a router; ValueError where a prompt does not fit the model."""
        items: list[Item] = []
        bound = [task.bound_to(decoder.tokenizer) for task in tasks]
        for task in bound:
            demos = demos_of(task, icr, config.seed)
            for place in draw_items(task, config.n_test):
                items.append(_item(decoder, task, task.test[place], demos))
        # Before any pass: a prompt that does not fit costs nothing then.
        decoder.tokenize([item.query.text for item in items])
        study = cls(icr, decoder, {task.name: task for task in bound}, items, config)
        # So is another model or encoder than the router's.
        _ = study.reader
        return study

    @property
    def layers(self) -> tuple[int, ...]:
        """The routed layers."""
        return self.icr.pids.layers

    @property
    def task_names(self) -> list[str]:
        """The tasks, in the order in which they were named."""
        return list(self.tasks)

    def is_seen(self, task: str) -> bool:
        """Whether the router was fitted on a task, by its name."""
        return task in self.icr.description.tasks

    @property
    def groups(self) -> dict[str, list[list[int]]]:
        """The places of the items of each task, and under `MEAN` those of all, task by task."""
        rows_by_task = {task: self.rows_of(task) for task in self.tasks}
        groups = {task: [rows] for task, rows in rows_by_task.items()}
        return groups | {MEAN: list(rows_by_task.values())}

    def rows_of(self, task: str) -> list[int]:
        """The places of a task's items."""
        return [row for row, item in enumerate(self.items) if item.task == task]

    @cached_property
    def reader(self) -> Reader:
        """Reads the routing of prompts."""
        return self.icr.reader(self.decoder)

    @cached_property
    def queries(self) -> list[list[int]]:
        """The tokens of the zero-shot prompts."""
        return self.decoder.tokenize([item.query.text for item in self.items])

    @cached_property
    def contexts(self) -> list[list[int]]:
        """The tokens of the few-shot prompts; ValueError where one is longer than the model's."""
        return self.decoder.tokenize([item.few_shot.text for item in self.items])

    @cached_property
    def routing(self) -> Routing:
        """What the router decides for each item, on the processor."""
        routing = self.reader.of_tokens(self.queries)
        return Routing(routing.routing_vector.cpu(), routing.head_gates.cpu())

    @cached_property
    def zero_and_routed(
        self,
    ) -> tuple[Float[Tensor, "n_items vocab"], Float[Tensor, "n_items vocab"]]:
        """The next token's log-probabilities behind zero-shot prompts, plain and routed."""
        # Read before, since no layer below the routed ones runs inside.
        routing = self.routing
        with routed_passes(self.decoder, self.icr.pids, self.queries) as (plain, run):
            return plain, run(routing)

    @cached_property
    def few_shot_traces(self) -> Traces:
        """What few-shot prompts leave: the next token, and queries in the routed layers."""
        prompts = [item.few_shot for item in self.items]
        return traces_of(self.decoder, prompts, self.layers)

    def is_right(self, log_probs: Float[Tensor, "n_items vocab"]) -> Float[np.ndarray, "n_items"]:
        """Returns 1 where the likeliest option is the right one, 0 where it is not.

        NaN where first tokens do not tell the options apart.
        """
        answers = []
        for item, row in zip(self.items, log_probs, strict=True):
            if item.option_ids is None:
                answers.append(float("nan"))
            else:
                best = int(row[list(item.option_ids)].argmax())
                answers.append(float(best == item.label))
        return np.array(answers)

    def among_options(
        self, log_probs: Float[Tensor, "n_items vocab"]
    ) -> list[Float[Tensor, "_"] | None]:
        """Returns each item's log-probabilities among its options; None where these are mixed."""
        rows: list[Tensor | None] = []
        for item, row in zip(self.items, log_probs, strict=True):
            ids = item.option_ids
            rows.append(None if ids is None else row[list(ids)].log_softmax(-1))
        return rows


def demos_of(task: Task, icr: InContextRouter, seed: int) -> list[Example]:
    """Returns a task's demonstrations, as many of a class as the router was fitted with."""
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    return balanced_demos(task, icr.description.fit.demos_per_class, rng)


def _item(decoder: Decoder, task: Task, row: Example, demos: Sequence[Example]) -> Item:
    query = zero_shot(task, row)
    try:
        ids = tuple(option_ids(decoder.tokenizer, query.text, task.options(row), query.joint))
    except ValueError:
        # Options that share their first tokens are scored by all of them, and have no such place.
        if task.spec.label_scoring == "first":
            raise
        ids = None
    return Item(
        task.name, query, few_shot(task, row, [(task, demo) for demo in demos]), row.label, ids
    )


def with_interval(
    name: str, groups: Sequence[Sequence[float]] | Sequence[np.ndarray]
) -> dict[str, float]:
    """Returns the mean over groups of their means, and its 95 % interval, as three columns.

    They are `name`, `name_low` and `name_high`. The interval is a bootstrap's over the items of
    each group; NaN values are left out, and all three are NaN where a group has no others.
    """
    rng = np.random.default_rng(0)
    means = []
    draws = []
    for values in groups:
        numbers = np.asarray(values, dtype=float)
        numbers = numbers[~np.isnan(numbers)]
        if not len(numbers):
            return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
        means.append(numbers.mean())
        places = rng.integers(len(numbers), size=(N_RESAMPLES, len(numbers)))
        draws.append(numbers[places].mean(1))
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    mean = float(np.mean(means))
    return {name: mean, f"{name}_low": float(low), f"{name}_high": float(high)}


def is_constant(values: Tensor | np.ndarray) -> bool:
    """Whether all numbers are the same, of which no correlation can be told."""
    numbers = torch.as_tensor(values)
    return bool((numbers == numbers.flatten()[0]).all())
