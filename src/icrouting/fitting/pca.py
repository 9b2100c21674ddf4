"""PCA: streaming moments of queries and keys, and the directions in them (section 2)."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from icrouting.config import Basis
from icrouting.routing.pids import PIDs

Side = Literal["query", "key"]

# Share of vectors' mean square: a variance below it is one that rounding explains.
SAME = 1e-9


class QKMoments:
    """Streaming second moments of last-token queries and keys, per routed layer.

    Count, sums and sums of outer products, so that streams merge by adding. They are kept in
    float64, where means of a thousand standard deviations still leave nine digits of a covariance.
    """

    def __init__(self, n_layers: int, query_width: int, key_width: int):
        """Starts at nothing seen.

        Args:
            n_layers: number of routed layers.
            query_width: n_heads * head_dim.
            key_width: n_kv_heads * head_dim.
        """
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
        self._add("query", query.double())
        self._add("key", key.double())

    def _add(self, side: Side, vectors: Float[Tensor, "n_layers batch width"]) -> None:
        self._state[f"{side}_sum"] += vectors.sum(1)
        # In place: a product apart takes as much memory again.
        self._state[f"{side}_outer"].baddbmm_(vectors.mT, vectors)

    def merge(self, other: "QKMoments") -> None:
        """Adds what another accumulator has seen."""
        self._state = {name: value + other._state[name] for name, value in self._state.items()}

    def mean(self, side: Side) -> Float[Tensor, "n_layers width"]:
        """Returns the mean of the queries or of the keys seen so far."""
        return self._state[f"{side}_sum"] / self.count

    def mean_square(self, side: Side) -> Float[Tensor, "n_layers"]:
        """Returns the mean squared norm of the queries or of the keys seen so far."""
        outer = self._state[f"{side}_outer"]
        return outer.diagonal(dim1=1, dim2=2).sum(1) / self.count

    def covariance(self, side: Side) -> Float[Tensor, "n_layers width width"]:
        """Returns the covariance of the queries or of the keys seen so far."""
        vector_sum = self._state[f"{side}_sum"]
        outer_of_sums = vector_sum[:, :, None] * vector_sum[:, None, :]
        scatter = self._state[f"{side}_outer"] - outer_of_sums / self.count
        return scatter / (self.count - 1)

    def of_layer(self, place: int) -> "QKMoments":
        """The moments of the layer at a place among the routed ones; not a copy."""
        return self._of(slice(place, place + 1))

    def of_layers(self, places: Sequence[int]) -> "QKMoments":
        """The moments of the layers at some places among the routed ones."""
        return self._of(list(places))

    def _of(self, places: slice | list[int]) -> "QKMoments":
        layer_state = {"count": self._state["count"]}
        for name, value in self._state.items():
            if name != "count":
                layer_state[name] = value[places]
        return self.from_tensors(layer_state)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by name, to be saved."""
        return self._state

    @classmethod
    def from_tensors(cls, state: dict[str, Tensor]) -> "QKMoments":
        """The accumulator that `tensors` came from; ValueError if it was another version's."""
        moments = cls(0, 0, 0)
        odd_names = sorted(state.keys() ^ moments._state.keys())
        if odd_names:
            raise ValueError(
                f"moments of another version ({odd_names}): delete moments.safetensors, "
                "and they are made anew"
            )
        moments._state = dict(state)
        return moments


def fit_pids(
    moments: QKMoments, layers: tuple[int, ...], rank: int, basis: Basis, generator: torch.Generator
) -> PIDs:
    """Returns the PIDs of accumulated moments (stage 2).

    Args:
        moments: what was seen of queries and keys.
        layers: the routed layers, in the order of the moments.
        rank: directions per layer.
        basis: how they are chosen, see `FitConfig`.
        generator: draws the random and the Gaussian basis, which span the same.

    Raises:
        ValueError: too few prompts or too narrow keys for `rank`, or a layer that tells no prompts
            apart.
    """
    key_width = moments.tensors()["key_sum"].shape[-1]
    if not 1 <= rank <= key_width:
        raise ValueError(f"rank must lie in 1..{key_width} (the width of the keys), got {rank}")
    if moments.count <= rank:
        raise ValueError(
            f"{rank} directions need more than {rank} prompts, got {moments.count}: "
            "add prompts or tasks"
        )
    query_pids, query_std, query_explained = _directions(moments, "query", rank, basis, generator)
    key_pids, key_std, key_explained = _directions(moments, "key", rank, basis, generator)
    return PIDs(
        layers=layers,
        query_pids=query_pids,
        key_pids=key_pids,
        query_std=query_std,
        key_std=key_std,
        query_explained=query_explained,
        key_explained=key_explained,
        basis=basis,
    )


def _directions(
    moments: QKMoments, side: Side, rank: int, basis: Basis, generator: torch.Generator
) -> list[Tensor]:
    """Returns what `_described` does, of all layers."""
    _check_varied(moments, side)
    n_layers, width = moments.tensors()[f"{side}_sum"].shape
    gaussian = None
    if basis in ("random", "gaussian"):
        gaussian = torch.randn(n_layers, width, rank, dtype=torch.float64, generator=generator)
    # Layer by layer, since decomposing takes several times a covariance's memory.
    layers = []
    for place in range(n_layers):
        covariance = moments.of_layer(place).covariance(side)
        if basis == "gaussian" and gaussian is not None:
            columns = gaussian[place : place + 1] / width**0.5
        elif gaussian is not None:
            columns = torch.linalg.qr(gaussian[place : place + 1]).Q
        else:
            # `eigh` gives eigenvalues in ascending order.
            columns = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[..., :rank]
        layers.append(_described(columns, covariance))
    return [torch.cat(parts) for parts in zip(*layers, strict=True)]


def _check_varied(moments: QKMoments, side: Side) -> None:
    """ValueError if a layer's vectors are the same in all prompts, as layer 0's may be."""
    mean_square = moments.mean_square(side)
    variance = mean_square - moments.mean(side).square().sum(1)
    # Not the opposite comparison: a variance that is not a number is refused too.
    if not (variance > SAME * mean_square).all():
        raise ValueError(
            "a routed layer has the same queries or keys in all prompts: "
            "route from a later layer on"
        )


def _described(
    columns: Float[Tensor, "1 width rank"], covariance: Float[Tensor, "1 width width"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns directions, standard deviations along them and shares of the variance."""
    # The largest entry of every column is positive, so that equal subspaces give equal files.
    largest = columns.gather(1, columns.abs().argmax(1, keepdim=True))
    columns = columns * largest.sign()
    variance = torch.einsum("lwr,lwv,lvr->lr", columns, covariance, columns).clamp_min(0)
    total_variance = covariance.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    # Whitening divides by the deviation, which rounding may have left at zero.
    floor = torch.finfo(torch.float32).eps * total_variance.sqrt()
    std = torch.maximum(variance.sqrt(), floor)
    explained = variance / total_variance
    # Contiguous, as a loaded file's are: kernels may round by the layout.
    return columns.float().contiguous(), std.float(), explained.float()
