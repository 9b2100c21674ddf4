"""PIDs: principal in-context-learning directions of queries and keys (paper, section 2).

    C_q[l] = cov(q[l]) over all prompts of all source tasks
    U_q[l] = top-`rank` eigenvectors of C_q[l]

and the same for keys. `QKMoments` streams (memory does not grow with the number of prompts) and
merges; `PIDs` is what comes out: small, frozen, with orthonormal columns and fixed signs.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from icrouting.config import Basis
from icrouting.runtime.equality import are_equal
from icrouting.runtime.showing import ranges


@dataclass(frozen=True, eq=False)
class PIDs:
    """Directions of queries and keys, one pair of bases per routed layer.

    Their columns are orthonormal, but where the basis says otherwise.

    Attributes:
        layers: the routed layers.
        query_pids: directions of queries, over all heads.
        key_pids: directions of keys.
        query_std: standard deviations of queries along each direction.
        key_std: those of keys.
        query_explained: share of the queries' variance along each direction.
        key_explained: that of the keys'.
        basis: "pca" (the paper's), "whitened" (each PID divided by its standard deviation where it
            is used; Differs: lets the learning rate be ten times higher), "random" (an orthonormal
            control), "gaussian" (its columns before they were made orthonormal, divided by the root
            of their width) or "learned" (trained beside the router, orthonormal no more; deviations
            and shares are those of the PCA that it began from).
    """

    layers: tuple[int, ...]
    query_pids: Float[Tensor, "n_layers query_width rank"]
    key_pids: Float[Tensor, "n_layers key_width rank"]
    query_std: Float[Tensor, "n_layers rank"]
    key_std: Float[Tensor, "n_layers rank"]
    query_explained: Float[Tensor, "n_layers rank"]
    key_explained: Float[Tensor, "n_layers rank"]
    basis: Basis

    def __repr__(self) -> str:
        widths = f"{self.query_pids.shape[1]} query, {self.key_pids.shape[1]} key numbers"
        rank = self.query_pids.shape[2]
        return f"PIDs({self.basis!r}, layers {ranges(self.layers)}, rank {rank}, {widths})"

    def __eq__(self, other: object) -> bool:
        return are_equal(self, other)

    @property
    def rank(self) -> int:
        """Number of directions per layer."""
        return self.query_pids.shape[-1]

    def query_directions(self) -> Float[Tensor, "n_layers query_width rank"]:
        """What queries are projected on: the PIDs, scaled as the basis says."""
        if self.basis == "whitened":
            return self.query_pids / self.query_std[:, None]
        return self.query_pids

    def key_directions(self) -> Float[Tensor, "n_layers key_width rank"]:
        """What keys are projected on: the PIDs, scaled as the basis says."""
        if self.basis == "whitened":
            return self.key_pids / self.key_std[:, None]
        return self.key_pids


def late_third(n_layers: int) -> tuple[int, ...]:
    """The layers the paper routes by default: the last third (section 3)."""
    return tuple(range(n_layers // 3 * 2, n_layers))


def check_layers(layers: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """Returns `layers`; ValueError unless they are ascending indices into `n_layers` layers."""
    # Each layer once: a place among the routed layers stands for a layer everywhere else.
    is_ascending = list(layers) == sorted(set(layers))
    if not layers or not is_ascending or layers[0] < 0 or layers[-1] >= n_layers:
        raise ValueError(
            f"routed layers must be ascending indices below {n_layers}, one or more; "
            f"got {list(layers)}"
        )
    return layers
