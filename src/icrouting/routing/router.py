"""The router: features of the query -> use of each direction by each layer and head (section 3).

    alpha(x) = tanh(g_alpha(E(x)))       routing vector, [n_layers, rank]
    gamma(x) = sigmoid(g_gamma(E(x)))    head gates, [n_layers, n_heads]

g_alpha and g_gamma are two-layer perceptrons. The last layer of g_alpha starts at zero, so an
untrained router leaves the model unchanged.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from icrouting.decoder.families import device_of
from icrouting.routing.pids import PIDs
from icrouting.runtime.equality import are_equal

# What of a routing is spread evenly, as a control.
Spread = Literal["alpha", "gates"]


def check_spread(value: object) -> None:
    """ValueError for what cannot be spread; None spreads nothing."""
    if value not in (None, *get_args(Spread)):
        raise ValueError(f"spread must be 'alpha', 'gates' or None, got {value!r}")


@dataclass(frozen=True, eq=False)
class Routing:
    """What a router decided for a batch of queries.

    `routing_vector` is the paper's alpha, in [-1, 1], `head_gates` its gamma, in [0, 1].
    """

    routing_vector: Float[Tensor, "batch n_layers rank"]
    head_gates: Float[Tensor, "batch n_layers n_heads"]

    def __repr__(self) -> str:
        n_queries, n_layers, rank = self.routing_vector.shape
        shape = f"{n_layers} layers, rank {rank}, {self.head_gates.shape[2]} heads"
        return f"Routing(queries: {n_queries}, {shape})"

    def __eq__(self, other: object) -> bool:
        return are_equal(self, other)

    def scaled(self, strength: float | Tensor) -> "Routing":
        """The same routing with alpha multiplied by `strength`."""
        return Routing(self.routing_vector * strength, self.head_gates)

    def spread(self, what: Spread) -> "Routing":
        """The same routing with its magnitude spread evenly (the paper's uniform ablations).

        In each layer of each query every direction gets the mean |alpha| of all, or every head the
        mean gate of all. The paper does not define the magnitude: this is that of its sparsity
        terms, |.|_1, so alpha loses its signs.
        """
        if what == "alpha":
            mean_alpha = self.routing_vector.abs().mean(-1, keepdim=True)
            return Routing(mean_alpha.expand_as(self.routing_vector), self.head_gates)
        mean_gate = self.head_gates.mean(-1, keepdim=True)
        return Routing(self.routing_vector, mean_gate.expand_as(self.head_gates))

    def repeated(self, n_rows: int) -> "Routing":
        """The same routing for rows that are a multiple of the queries.

        Those of a query stand side by side (beams, samples).
        """
        n_queries = len(self.routing_vector)
        n_rows_each, n_over = divmod(n_rows, n_queries)
        if n_over:
            raise ValueError(
                f"the routing is for {n_queries} queries: expected a multiple of rows, got {n_rows}"
            )
        if n_rows_each == 1:
            return self
        return Routing(
            self.routing_vector.repeat_interleave(n_rows_each, 0),
            self.head_gates.repeat_interleave(n_rows_each, 0),
        )


class Router(nn.Module):
    """Two perceptrons on a query's features.

    Args:
        n_features: width of E(x); 384 for MiniLM.
        n_layers: routed layers.
        n_heads: query heads of each.
        rank: directions of each.
        hidden_width: width of the perceptrons' hidden layers; the paper is silent (256 gives 0.24 M
            parameters on the default model).
        rng: draws the weights; None where they are to be loaded.
    """

    def __init__(
        self,
        n_features: int,
        n_layers: int,
        n_heads: int,
        rank: int,
        hidden_width: int,
        rng: Generator | None = None,
    ):
        super().__init__()
        self.n_layers = n_layers
        self.alpha = _perceptron(n_features, hidden_width, n_layers * rank)
        self.gamma = _perceptron(n_features, hidden_width, n_layers * n_heads)
        if rng is None:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                # As torch draws linear layers, but from a generator of one's own.
                nn.init.uniform_(module.weight, -bound, bound, generator=rng)
                nn.init.zeros_(module.bias)
        # The model is left unchanged at first.
        nn.init.zeros_(self.alpha[-1].weight)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def absorb(self, mean: Float[Tensor, "n_features"], std: Float[Tensor, "n_features"]) -> None:
        """Makes a router that was trained on (features - mean) / std read the features as they are.

        W (x - mean) / std + b is a layer of weights W / std and bias b - (W / std) mean.
        """
        for perceptron in (self.alpha, self.gamma):
            first = perceptron[0]
            # The controls of one number for all, "icr-uniform-...", have no layer that reads
            # features.
            if isinstance(first, nn.Linear):
                first.weight.div_(std.to(first.weight))
                first.bias.sub_(first.weight @ mean.to(first.weight))

    @torch.no_grad()
    def release(self, mean: Float[Tensor, "n_features"], std: Float[Tensor, "n_features"]) -> None:
        """Undoes `absorb`: makes a router of features as they are read (features - mean) / std."""
        for perceptron in (self.alpha, self.gamma):
            first = perceptron[0]
            if isinstance(first, nn.Linear):
                first.bias.add_(first.weight @ mean.to(first.weight))
                first.weight.mul_(std.to(first.weight))

    def adopt(self, pids: PIDs) -> PIDs:
        """Returns the directions to route along: the PIDs.

        The control "icr-learned-directions" has a router of its own, which trains them along with
        itself.
        """
        return pids

    def learn_directions(self, pids: PIDs) -> PIDs:
        """Returns the directions as parameters of this router, which start where they are."""
        device = device_of(self)
        # Clones, since training moves them in place, and other trainings start from these too.
        self.query_pids = nn.Parameter(pids.query_pids.detach().clone().to(device))
        self.key_pids = nn.Parameter(pids.key_pids.detach().clone().to(device))
        return replace(pids, query_pids=self.query_pids, key_pids=self.key_pids)

    def leave_directions(self, pids: PIDs) -> PIDs:
        """Returns learned directions as they are by now, no longer this router's."""
        query_pids = self.query_pids.detach().cpu()
        key_pids = self.key_pids.detach().cpu()
        del self.query_pids, self.key_pids
        return replace(pids, query_pids=query_pids, key_pids=key_pids)

    def forward(self, features: Float[Tensor, "batch n_features"]) -> Routing:
        """Returns the routing of a batch of queries, in float32."""
        alpha = torch.tanh(self.alpha(features)).unflatten(-1, (self.n_layers, -1))
        gamma = torch.sigmoid(self.gamma(features)).unflatten(-1, (self.n_layers, -1))
        return Routing(alpha, gamma)


def _perceptron(n_in: int, hidden_width: int, n_out: int) -> nn.Sequential:
    # Whatever torch's default is: the weights are trained and kept in float32.
    first = nn.Linear(n_in, hidden_width, dtype=torch.float32)
    last = nn.Linear(hidden_width, n_out, dtype=torch.float32)
    return nn.Sequential(first, nn.GELU(), last)
