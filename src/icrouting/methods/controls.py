"""Controls of ICR: a router fitted anew with one thing changed; what it loses to `icr-refit`, that thing gives."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from icrouting.config import Basis, FitConfig
from icrouting.decoder.families import device_of
from icrouting.fitting import stages
from icrouting.icr import InContextRouter
from icrouting.methods.base import Context, Method
from icrouting.methods.settings import Settings
from icrouting.routing.features import features_of
from icrouting.routing.pids import PIDs
from icrouting.routing.reader import Reader
from icrouting.routing.rerouting import rerouted
from icrouting.routing.router import Router
from icrouting.runtime.processes import alone
from icrouting.tasks.task import Task


class Refit(Method):
    """ICR itself with nothing changed, fitted on the very task or on the sources, as its controls are.

    The configuration is that of `Settings.router`, its seed included; without one, the defaults, with
    `Settings.train_rows` queries per task. Nothing is chosen on validation rows.
    """

    name = "icr-refit"
    draws = False
    learned = ("layers", "query_directions", "key_directions", "weights")
    cached = ("query_directions", "key_directions")
    kind: type[Router] = Router
    basis: Basis | None = None
    blind = ""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        config = _config(settings)
        self.config = replace(
            config, basis=self.basis or config.basis, encoder=self.blind + config.encoder
        )

    def learn(self, rng: np.random.Generator) -> None:
        """Fits directions and router; `n_labelled` is a bound, since demonstrations are drawn anew for each prompt."""
        with alone():  # others may be learning another task
            pids, router, _ = stages.fit(self.decoder, self.sources, self.config, kind=self.kind)
        self.layers, sides = (
            torch.tensor(pids.layers),
            (pids.query_directions(), pids.key_directions()),
        )
        self.query_directions, self.key_directions = (side.detach().cpu() for side in sides)
        self.weights = parameters_to_vector(
            v.cpu() for n, v in router.named_parameters() if not n.endswith("_pids")
        )
        self.n_trained = sum(parameter.numel() for parameter in router.parameters())
        per_class, n_queries = (
            self.config.n_prompts * self.config.demos_per_class,
            self.config.n_queries,
        )
        n_drawn = [
            n_queries + per_class * len(set(task.train_labels.tolist())) for task in self.sources
        ]
        self.n_labelled = sum(
            min(len(task.train), n) for task, n in zip(self.sources, n_drawn, strict=True)
        )

    def applied(self, task: Task) -> Context:
        """Routes the model by each prompt."""
        decoder = self.decoder
        layers = tuple(self.layers.tolist())
        rank = self.query_directions.shape[-1]
        features = features_of(self.config.encoder, decoder, "cpu")
        sizes = (
            features.n_features,
            len(layers),
            decoder.dims.n_heads,
            rank,
            self.config.hidden_width,
        )
        router = self.kind(*sizes).requires_grad_(False)
        vector_to_parameters(self.weights, router.parameters())
        one = torch.ones(
            len(layers), rank
        )  # the directions are whitened already where the basis is
        pids = PIDs(layers, self.query_directions, self.key_directions, one, one, one, one, "pca")
        router.to(decoder.device)
        scale = self.config.final_alpha_scale
        return rerouted(Reader(decoder, features, router, layers[0], scale), pids)

    def depends_on(self) -> str:
        """Returns the configuration, which may be a router's, and the fingerprint of what the router reads."""
        return f"{self.config}, {features_of(self.config.encoder, self.decoder, 'cpu').fingerprint}"


def _config(settings: Settings) -> FitConfig:
    if settings.router is not None:
        return InContextRouter.from_pretrained(settings.router).description.fit
    config = FitConfig(demos_per_class=settings.demos_per_class, encoder=settings.encoder)
    n_prompts = max(
        config.rank + 1, min(config.n_prompts, settings.train_rows)
    )  # PCA needs more than directions
    return replace(config, n_prompts=n_prompts, n_queries=settings.train_rows)


class RandomBasis(Refit):
    """Random orthonormal directions instead of principal ones (paper, ablations); they are never whitened."""

    name = "icr-random-basis"
    basis = "random"


class _TrainedDirections(Router):
    def adopt(self, pids: PIDs) -> PIDs:
        sides = pids.query_pids, pids.key_pids
        self.query_pids, self.key_pids = (nn.Parameter(side.to(device_of(self))) for side in sides)
        return replace(pids, query_pids=self.query_pids, key_pids=self.key_pids)


class LearnedDirections(RandomBasis):
    """Directions trained together with the router, from random ones on and free to be no longer orthonormal."""

    name = "icr-learned-directions"
    kind = _TrainedDirections


class ConstantFeatures(Refit):
    """A router that reads the same of every prompt, so that it routes all of them alike."""

    name = "icr-constant"
    blind = "constant:"


class RandomFeatures(Refit):
    """A router that reads a fixed random vector per prompt: it can tell prompts apart, and nothing about them."""

    name = "icr-random-features"
    blind = "random:"


class _Same(nn.Module):
    """In a perceptron's place: one number, 0 at first; a sum, as Adam moves a parameter no faster than its rate."""

    def __init__(self, n_out: int, n_terms: int):
        super().__init__()
        self.n_out, self.terms = n_out, nn.Parameter(torch.zeros(n_terms))

    def forward(self, features: Tensor) -> Tensor:
        return self.terms.sum().expand(len(features), self.n_out)


def _uniform(part: str, place: int, is_trained: bool) -> type[Router]:
    """The kind of router with one number for a part's outputs, a layer's being the `place`th of its sizes."""

    class Uniform(Router):
        def __init__(self, *sizes: Any):
            super().__init__(*sizes)
            hidden_width = sizes[4] if is_trained else 0
            setattr(self, part, nn.Sequential(_Same(sizes[1] * sizes[place], hidden_width)))

    return Uniform


class UniformAlpha(Refit):
    """One alpha, trained (paper silent), for all directions, layers and prompts: gates alone route."""

    name = "icr-uniform-alpha"
    kind = _uniform("alpha", 3, is_trained=True)


class UniformGates(Refit):
    """All gates at 1/2, where those of an untrained router are: alpha alone routes."""

    name = "icr-uniform-gates"
    kind = _uniform("gamma", 2, is_trained=False)
