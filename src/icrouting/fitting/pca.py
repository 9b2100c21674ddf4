"""PCA: streaming moments of queries and keys, and the directions found in them (section 2)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.config import Basis
from icrouting.routing.pids import PIDs

SAME = 1e-9  # of vectors' mean square: a variance that rounding explains


class QKMoments:
    """Streaming second moments of last-token queries (n_heads * head_dim wide) and keys, per routed layer.

    Count, sums and sums of outer products, so that streams merge by adding. They are kept in float64, where means
    of a thousand standard deviations still leave nine digits of a covariance.
    """

    def __init__(self, n_layers: int, query_width: int, key_width: int):
        self._state = {"count": torch.tensor(0)}
        for side, width in (("query", query_width), ("key", key_width)):
            self._state[f"{side}_sum"] = torch.zeros(n_layers, width, dtype=torch.float64)
            self._state[f"{side}_outer"] = torch.zeros(n_layers, width, width, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of prompts seen."""
        return int(self._state["count"])

    def update(
        self,
        query: Float[Tensor, "n_layers batch query_width"],
        key: Float[Tensor, "n_layers batch key_width"],
    ) -> None:
        """Adds the last-token queries and keys of a batch of prompts."""
        self._state["count"] += query.shape[1]
        for side, vectors in (("query", query.double()), ("key", key.double())):
            self._state[f"{side}_sum"] += vectors.sum(1)
            self._state[f"{side}_outer"].baddbmm_(
                vectors.mT, vectors
            )  # in place: a product apart takes as much again

    def merge(self, other: "QKMoments") -> None:
        """Adds what another accumulator has seen."""
        self._state = {name: value + other._state[name] for name, value in self._state.items()}

    def covariance(self, side: Literal["query", "key"]) -> Float[Tensor, "n_layers width width"]:
        """Returns the covariance of the queries or of the keys seen so far."""
        total = self._state[f"{side}_sum"]
        scatter = self._state[f"{side}_outer"] - total[:, :, None] * total[:, None, :] / self.count
        return scatter / (self.count - 1)

    def of_layer(self, place: int) -> "QKMoments":
        """The moments of one layer, which is alone; not a copy."""
        state = {
            name: value[place : place + 1] if value.ndim else value
            for name, value in self._state.items()
        }
        return self.from_tensors(state)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by name, to be saved."""
        return self._state

    @classmethod
    def from_tensors(cls, state: dict[str, Tensor]) -> "QKMoments":
        """The accumulator that `tensors` came from."""
        moments = cls(0, 0, 0)
        if odd := sorted(state.keys() ^ moments._state.keys()):
            raise ValueError(
                f"moments of another version ({odd}): delete moments.safetensors, and they are made anew"
            )
        moments._state = dict(state)
        return moments


def fit_pids(
    moments: QKMoments, layers: tuple[int, ...], rank: int, basis: Basis, generator: torch.Generator
) -> PIDs:
    """Returns the PIDs of accumulated moments.

    `layers` are in the order of the moments; the generator draws the random basis.
    """
    widest = moments.tensors()["key_sum"].shape[-1]
    if not 1 <= rank <= widest:
        raise ValueError(f"rank must lie in 1..{widest} (the width of the keys), got {rank}")
    if moments.count <= rank:
        raise ValueError(
            f"{rank} directions need more than {rank} prompts, got {moments.count}: add prompts or tasks"
        )
    query_pids, query_std, query_explained = _directions(moments, "query", rank, basis, generator)
    key_pids, key_std, key_explained = _directions(moments, "key", rank, basis, generator)
    return PIDs(
        layers, query_pids, key_pids, query_std, key_std, query_explained, key_explained, basis
    )


def _directions(
    moments: QKMoments,
    side: Literal["query", "key"],
    rank: int,
    basis: Basis,
    generator: torch.Generator,
) -> list[Tensor]:
    outer, total = (moments.tensors()[f"{side}_{part}"] for part in ("outer", "sum"))
    (n_layers, width), size = total.shape, outer.diagonal(dim1=1, dim2=2).sum(1) / moments.count
    if not (
        size - (total / moments.count).square().sum(1) > SAME * size
    ).all():  # as all last tokens are in layer 0
        raise ValueError(
            "a routed layer has the same queries or keys in all prompts: route from a later layer on"
        )
    gaussian = None
    if basis == "random":
        gaussian = torch.randn(n_layers, width, rank, dtype=torch.float64, generator=generator)
    # Layer by layer, since decomposing takes several times a covariance's memory.
    layers = []
    for place in range(n_layers):
        covariance = moments.of_layer(place).covariance(side)
        if gaussian is None:
            columns = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[..., :rank]
        else:
            columns = torch.linalg.qr(gaussian[place : place + 1]).Q
        layers.append(_described(columns, covariance))
    return [torch.cat(tensors) for tensors in zip(*layers, strict=True)]


def _described(columns: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns with their signs fixed, the standard deviation along each and its share of the variance."""
    # The largest entry of every column is positive, so that equal subspaces give equal files.
    columns = columns * columns.gather(1, columns.abs().argmax(1, keepdim=True)).sign()
    variance = torch.einsum("lwr,lwv,lvr->lr", columns, covariance, columns).clamp_min(0)
    total = covariance.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    floor = torch.finfo(torch.float32).eps * total.sqrt()
    # Contiguous, as a loaded file's are: kernels may round by the layout.
    return (
        columns.float().contiguous(),
        torch.maximum(variance.sqrt(), floor).float(),
        (variance / total).float(),
    )
