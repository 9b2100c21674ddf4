"""Controls of ICR: a router fitted anew with one thing changed.

What a control loses to `icr-refit`, that thing gives.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from icrouting.config import DEFAULT_ENCODER, EARLIER, Basis, FitConfig
from icrouting.fitting import stages
from icrouting.icr import InContextRouter
from icrouting.methods.base import Context, Method
from icrouting.methods.icr import most_labelled
from icrouting.methods.settings import Settings
from icrouting.routing.features import Features, features_of
from icrouting.routing.pids import PIDs
from icrouting.routing.reader import Reader
from icrouting.routing.rerouting import rerouted
from icrouting.routing.router import Router
from icrouting.runtime.defaults import usual_defaults
from icrouting.runtime.processes import alone
from icrouting.runtime.showing import in_full
from icrouting.tasks.task import Task


class Refit(Method):
    """ICR itself with nothing changed, fitted on the very task or on the sources.

    So are its controls. The configuration is that of `Settings.router`, its seed included; without
    one, the defaults, with `Settings.train_rows` queries per task. Nothing is chosen on validation
    rows.

    Attributes:
        kind: the kind of router that is trained.
        basis: the directions to route along; None takes the configuration's.
        blind: what stands before the encoder's name where features say less than it does.
        layers: the routed ones, [n_layers].
        query_directions: [n_layers, width, rank], whitened where the basis is.
        key_directions: likewise.
        weights: the router's parameters in their order, as one vector.
    """

    name = "icr-refit"
    follows_checkpointing = True
    # The seed is the configuration's, as it is of the router that a control is held against.
    draws = False
    learned = ("layers", "query_directions", "key_directions", "weights")
    cached = ("query_directions", "key_directions")
    kind: type[Router] = Router
    basis: Basis | None = None
    blind = ""
    layers: Tensor
    query_directions: Tensor
    key_directions: Tensor
    weights: Tensor

    def __init__(self, settings: Settings):
        super().__init__(settings)
        config = _config(settings)
        # All that a control does not change is as the router's.
        self.config = replace(
            config, basis=self.basis or config.basis, encoder=self.blind + config.encoder
        )

    def learn(self, rng: np.random.Generator) -> None:
        """Fits directions and router."""
        # Other processes may be learning another task: this one must not wait for them.
        with alone():
            pids, router, _ = stages.fit(self.decoder, self.sources, self.config, kind=self.kind)
        self.layers = torch.tensor(pids.layers)
        self.query_directions = pids.query_directions().detach().cpu()
        self.key_directions = pids.key_directions().detach().cpu()
        # Directions that a router trained along with itself are kept above, with all others'.
        weights = []
        for name, parameter in router.named_parameters():
            if not name.endswith("_pids"):
                weights.append(parameter.cpu())
        self.weights = parameters_to_vector(weights)
        self.n_trained = sum(parameter.numel() for parameter in router.parameters())
        # What a fit trains by its own settings is no part of the router any more.
        if self.config.basis == "learned":
            self.n_trained += pids.query_pids.numel() + pids.key_pids.numel()
        self.n_labelled = most_labelled(self.sources, self.config)

    @usual_defaults()
    def applied(self, task: Task) -> Context:
        """Routes the model by each prompt."""
        layers = tuple(self.layers.tolist())
        rank = self.query_directions.shape[-1]
        features = self._features()
        router = self.kind(
            features.n_features,
            len(layers),
            self.decoder.dims.n_heads,
            rank,
            self.config.hidden_width,
        )
        router.requires_grad_(False)
        # In the order in which `learn` strung them together.
        vector_to_parameters(self.weights, router.parameters())
        router.to(self.decoder.device)
        # Where the basis is whitened, so are the directions already: as "pca" they are taken as
        # they stand, and the moments beside them are not looked at.
        one = torch.ones(len(layers), rank)
        pids = PIDs(layers, self.query_directions, self.key_directions, one, one, one, one, "pca")
        scale = self.config.final_alpha_scale
        reader = Reader(self.decoder, features, router, layers[0], scale)
        return rerouted(reader, pids, self.config.bias_rows)

    def depends_on(self) -> str:
        """Returns the configuration and the fingerprint of what the router reads.

        The configuration may be a router's, so the settings do not tell it.
        """
        config = in_full(self.config)
        # Controls of earlier versions were learned without these settings, and without their names.
        for name, value in EARLIER.items():
            config = config.replace(f"{name}={value!r}, ", "")
        return f"{config}, {self._features().fingerprint}"

    def _features(self) -> Features:
        return features_of(self.config.encoder, self.decoder, "cpu")


def _config(settings: Settings) -> FitConfig:
    """Returns the configuration of the settings' router, or the defaults within their budget."""
    if settings.router is not None:
        return InContextRouter.from_pretrained(settings.router).description.fit
    encoder = settings.encoder or DEFAULT_ENCODER
    config = FitConfig(demos_per_class=settings.demos_per_class, encoder=encoder)
    # PCA needs more prompts than it gives directions.
    n_prompts = max(config.rank + 1, min(config.n_prompts, settings.train_rows))
    return replace(config, n_prompts=n_prompts, n_queries=settings.train_rows)


