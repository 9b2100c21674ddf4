"""In-Context Routing as one method among others, as it is and behind a gate."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.states import last_outputs
from icrouting.fitting.folds import n_read
from icrouting.fitting.rows import n_judged, rows_to_learn_from
from icrouting.icr import InContextRouter
from icrouting.methods.base import Context, Method
from icrouting.methods.settings import Settings
from icrouting.routing.gate import FEWEST_ROWS, N_KNOWN, SHUT_OUT, gaussians
from icrouting.routing.reader import Gate, Reader
from icrouting.routing.sources import as_learned
from icrouting.tasks.task import Task

# Rows of a source task that a gate reads, and those of them that it knows; the others, whose states
# it has not seen, say how far from the known ones a row of the same task may lie.
N_ROWS = 260


class Icr(Method):
    """The bare prompt on the routed model; its router was fitted before, on the source tasks."""

    name = "icr"
    draws = False
    follows_checkpointing = True
    reads_sources = False

    def __init__(self, settings: Settings):
        super().__init__(settings)
        if settings.router is None:
            raise ValueError(
                f"the method {self.name!r} needs --router, a folder or hub id: "
                "fit one with `icr fit`"
            )
        # At once, so that a router that is not there stops a run before any work.
        self._router = InContextRouter.from_pretrained(settings.router)
        self._checked: tuple[Decoder, Reader] | None = None

    def applied(self, task: Task) -> Context:
        """Routes the model by each prompt."""
        return self._router.attached_by(self._reader())

    def fitted_before(self, sources: Sequence[Task]) -> dict[str, Any]:
        """Returns what the router's fit took, reckoned from its settings and its tasks' sizes."""
        description = self._router.description
        config = description.fit
        tasks = description.tasks
        counts = [description.n_taken(task) for task in tasks]
        n_prompts = [n for n, _ in counts]
        n_queries = sum(n for _, n in counts)
        n_contexts = 0
        # A context that several prompts share is run by itself.
        if config.queries_per_context > 1 and config.shown_per_class:
            n_contexts = sum(math.ceil(n / config.queries_per_context) for n in n_prompts)
        n_labelled = description.n_judged
        for (_, n), n_rows in zip(counts, tasks.values(), strict=True):
            n_labelled += max(n, n_rows)
        # How many classes there are, the router does not tell.
        if tasks.keys() == {task.name for task in sources}:
            n_labelled = most_labelled(sources, config)
        # Rows that training read, repeats too.
        n_steps = n_read(n_queries, description.n_judged, config)
        n_trained = sum(weights.numel() for weights in self._router.router.parameters())
        pids = self._router.pids
        if config.basis == "learned":
            n_trained += pids.query_pids.numel() + pids.key_pids.numel()
        return {
            "method": Icr.name,
            "fits": 1,
            "labelled": n_labelled,
            "trained": n_trained,
            "forwards": sum(n_prompts) + n_contexts + n_queries + n_steps,
            "backwards": n_steps,
            "seconds": None,
        }

    def _reader(self, gate: Gate | None = None) -> Reader:
        """What reads prompts; a decoder is held against the router once, not at every entry."""
        if self._checked is None or self._checked[0] is not self.decoder:
            self._checked = self.decoder, self._read_by(gate)
        return self._checked[1]

    def _read_by(self, gate: Gate | None) -> Reader:
        """Returns the router's reader, which a control has another one of."""
        return self._router.reader(self.decoder, gate=gate)

    def n_cached(self, task: Task) -> int:
        """Returns the size of the PIDs; the paper counts neither router nor sentence encoder."""
        pids = self._router.pids
        return pids.query_pids.numel() + pids.key_pids.numel() + super().n_cached(task)


def most_labelled(tasks: Sequence[Task], config: FitConfig) -> int:
    """Returns how many labelled rows a router's fit looks at, at most.

    A bound, since demonstrations are drawn anew for each prompt.
    """
    demos_per_class = config.n_prompts * config.shown_per_class
    most = sum(n_judged(tasks, config).values())
    for task in tasks:
        rows = rows_to_learn_from(task, tasks, config)
        n_classes = len(set(task.train_labels.tolist()))
        n_drawn = config.n_queries + demos_per_class * n_classes
        most += min(len(rows), n_drawn)
    return most


