"""The figures of a fit that has not begun: parameters, bytes, FLOP and seconds.

    moments   8 * n_routed * (query_width^2 + query_width + key_width^2 + key_width)       bytes
    trunk     query tokens * hidden_size * itemsize                                        bytes
    pass      2 * n_matrix * tokens + 4 * n_layers * query_width * sum of squared lengths  FLOP
    training  2 * passes, of the folds' trainings too, * the routed layers' pass           FLOP

The moments are as large for any n_prompts; the trunk lies on disk; training's backward pass goes
to activations alone. n_matrix counts the weights without embeddings and vocabulary head.
docs/scaling.md holds this against measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.families import dims_of, stack_of
from icrouting.fitting.capture import TOKEN_BUDGET
from icrouting.fitting.folds import n_read
from icrouting.fitting.lengths import Texts

# Seconds of one core: to add a prompt to a number of the moments.
SECONDS_PER_PRODUCT = 0.065e-9
# Seconds of one core: to decompose a covariance, per width^3.
SECONDS_PER_CUBE = 1.2e-9
MINILM_WIDTH = 384
# Bytes of a number.
FLOAT32 = 4
FLOAT64 = 8


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        n_parameters: number of all weights.
        n_matrix: number of weights without embeddings and vocabulary head.
        n_layers: number of layers.
        n_heads: number of heads of a layer.
        query_width: n_heads * head_dim.
        key_width: n_kv_heads * head_dim.
        hidden_size: width of the residual stream.
        vocab_size: number of tokens in the vocabulary.
    """

    n_parameters: int
    n_matrix: int
    n_layers: int
    n_heads: int
    query_width: int
    key_width: int
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sizes":
        """Returns the sizes of a model, which may be on the meta device."""
        dims = dims_of(model)
        stack = stack_of(model)
        # An embedding is looked up: it multiplies nothing.
        embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = {*stack.parameters()} - embeddings
        return cls(
            n_parameters=sum(weight.numel() for weight in model.parameters()),
            n_matrix=sum(weight.numel() for weight in matrices),
            n_layers=dims.n_layers,
            n_heads=dims.n_heads,
            query_width=dims.n_heads * dims.head_dim,
            key_width=dims.n_kv_heads * dims.head_dim,
            hidden_size=int(stack.config.hidden_size),
            vocab_size=int(stack.config.vocab_size),
        )

    @property
    def outputs_per_token(self) -> int:
        """Numbers that the matrices of one layer give for a token."""
        return self.n_matrix // self.n_layers // self.hidden_size


def pass_flops(sizes: Sizes, texts: Sequence[Texts], n_layers: int) -> float:
    """Returns the FLOP of texts' pass through `n_layers` layers, without the head."""
    n_tokens = sum(each.tokens for each in texts)
    n_squares = sum(each.squares for each in texts)
    matrices = 2.0 * sizes.n_matrix / sizes.n_layers * n_tokens
    attention = 4.0 * sizes.query_width * n_squares
    return n_layers * (matrices + attention)


