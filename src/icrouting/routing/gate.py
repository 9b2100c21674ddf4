"""The gate: which prompts are like those that a router learned from, and so are routed.

A prompt is as new as the state of its last token, where it enters the first routed layer, is far
from those of a source task's prompts, in Mahalanobis distance (Lee et al. 2018). No label is read,
and nothing is run beside what routing runs. Not in the paper.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Bool, Float, Int
from pydantic import PositiveInt
from torch import Tensor

# Rows of a source that a gate keeps, at most.
N_KNOWN = 200
# With fewer, neither the covariance nor the limit says much.
FEWEST_ROWS = 26
SHUT_OUT = 0.01
SHRINKAGE = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The states of one task's rows, as a mean and a covariance S that is never written out.

        S = a C^T C + b I,    a = (1 - SHRINKAGE) / n,    b = SHRINKAGE * the mean of C^2

    S is hidden_size squared, where the rows are a few hundred. By Woodbury's identity

        b S^-1 = I - a C^T M^-1 C,    M = a C C^T + b I

    so that a matrix of n by n is all that is inverted.

    Attributes:
        mean: of the states.
        centred: C, the states less their mean.
        ball: b.
        inverse: of M.
    """

    mean: Float[Tensor, "hidden_size"]
    centred: Float[Tensor, "n hidden_size"]
    ball: Float[Tensor, ""]
    inverse: Float[Tensor, "n n"]

    @classmethod
    def of(cls, states: Float[Tensor, "n hidden_size"]) -> "Gaussian":
        """Returns what states are described by."""
        # The inverse loses digits that float32 does not have to spare.
        states = states.double()
        mean = states.mean(0)
        centred = states - mean
        ball = SHRINKAGE * centred.square().mean()
        gram = (1 - SHRINKAGE) / len(states) * centred @ centred.T
        inverse = torch.linalg.inv(gram + ball * torch.eye(len(states)))
        return cls(mean, centred, ball, inverse)

    def distances(self, states: Float[Tensor, "n_states hidden_size"]) -> Float[Tensor, "n_states"]:
        """Returns squared Mahalanobis distances to the mean."""
        gaps = states.double() - self.mean
        along = gaps @ self.centred.T
        share = (1 - SHRINKAGE) / len(self.centred)
        inside = share * ((along @ self.inverse) * along).sum(1)
        return (gaps.square().sum(1) - inside) / self.ball


# A gate is asked for every prompt that runs, and the inverses stay the same until the next fit.
@lru_cache(maxsize=1)
def gaussians(known: Tensor, owners: Int[Tensor, "n_known"]) -> list[Gaussian]:
    """Returns what each task's states are described by, [n_known, hidden_size] in all."""
    return [Gaussian.of(known[owners == owner]) for owner in owners.unique()]


def distances_left_out(states: Float[Tensor, "n hidden_size"]) -> Float[Tensor, "n"]:
    r"""Returns each state's squared distance to the Gaussian of all the others.

    With c a row of C, k = n / (n - 1), and a and b those of the other n - 1 rows,

        d = k^2 q / (1 - a k q),    q = c^T (a C^T C + b I)^-1 c

    by Sherman and Morrison, as leaving a row out takes k c c^T from C^T C and moves the mean so
    that the row is k c from it. One eigendecomposition of C C^T serves all rows.

    Args:
        states: those of three rows or more.
    """
    states = states.double()
    n_rows, width = states.shape
    centred = states - states.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(centred @ centred.T)
    # Rounding leaves the smallest of them below 0.
    eigenvalues = eigenvalues.clamp_min(0)
    scatter = centred.square().sum()
    grown = n_rows / (n_rows - 1)
    share = (1 - SHRINKAGE) / (n_rows - 1)
    scatter_of_others = scatter - grown * centred.square().sum(1)
    ball = SHRINKAGE * scatter_of_others / ((n_rows - 1) * width)
    weights = eigenvalues / (share * eigenvalues + ball[:, None])
    q = (vectors.square() * weights).sum(1)
    return grown**2 * q / (1 - share * grown * q)


def limit_of(distances: Float[Tensor, "n"]) -> float:
    """Returns the distance that a further row exceeds with a chance of SHUT_OUT, at least.

    It is the conformal one: of n rows and a new one, each is as likely to be the farthest. Below
    99 rows no distance has so small a chance; then it is the largest, with a chance of 1/(n + 1).
    """
    n_rows = len(distances)
    place = min(n_rows, math.ceil((n_rows + 1) * (1 - SHUT_OUT)))
    return float(distances.sort().values[place - 1])


