"""Sites: the submodules that give a decoder's queries and keys, and how to read what they give."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from icrouting.decoder.guards import Hook, of_this_thread


@dataclass(frozen=True)
class Dims:
    """Sizes of a decoder."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int


Reader = Callable[[Tensor, Dims], Float[Tensor, "batch q_len width"]]


def flat(output: Tensor, dims: Dims) -> Tensor:
    """Reads [batch, q_len, heads * head_dim]."""
    return output


def token_major(output: Tensor, dims: Dims) -> Tensor:
    """Reads [batch, q_len, heads, head_dim]."""
    return output.flatten(2)


def head_major(output: Tensor, dims: Dims) -> Tensor:
    """Reads [batch, heads, q_len, head_dim]."""
    return output.transpose(1, 2).flatten(2)


def fused_query(output: Tensor, dims: Dims) -> Tensor:
    """Reads the first part of [all queries, all keys, all values]."""
    return output[..., : dims.n_heads * dims.head_dim]


def fused_key(output: Tensor, dims: Dims) -> Tensor:
    """Reads the second part of [all queries, all keys, all values]."""
    start = dims.n_heads * dims.head_dim
    return output[..., start : start + dims.n_kv_heads * dims.head_dim]


def interleaved(part: int) -> Reader:
    """Reads part 0 (query) or 1 (key) of heads that are [query, key, value] one by one."""

    def read(output: Tensor, dims: Dims) -> Tensor:
        by_head = output.unflatten(-1, (dims.n_heads, 3, dims.head_dim))
        return by_head[..., part, :].flatten(2)

    return read


@dataclass(frozen=True)
class Site:
    """A submodule of the attention, and how its output reads as queries or keys.

    `read` gives [batch, q_len, heads * head_dim].
    """

    module: str
    read: Reader = flat


@dataclass(frozen=True)
class Family:
    """Where a family keeps its layers, its attention, its queries and its keys.

    `attention_branch` (None: the attention) and `mlp_branch` are the submodules of a layer whose
    outputs are added to the residual stream: the attention and the MLP, or the norms behind them.
    `output` is the submodule of the attention that mixes what its heads give, [batch, q_len,
    n_heads * head_dim], into one state.
    """

    query: Site = Site("q_proj")
    key: Site = Site("k_proj")
    layers: str = "layers"
    attention: str = "self_attn"
    attention_branch: str | None = None
    mlp_branch: str = "mlp"
    output: str = "o_proj"

    def __str__(self) -> str:
        place = f"{self.layers}.*.{self.attention}"
        # Both are one submodule in families that compute queries and keys together.
        names = dict.fromkeys((self.query.module, self.key.module))
        return " and ".join(f"{place}.{name}" for name in names)


# Takes "query" or "key", and the states, [batch, q_len, heads * head_dim].
KeepStates = Callable[[str, Tensor], None]


@contextmanager
def watching(attention: nn.Module, family: Family, dims: Dims, keep: KeepStates) -> Iterator[None]:
    """Inside, a forward hands what the sites give to `keep`."""

    def hand_on(name: str, site: Site, module: nn.Module, args: tuple, output: Tensor) -> None:
        keep(name, site.read(output, dims))

    with ExitStack() as hooks:
        for name, site in sites_of(family):
            module = getattr(attention, site.module)
            hook = Hook(partial(hand_on, name, site))
            hooks.enter_context(module.register_forward_hook(hook))
        yield


@contextmanager
def watched(attention: nn.Module, family: Family, dims: Dims) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward of this thread leaves the sites' outputs under "query" and "key".

    They are [batch, q_len, heads * head_dim].
    """
    outputs: dict[str, Tensor] = {}
    with watching(attention, family, dims, of_this_thread(outputs.__setitem__)):
        yield outputs


def sites_of(family: Family) -> tuple[tuple[str, Site], tuple[str, Site]]:
    """Returns a family's sites by "query" and "key"."""
    return ("query", family.query), ("key", family.key)