class RandomBasis(Refit):
    """Random orthonormal directions instead of principal ones (paper, ablations).

    They are never whitened.
    """

    name = "icr-random-basis"
    basis = "random"


class _TrainedDirections(Router):
    """A router that trains the directions along with itself."""

    def adopt(self, pids: PIDs) -> PIDs:
        """Returns the directions as parameters of the router, which start at the PIDs."""
        return self.learn_directions(pids)


class LearnedDirections(RandomBasis):
    """Directions trained together with the router.

    They start as random ones and are free to be no longer orthonormal.
    """

    name = "icr-learned-directions"
    kind = _TrainedDirections


class ConstantFeatures(Refit):
    """A router that reads the same of every prompt, so that it routes all of them alike."""

    name = "icr-constant"
    blind = "constant:"


class RandomFeatures(Refit):
    """A router that reads a fixed random vector per prompt.

    It can tell prompts apart, and knows nothing about them.
    """

    name = "icr-random-features"
    blind = "random:"


class _Same(nn.Module):
    """In a perceptron's place: one number for all prompts and outputs, 0 at first.

    It is a sum, as Adam moves a parameter no faster than its rate; a sum of no terms stays 0.
    """

    def __init__(self, n_out: int, n_terms: int):
        super().__init__()
        self.n_out = n_out
        self.terms = nn.Parameter(torch.zeros(n_terms))

    def forward(self, features: Tensor) -> Tensor:
        """Returns the number, [batch, n_out]."""
        return self.terms.sum().expand(len(features), self.n_out)


class _UniformAlpha(Router):
    """A router whose alpha is one trained number."""

    def __init__(
        self,
        n_features: int,
        n_layers: int,
        n_heads: int,
        rank: int,
        hidden_width: int,
        rng: Generator | None = None,
    ):
        super().__init__(n_features, n_layers, n_heads, rank, hidden_width, rng)
        # A term for each hidden unit of the perceptron, so that it can move about as fast.
        self.alpha = nn.Sequential(_Same(n_layers * rank, n_terms=hidden_width))


class _UniformGates(Router):
    """A router whose gates are all those of an untrained one, and stay so."""

    def __init__(
        self,
        n_features: int,
        n_layers: int,
        n_heads: int,
        rank: int,
        hidden_width: int,
        rng: Generator | None = None,
    ):
        super().__init__(n_features, n_layers, n_heads, rank, hidden_width, rng)
        # Nothing to train, and the sigmoid of 0 is 1/2.
        self.gamma = nn.Sequential(_Same(n_layers * n_heads, n_terms=0))


class UniformAlpha(Refit):
    """One alpha, trained (paper silent), for all directions, layers and prompts.

    So the gates alone route.
    """

    name = "icr-uniform-alpha"
    kind = _UniformAlpha


class UniformGates(Refit):
    """All gates at 1/2, where those of an untrained router are: alpha alone routes."""

    name = "icr-uniform-gates"
    kind = _UniformGates
