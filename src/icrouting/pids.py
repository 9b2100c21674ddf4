"""PIDs: principal in-context-learning directions of queries and keys (paper, section 2).

    C_q[l] = cov(q[l]) over all prompts of all source tasks;   U_q[l] = top-`rank` eigenvectors of C_q[l]

and the same for keys. `QKMoments` streams (memory does not grow with the number of prompts) and merges;
`PIDs` is what comes out: small, frozen, with orthonormal columns and fixed signs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.config import Basis


@dataclass
class _Moments:
    """Count, mean and centred scatter of vectors, per layer, in float64 (Chan et al.'s merge rule)."""

    count: int
    mean: Float[Tensor, "n_layers width"]
    scatter: Float[Tensor, "n_layers width width"]

    @classmethod
    def zeros(cls, n_layers: int, width: int) -> "_Moments":
        mean = torch.zeros(n_layers, width, dtype=torch.float64)
        return cls(0, mean, torch.zeros(n_layers, width, width, dtype=torch.float64))

    @classmethod
    def of(cls, vectors: Float[Tensor, "n_layers batch width"]) -> "_Moments":
        vectors = vectors.double()
        mean = vectors.mean(1)
        centred = vectors - mean[:, None]
        return cls(vectors.shape[1], mean, centred.mT @ centred)

    def add(self, other: "_Moments") -> None:
        total = self.count + other.count
        shift = other.mean - self.mean
        weight = self.count * other.count / total
        self.scatter += other.scatter + weight * shift[:, :, None] * shift[:, None, :]
        self.mean += shift * (other.count / total)
        self.count = total


class QKMoments:
    """Streaming second moments of last-token queries (n_heads * head_dim wide) and keys, per routed layer."""

    def __init__(self, n_layers: int, query_width: int, key_width: int):
        self.query = _Moments.zeros(n_layers, query_width)
        self.key = _Moments.zeros(n_layers, key_width)

    @property
    def count(self) -> int:
        """Number of prompts seen."""
        return self.query.count

    def update(
        self,
        query: Float[Tensor, "n_layers batch query_width"],
        key: Float[Tensor, "n_layers batch key_width"],
    ) -> None:
        """Adds the last-token queries and keys of a batch of prompts."""
        if not (torch.isfinite(query).all() and torch.isfinite(key).all()):
            raise ValueError("captured queries or keys hold NaN or infinity: load the model in float32 or bfloat16")
        self.query.add(_Moments.of(query))
        self.key.add(_Moments.of(key))

    def merge(self, other: "QKMoments") -> None:
        """Adds what another accumulator has seen."""
        if other.count:
            self.query.add(other.query)
            self.key.add(other.key)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by name, to be saved."""
        state = {"count": torch.tensor(self.count)}
        for side, moments in (("query", self.query), ("key", self.key)):
            state |= {f"{side}_mean": moments.mean, f"{side}_scatter": moments.scatter}
        return state

    @classmethod
    def from_tensors(cls, state: dict[str, Tensor]) -> "QKMoments":
        """The accumulator that `tensors` came from."""
        moments = cls(0, 0, 0)
        count = int(state["count"])
        moments.query = _Moments(count, state["query_mean"], state["query_scatter"])
        moments.key = _Moments(count, state["key_mean"], state["key_scatter"])
        return moments


@dataclass(frozen=True)
class PIDs:
    """Directions of queries and keys, one pair of bases per routed layer.

    Attributes:
        layers: the routed layers.
        query_pids: orthonormal columns, [n_layers, n_heads * head_dim, rank].
        key_pids: orthonormal columns, [n_layers, n_kv_heads * head_dim, rank].
        query_std: standard deviation of queries along each direction, [n_layers, rank].
        key_std: the same of keys, [n_layers, rank].
        query_explained: share of the queries' variance along each direction, [n_layers, rank].
        key_explained: the same of keys, [n_layers, rank].
        basis: "pca" (the paper's), "whitened" (each PID divided by its standard deviation where it is
            used; Differs: lets the learning rate be ten times higher) or "random" (an orthonormal control).
    """

    layers: tuple[int, ...]
    query_pids: Float[Tensor, "n_layers query_width rank"]
    key_pids: Float[Tensor, "n_layers key_width rank"]
    query_std: Float[Tensor, "n_layers rank"]
    key_std: Float[Tensor, "n_layers rank"]
    query_explained: Float[Tensor, "n_layers rank"]
    key_explained: Float[Tensor, "n_layers rank"]
    basis: Basis

    @property
    def rank(self) -> int:
        """Number of directions per layer."""
        return self.query_pids.shape[-1]

    def query_directions(self) -> Float[Tensor, "n_layers query_width rank"]:
        """What queries are projected on: the PIDs, scaled as the basis says."""
        return self.query_pids / self.query_std[:, None] if self.basis == "whitened" else self.query_pids

    def key_directions(self) -> Float[Tensor, "n_layers key_width rank"]:
        """What keys are projected on: the PIDs, scaled as the basis says."""
        return self.key_pids / self.key_std[:, None] if self.basis == "whitened" else self.key_pids


def fit_pids(moments: QKMoments, layers: tuple[int, ...], rank: int, basis: Basis, generator: torch.Generator) -> PIDs:
    """Returns the PIDs of accumulated moments.

    `layers` are in the order of the moments; the generator draws the random basis.
    """
    widest = moments.key.mean.shape[-1]
    if not 1 <= rank <= widest:
        raise ValueError(f"rank must lie in 1..{widest} (the width of the keys), got {rank}")
    if moments.count <= rank:
        raise ValueError(f"{rank} directions need more than {rank} prompts, got {moments.count}: add prompts or tasks")
    query_pids, query_std, query_explained = _directions(moments.query, rank, basis, generator)
    key_pids, key_std, key_explained = _directions(moments.key, rank, basis, generator)
    return PIDs(layers, query_pids, key_pids, query_std, key_std, query_explained, key_explained, basis)


def _directions(
    moments: _Moments, rank: int, basis: Basis, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    covariance = moments.scatter / (moments.count - 1)
    if basis == "random":
        gaussian = torch.randn(*covariance.shape[:2], rank, dtype=torch.float64, generator=generator)
        columns = torch.linalg.qr(gaussian).Q
    else:
        columns = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[..., :rank]
    # The largest entry of every column is positive, so that equal subspaces give equal files.
    largest = columns.abs().argmax(1, keepdim=True)
    columns = columns * columns.gather(1, largest).sign()
    variance = torch.einsum("lwr,lwv,lvr->lr", columns, covariance, columns).clamp_min(0)
    total = covariance.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    floor = torch.finfo(torch.float32).eps * total.sqrt()
    # Contiguous, as a loaded file's are: kernels may round by the layout.
    return columns.float().contiguous(), torch.maximum(variance.sqrt(), floor).float(), (variance / total).float()
