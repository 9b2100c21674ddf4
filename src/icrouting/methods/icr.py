"""In-Context Routing as one method among others, as it is and behind a gate."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icrouting.decoder.states import last_outputs
from icrouting.icr import InContextRouter
from icrouting.methods.base import Context, Method
from icrouting.methods.settings import Settings
from icrouting.tasks.task import Task

N_ROWS, N_KNOWN, FEWEST, SHUT_OUT, SHRINKAGE = 260, 200, 26, 0.01, 0.1


class Icr(Method):
    """The bare prompt on the routed model; its router was fitted before, on the source tasks."""

    name = "icr"
    draws = False

    def __init__(self, settings: Settings):
        super().__init__(settings)
        if settings.router is None:
            raise ValueError(
                f"the method {self.name!r} needs --router, a folder or hub id: fit one with `icr fit`"
            )
        self._router = InContextRouter.from_pretrained(settings.router)

    def applied(self, task: Task) -> Context:
        """Routes the model by each prompt."""
        return self._router.attached_to(self.decoder)

    def n_cached(self, task: Task) -> int:
        """Returns the size of the PIDs; the paper counts neither router nor sentence encoder."""
        pids = self._router.pids
        return pids.query_pids.numel() + pids.key_pids.numel() + super().n_cached(task)


class IcrGated(Icr):
    """ICR on prompts like those that the router was trained on; others get the model's own answer (not in the paper).

    A prompt is as new as the state of its last token, where it enters the first routed layer, is far from that of the
    nearest source task's prompts, in Mahalanobis distance (Lee et al. 2018; its covariance is shrunk a tenth towards a
    ball). The mean and covariance are those of 200 training rows; 60 others of each task say where the gate shuts: 1 %
    of them would stay out. No label is read, and nothing is run beside what ICR runs.
    """

    name = "icr-gated"
    draws = True
    learned = ("known", "owners", "limit")
    cached = ("known",)
    known: Float[Tensor, "n_known hidden_size"]
    owners: Int[Tensor, "n_known"]
    limit: Tensor

    def learn(self, rng: np.random.Generator) -> None:
        """Keeps the states of rows, and how far the other rows are from them."""
        if (before := self._router.pids.layers[0] - 1) < 0:
            raise ValueError(
                "what enters layer 0 tells no prompts apart: gate a router that routes from layer 1 up"
            )
        rows = {
            t.name: [t.prompt(t.train[i]) for i in rng.permutation(len(t.train))[:N_ROWS]]
            for t in self.sources
        }
        lengths, wanted = (
            {name: len(own) for name, own in rows.items()},
            sorted(self._router.description.tasks),
        )
        if sorted(rows) != wanted or min(lengths.values()) < FEWEST:
            raise ValueError(
                f"a gate needs {FEWEST} rows of each of its router's source tasks, {wanted}; these give {lengths}"
            )
        texts = [*chain(*rows.values())]
        ((states,), _) = last_outputs(self.decoder, [self.decoder.layers[before]], texts)
        parts = [
            own.tensor_split([len(own) * N_KNOWN // N_ROWS])
            for own in states.split([*lengths.values()])
        ]
        self.known = torch.cat([own for own, _ in parts])
        self.owners = torch.cat(
            [torch.full((len(own),), place) for place, (own, _) in enumerate(parts)]
        )
        self.limit = self._distances(torch.cat([others for _, others in parts])).quantile(
            1 - SHUT_OUT
        )

    def applied(self, task: Task) -> Context:
        """Routes the model by each prompt that is not new."""
        return self._router.attached_to(self.decoder, gate=self.is_known)

    def is_known(self, hidden: Sequence[Tensor]) -> Bool[Tensor, "batch"]:
        """Returns whether prompts are routed, given the states that enter the first routed layer."""
        return self._distances(torch.stack([states[-1].cpu() for states in hidden])) <= self.limit

    def depends_on(self) -> str:
        """Returns the router's digest."""
        return self._router.digest()

    def _distances(self, states: Float[Tensor, "n hidden_size"]) -> Float[Tensor, "n"]:
        """Squared, to the nearest task; by Woodbury's identity, since a covariance is hidden_size squared."""
        found = []
        for mean, centred, ball, inverse in _gaussians(self.known, self.owners):
            along = (gaps := states.double() - mean) @ centred.T
            inside = (1 - SHRINKAGE) / len(centred) * ((along @ inverse) * along).sum(1)
            found.append((gaps.square().sum(1) - inside) / ball)
        return torch.stack(found).amin(0)


@lru_cache(maxsize=1)
def _gaussians(known: Tensor, owners: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Each task's mean, its centred states C, b, and (b I + a C C^T)^-1, with covariance a C^T C + b I."""
    found = []
    for owner in owners.unique():
        states = known[owners == owner].double()
        centred = states - (mean := states.mean(0))
        ball = SHRINKAGE * centred.square().mean()
        gram = (1 - SHRINKAGE) / len(states) * centred @ centred.T
        found.append((mean, centred, ball, torch.linalg.inv(gram + ball * torch.eye(len(states)))))
    return found