@dataclass(frozen=True)
class Reckoning:
    """What a fit takes, figure by figure; those of batches are rough.

    Attributes:
        sizes: the model's.
        layers: the routed ones.
        prompts: few-shot prompts, by task.
        queries: zero-shot queries, by task.
        config: settings of the fit.
        itemsize: bytes of a weight.
        n_judged: validation rows that choose the router; without any, cross-validation may.
    """

    sizes: Sizes
    layers: tuple[int, ...]
    prompts: Sequence[Texts]
    queries: Sequence[Texts]
    config: FitConfig
    itemsize: int
    n_judged: int = 0

    @property
    def n_routed(self) -> int:
        """Number of routed layers."""
        return len(self.layers)

    @property
    def n_late(self) -> int:
        """Number of layers that training runs: from the first routed one on."""
        return self.sizes.n_layers - self.layers[0]

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in a token's queries and in its keys."""
        return self.sizes.query_width, self.sizes.key_width

    @property
    def n_queries(self) -> int:
        """Number of queries of all tasks."""
        return sum(texts.count for texts in self.queries)

    @property
    def n_router(self) -> int:
        """Parameters of the router, two perceptrons on the same features."""
        n_features = self.sizes.hidden_size if self.config.encoder == HIDDEN else MINILM_WIDTH
        n_outputs = self.n_routed * (self.config.rank + self.sizes.n_heads)
        hidden_width = self.config.hidden_width
        return hidden_width * (2 * n_features + 2 + n_outputs) + n_outputs

    @property
    def weights_bytes(self) -> int:
        """Bytes of the model."""
        return self.sizes.n_parameters * self.itemsize

    @property
    def moments_bytes(self) -> int:
        """Bytes of the moments, in memory and on disk."""
        per_layer = sum(width**2 + width for width in self.widths)
        return FLOAT64 * self.n_routed * per_layer

    @property
    def extraction_batch_bytes(self) -> int:
        """Bytes of the largest batch of prompts in passing."""
        # A prompt longer than the budget runs alone.
        padded = [max(1, TOKEN_BUDGET // texts.longest) * texts.longest for texts in self.prompts]
        n_tokens = min(max(padded), sum(texts.tokens for texts in self.prompts))
        # A pass makes about three times as many numbers as the matrices give.
        in_passing = 3 * self.sizes.outputs_per_token
        captured = self.n_routed * sum(self.widths)
        return n_tokens * (in_passing + captured) * self.itemsize

    @property
    def pca_bytes(self) -> int:
        """Bytes of the PCA of one layer: its covariance and three matrices of that size."""
        return 4 * FLOAT64 * self.sizes.query_width**2

    @property
    def training_batch_bytes(self) -> int:
        """Bytes of what the backward pass of a batch keeps: twice what the matrices give."""
        longest = max(texts.longest for texts in self.queries)
        n_tokens = self.config.batch_size * longest
        return 2 * n_tokens * self.n_late * self.sizes.outputs_per_token * self.itemsize

    @property
    def trunk_bytes(self) -> int:
        """Bytes of the file of states that enter the first routed layer."""
        n_tokens = sum(texts.tokens for texts in self.queries)
        return self.sizes.hidden_size * n_tokens * self.itemsize

    @property
    def artifact_bytes(self) -> int:
        """Bytes of the saved router and its PIDs."""
        # Each direction comes with a standard deviation and a share of the variance.
        n_pids = self.n_routed * self.config.rank * (sum(self.widths) + 4)
        return FLOAT32 * (self.n_router + n_pids)

    @property
    def head_flops(self) -> int:
        """FLOP of the vocabulary head on the queries, one token each."""
        return 2 * self.sizes.vocab_size * self.sizes.hidden_size * self.n_queries

    @property
    def extraction_flops(self) -> float:
        """FLOP of the few-shot prompts, whose head does not run."""
        return pass_flops(self.sizes, self.prompts, self.sizes.n_layers)

    @property
    def trunk_flops(self) -> float:
        """FLOP of the plain pass of the queries."""
        return pass_flops(self.sizes, self.queries, self.sizes.n_layers) + self.head_flops

    @property
    def training_flops(self) -> float:
        """FLOP of training; a pass back to activations alone takes as much as one forth."""
        one_way = pass_flops(self.sizes, self.queries, self.n_late) + self.head_flops
        n_passes = n_read(self.n_queries, self.n_judged, self.config) / self.n_queries
        return 2 * n_passes * one_way

    @property
    def processor_seconds(self) -> float:
        """Seconds of one core for moments and PCA."""
        n_prompts = sum(texts.count for texts in self.prompts)
        n_products = self.moments_bytes / FLOAT64 * n_prompts
        cubes = self.n_routed * sum(width**3 for width in self.widths)
        return n_products * SECONDS_PER_PRODUCT + cubes * SECONDS_PER_CUBE