@dataclass(frozen=True)
class GateNumbers:
    """What config.json says of a gate.

    Attributes:
        rows: how many states each source has, in the order of the sources.
        limits: the largest squared distance from each source of a prompt that is routed.
        hidden_size: the width of a state.
    """

    rows: tuple[PositiveInt, ...]
    limits: tuple[float, ...]
    hidden_size: PositiveInt


@dataclass(frozen=True, eq=False)
class PromptGate:
    """Says which prompts are routed: those no farther from a source than its own rows are.

    Each source has a limit of its own, from the distance of each of its rows to the others.

    Attributes:
        states: rows' last states, one source behind the other, in float32.
        numbers: whose they are, and the limits.
    """

    states: Float[Tensor, "n_known hidden_size"]
    numbers: GateNumbers

    @classmethod
    def of(cls, states_by_source: Sequence[Float[Tensor, "_ hidden_size"]]) -> "PromptGate":
        """Returns the gate of some sources.

        Args:
            states_by_source: the states of each source's rows, of which the first N_KNOWN count.
        """
        kept = [states[:N_KNOWN].float() for states in states_by_source]
        limits = [limit_of(distances_left_out(states)) for states in kept]
        rows = tuple(len(states) for states in kept)
        numbers = GateNumbers(rows, tuple(limits), kept[0].shape[1])
        return cls(torch.cat(kept), numbers)

    @classmethod
    def joined(cls, gates: Sequence["PromptGate"]) -> "PromptGate":
        """Returns the gate of the sources of several gates, in their order."""
        rows = [n_rows for gate in gates for n_rows in gate.numbers.rows]
        limits = [limit for gate in gates for limit in gate.numbers.limits]
        states = torch.cat([gate.states for gate in gates])
        return cls(states, GateNumbers(tuple(rows), tuple(limits), states.shape[1]))

    def split(self) -> list["PromptGate"]:
        """Returns a gate of each source alone."""
        numbers = self.numbers
        gates = []
        states_by_source = self.states.split(list(numbers.rows))
        for states, limit in zip(states_by_source, numbers.limits, strict=True):
            alone = GateNumbers((len(states),), (limit,), numbers.hidden_size)
            gates.append(PromptGate(states, alone))
        return gates

    @cached_property
    def digest(self) -> str:
        """16 hex digits that identify what it knows, and its limits."""
        content = hashlib.sha256(repr(self.numbers).encode())
        content.update(self.states.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    @cached_property
    def _gaussians(self) -> list[Gaussian]:
        return [Gaussian.of(states) for states in self.states.split(list(self.numbers.rows))]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PromptGate):
            return NotImplemented
        return self.numbers == other.numbers and torch.equal(self.states, other.states)

    def __hash__(self) -> int:
        return hash(self.numbers)

    def __repr__(self) -> str:
        return f"PromptGate(rows={self.numbers.rows}, hidden_size={self.numbers.hidden_size})"

    def __call__(self, hidden: Sequence[Tensor]) -> Bool[Tensor, "batch"]:
        """Returns whether prompts are routed.

        Args:
            hidden: a prompt's states where they enter the first routed layer,
                [q_len, hidden_size] each.
        """
        last_states = torch.stack([states[-1] for states in hidden]).cpu()
        is_known = torch.zeros(len(last_states), dtype=torch.bool)
        for gaussian, limit in zip(self._gaussians, self.numbers.limits, strict=True):
            is_known |= gaussian.distances(last_states) <= limit
        return is_known


class Decisions:
    """Notes, while somebody listens, which prompts a gate left alone."""

    def __init__(self):
        self._is_routed: dict[tuple[int, ...], bool] | None = None

    @contextmanager
    def noted(self) -> Iterator[dict[tuple[int, ...], bool]]:
        """Inside, fills the yielded dict: whether a prompt is routed, by its tokens."""
        self._is_routed = {}
        try:
            yield self._is_routed
        finally:
            self._is_routed = None

    def note(self, token_lists: Sequence[Sequence[int]], factors: Float[Tensor, "batch"]) -> None:
        """Takes down what a gate said of prompts."""
        if self._is_routed is None:
            return
        for tokens, factor in zip(token_lists, factors.tolist(), strict=True):
            self._is_routed[tuple(tokens)] = factor != 0
