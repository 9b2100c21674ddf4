"""The settings of a fit, and the paper's own."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from icrouting.runtime.checks import check
from icrouting.runtime.showing import changed

Basis = Literal["pca", "whitened", "random", "gaussian", "learned"]
# Which queries' rows of a routed layer's attention get the bias.
BiasRows = Literal["all", "last"]
ExtractFrom = Literal["few-shot", "zero-shot", "shuffled"]
# In place of a sentence encoder: the backbone's own hidden state entering the first routed layer.
HIDDEN = "hidden"
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
DemoSelection = Literal["balanced", "random", "nearest"]
# Which tokens of a prompt give the queries and keys that directions are extracted from.
Pooling = Literal["last", "last-4", "last-8", "rollout"]


def check_bias_rows(value: object) -> None:
    """ValueError for rows that cannot be chosen."""
    if value not in get_args(BiasRows):
        raise ValueError(f"bias_rows must be 'all' or 'last', got {value!r}")


@dataclass(frozen=True)
class FitConfig:
    """Settings of the three stages; units in brackets.

    The paper's values stand where nothing is said. What differs was chosen on validation slices of
    the source tasks' train data, see `benchmarks/LOG.md`; `PAPER` holds the paper's own.

    Attributes:
        layers: routed layers; None routes the last third.
        rank: PIDs per layer.
        basis: the directions: "pca" (paper), these "whitened", or "learned" beside the router, from
            where PCA has them; or drawn, "random" ones made orthonormal (paper, ablation) or
            "gaussian" ones as they are drawn, of length 1 on average.
        n_prompts: few-shot extraction prompts per source task.
        demos_per_class: demonstrations per class in them.
        queries_per_context: prompts that share their demonstrations, which are then computed once.
        demo_selection: which rows demonstrations are: "balanced" over the classes (paper), or as
            many drawn at "random" from all, or the "nearest" to the query by the sentence encoder,
            the nearest last (the paper's ablation).
        extract_from: which prompts the directions are extracted from: "few-shot" ones (paper), the
            same queries as "zero-shot" prompts, or few-shot ones whose demonstrations have their
            answers "shuffled" among themselves (controls).
        pooling: what extraction takes of a prompt: the queries and keys of its "last" token
            (paper), their mean over the "last-4" or "last-8", or over all of its tokens, weighted
            by attention "rollout" (the paper's ablations).
        encoder: what the router reads of a prompt: a sentence encoder (hub id, folder or
            "pinned:minilm"), or "hidden", the backbone's own hidden state entering the first routed
            layer, which needs no second model. Behind "constant:" or "random:" it gives its width
            alone, to features that say nothing (controls).
        bias_rows: which rows of attention logits get the bias: "all" of them (equation 10), or from
            the "last" prompt row on, so that row and those that are generated (an appendix of the
            paper may be read so).
        hidden_width: width of the router's hidden layers.
        n_queries: training queries per source task.
        max_tokens: longer zero-shot prompts lose their beginning [tokens].
        ce_scope: cross-entropy over the "vocabulary" (paper) or over the task's "options".
        w_conf: weight of the confidence term.
        w_spar: weight of the sparsity of the routing vector.
        w_gate: weight of the sparsity of the head gates.
        deepest_weight: the sparsity weight of the deepest layer.
        final_alpha_scale: the routing vector's scale falls from 1 to this by a cosine over
            training.
        lr: learning rate of AdamW.
        batch_size: queries per step.
        epochs: passes over the queries.
        min_steps: steps at least, where the passes take fewer [steps].
        patience: where `min_steps` acts, training stops once the loss on validation rows has not
            fallen for so many looks, and the best router is kept; where these rows are fewer than
            ten, cross-validation chooses the steps. 0 keeps the last router.
        grad_clip: largest norm of the gradient.
        skip_nan: leave prompts out whose queries, keys or logits are not finite, instead of
            stopping at the first.
        seed: seeds every draw.

    Raises:
        ValueError: a value does not fit; the first such field is named.

    Examples:
        >>> from icrouting import PAPER, FitConfig
        >>> FitConfig(rank=4).n_prompts
        100
        >>> PAPER.n_prompts
        5000
    """

    layers: tuple[int, ...] | None = None
    rank: PositiveInt = 8
    basis: Basis = "pca"
    n_prompts: PositiveInt = 100
    demos_per_class: PositiveInt = 5
    queries_per_context: PositiveInt = 1
    demo_selection: DemoSelection = "balanced"
    extract_from: ExtractFrom = "few-shot"
    pooling: Pooling = "last"
    encoder: str = DEFAULT_ENCODER
    bias_rows: BiasRows = "all"
    hidden_width: PositiveInt = 256
    n_queries: PositiveInt = 1000
    max_tokens: PositiveInt = 512
    ce_scope: Literal["vocabulary", "options"] = "options"
    w_conf: float = 0.01
    w_spar: float = 1e-3
    w_gate: float = 0.02
    deepest_weight: float = 3.0
    final_alpha_scale: float = 0.8
    lr: PositiveFloat = 1e-4
    batch_size: PositiveInt = 8
    epochs: PositiveInt = 2
    min_steps: NonNegativeInt = 300
    patience: NonNegativeInt = 5
    grad_clip: PositiveFloat = 1.0
    skip_nan: bool = False
    seed: int = 42

    def __post_init__(self):
        check(self)
        self._check_demos()

    def _check_demos(self) -> None:
        """ValueError where the choice of demonstrations does not go with another setting."""
        if self.demo_selection != "balanced" and self.extract_from == "zero-shot":
            raise ValueError(
                f'zero-shot prompts have no demonstrations: leave demo_selection at "balanced", '
                f"got {self.demo_selection!r}"
            )
        if self.demo_selection == "nearest" and self.queries_per_context > 1:
            raise ValueError(
                "the nearest demonstrations are each query's own: leave queries_per_context at 1, "
                f"got {self.queries_per_context}"
            )
        if self.demo_selection == "nearest" and self.encoder.split(":")[-1] == HIDDEN:
            raise ValueError(
                "the nearest demonstrations are found by a sentence encoder: set encoder to one, "
                f"got {self.encoder!r}"
            )

    def __repr__(self) -> str:
        return changed(self)

    @property
    def shown_per_class(self) -> int:
        """How many demonstrations of a class an extraction prompt shows, at most."""
        return 0 if self.extract_from == "zero-shot" else self.demos_per_class

    def variants(self) -> list[str]:
        """Returns a phrase for each ablation of the paper's method that these settings ask for."""
        phrases = []
        if self.basis == "learned":
            phrases.append("directions trained with the router")
        if self.basis == "gaussian":
            phrases.append("Gaussian directions")
        if self.demo_selection == "random":
            phrases.append("demonstrations drawn at random")
        if self.demo_selection == "nearest":
            phrases.append("demonstrations nearest to their query")
        if self.extract_from == "zero-shot":
            phrases.append("directions of zero-shot prompts")
        if self.extract_from == "shuffled":
            phrases.append("directions of prompts with shuffled answers")
        if self.pooling == "rollout":
            phrases.append("directions of all tokens, by attention rollout")
        elif self.pooling != "last":
            n_tokens = self.pooling.removeprefix("last-")
            phrases.append(f"directions of the mean of the last {n_tokens} tokens")
        if self.bias_rows == "last":
            phrases.append("bias from the last prompt row on")
        return phrases

    def n_steps(self, n_queries: int) -> int:
        """Returns how many steps a training on so many queries takes, unless it stops before."""
        return max(self.min_steps, self.n_steps_of_passes(n_queries))

    def watches(self, n_queries: int) -> bool:
        """Returns whether `patience` acts: on rows so few that `min_steps` does.

        A training of two passes over many rows has no time to fit them too well.
        """
        return self.patience > 0 and self.n_steps(n_queries) > self.n_steps_of_passes(n_queries)

    def n_steps_of_passes(self, n_queries: int) -> int:
        """Returns how many steps the passes over so many queries take."""
        return self.epochs * math.ceil(n_queries / self.batch_size)

    def n_passes(self, n_queries: int) -> float:
        """Returns how often such a training reads each query, on average."""
        steps_per_epoch = max(1, math.ceil(n_queries / self.batch_size))
        return self.n_steps(n_queries) / steps_per_epoch


# What fits did before these settings were there; files of earlier versions do without them.
EARLIER = {
    "min_steps": 0,
    "patience": 0,
    "demo_selection": "balanced",
    "extract_from": "few-shot",
    "pooling": "last",
    "bias_rows": "all",
}

# The paper's own settings (sections 2 to 4), but for AG News, of which it takes 10,000 prompts.
PAPER = FitConfig(
    basis="pca",
    n_prompts=5000,
    n_queries=5000,
    ce_scope="vocabulary",
    lr=1e-4,
    batch_size=4,
    epochs=2,
    min_steps=0,
    patience=0,
)