class IcrGated(Icr):
    """ICR on prompts like those that the router was trained on (not in the paper).

    Other prompts get the model's own answer. A prompt is as new as the state of its last token,
    where it enters the first routed layer, is far from that of the nearest source task's prompts,
    in Mahalanobis distance (Lee et al. 2018; its covariance is shrunk a tenth towards a ball). The
    mean and covariance are those of 200 training rows; 60 others of each task say where the gate
    shuts: 1 % of them would stay out. No label is read, and nothing is run beside what ICR runs.

    Attributes:
        known: states of rows of the source tasks, [n_known, hidden_size].
        owners: which task each of them is of, by its place among the sources, [n_known].
        limit: the largest squared distance of a prompt that is routed.
    """

    name = "icr-gated"
    draws = True
    reads_sources = True
    learned = ("known", "owners", "limit")
    cached = ("known",)
    known: Float[Tensor, "n_known hidden_size"]
    owners: Int[Tensor, "n_known"]
    limit: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Keeps the states of rows, and how far the other rows are from them."""
        first_layer = self._router.pids.layers[0]
        if first_layer == 0:
            raise ValueError(
                "what enters layer 0 tells no prompts apart: "
                "gate a router that routes from layer 1 up"
            )
        prompts_by_task = self._drawn_prompts(rng)
        self._check_rows(prompts_by_task)
        # What enters a layer is what the one before it gives.
        block = self.decoder.layers[first_layer - 1]
        prompts = [prompt for group in prompts_by_task.values() for prompt in group]
        states_by_block, _ = last_outputs(self.decoder, [block], prompts)
        n_rows = [len(group) for group in prompts_by_task.values()]
        known = []
        owners = []
        others = []
        # By place, since names are no tensor.
        for place, states in enumerate(states_by_block[0].split(n_rows)):
            n_known = len(states) * N_KNOWN // N_ROWS
            known.append(states[:n_known])
            owners.append(torch.full((n_known,), place))
            others.append(states[n_known:])
        self.known = torch.cat(known)
        self.owners = torch.cat(owners)
        # Needs the two above in place. Of rows like the known ones, 1 % are farther away.
        self.limit = self._distances(torch.cat(others)).quantile(1 - SHUT_OUT)

    def applied(self, task: Task) -> Context:
        """Routes the model by each prompt that is not new."""
        return self._router.attached_by(self._reader(self.is_known))

    def is_known(self, hidden: Sequence[Tensor]) -> Bool[Tensor, "batch"]:
        """Returns whether prompts are routed.

        Args:
            hidden: a prompt's states where they enter the first routed layer,
                [q_len, hidden_size] each.
        """
        # The known states stay off the accelerator.
        last_states = torch.stack([states[-1].cpu() for states in hidden])
        return self._distances(last_states) <= self.limit

    def depends_on(self) -> str:
        """Returns the router's digest."""
        return self._router.digest()

    def _drawn_prompts(self, rng: np.random.Generator) -> dict[str, list[str]]:
        """Returns the bare prompts of rows that are drawn from each source task.

        They are chats where those were that the router learned from, however tasks are asked here.
        """
        prompts_by_task = {}
        for source in self.sources:
            task = as_learned(source, self._router.description.sources or ())
            task = task.bound_to(self.tokenizer)
            places = rng.permutation(len(task.train))[:N_ROWS]
            prompts_by_task[task.name] = [task.prompt(task.train[i]) for i in places]
        return prompts_by_task

    def _check_rows(self, prompts_by_task: dict[str, list[str]]) -> None:
        """ValueError unless there are rows enough of the tasks that the router learned from."""
        # Prompts of a task that the router never learned from would count as known.
        n_rows = {name: len(prompts) for name, prompts in prompts_by_task.items()}
        wanted = sorted(self._router.description.tasks)
        if sorted(n_rows) != wanted or min(n_rows.values()) < FEWEST_ROWS:
            raise ValueError(
                f"a gate needs {FEWEST_ROWS} rows of each of its router's source tasks, {wanted}; "
                f"these give {n_rows}"
            )

    def _distances(self, states: Float[Tensor, "n hidden_size"]) -> Float[Tensor, "n"]:
        """Returns the squared distance of states to the nearest task."""
        by_task = []
        for gaussian in gaussians(self.known, self.owners):
            by_task.append(gaussian.distances(states))
        return torch.stack(by_task).amin(0)
