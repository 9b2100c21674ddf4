"""The description: all there is to know about a router but its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from pydantic import NonNegativeInt, PositiveInt

from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.routing.features import Features
from icrouting.routing.sources import Source, sources_of
from icrouting.runtime.showing import in_short
from icrouting.tasks.task import Task, rows_digest, template_digest


@dataclass(frozen=True)
class Origin:
    """The router that a fit went on from.

    Attributes:
        weights: digits that identify it.
        taken: few-shot prompts and queries that each of its tasks had given, at most.
        rehearsed: rows of its tasks that were trained on again, by task.
    """

    weights: str
    taken: dict[str, tuple[NonNegativeInt, NonNegativeInt]]
    rehearsed: dict[str, PositiveInt]


@dataclass(frozen=True)
class Description:
    """All there is to know about an artifact but its weights.

    Attributes:
        base_model: name or path of the model that it was fitted on.
        model_type: what transformers calls its family.
        fingerprint: identifies its weights.
        n_layers: its layers.
        n_heads: its query heads.
        n_kv_heads: its key-value heads.
        head_dim: the width of a head.
        layers: the routed ones, from 0.
        encoder: the digest of the sentence encoder's weights, or "hidden" for the model's own
            states.
        n_features: width of what the router reads.
        tasks: training rows of each source task.
        sources: what is known of each source task; None where an earlier version fitted it.
        rows: identifies the source tasks' rows.
        fit: the settings of the fit.
        versions: of the packages that it was fitted with.
        base_weights: what the model's weights are like, by name (`decoder.identity`); empty in
            routers of earlier versions.
        origin: the router that it went on from; None where it began anew.
        chat_template: digits that identify the chat template that its sources' chats were worded
            by; None where there were none, and in routers of earlier versions.
    """

    base_model: str
    model_type: str
    fingerprint: str
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    head_dim: PositiveInt
    layers: tuple[int, ...]
    encoder: str
    n_features: PositiveInt
    tasks: dict[str, int]
    sources: tuple[Source, ...] | None
    rows: str
    fit: FitConfig
    versions: dict[str, str]
    base_weights: dict[str, str]
    origin: Origin | None = None
    chat_template: str | None = None

    def __repr__(self) -> str:
        tasks = ", ".join(self.tasks)
        return f"Description({self.base_model!r}, fitted on {in_short(tasks)}, {self.fit!r})"

    def n_taken(self, task: str) -> tuple[int, int]:
        """Returns the numbers of few-shot prompts and queries that a source task gave, at most.

        It gives no more prompts than it has training rows, nor more queries than these and its
        validation rows; one that came beside those of another router gives no prompts, as the
        directions are the other's.
        """
        for source in self.sources or ():
            if source.name == task:
                return source.n_prompts, source.n_queries
        n_rows = self.tasks[task]
        if self.origin is not None:
            return self.origin.taken.get(task, (0, min(self.fit.n_queries, n_rows)))
        return min(self.fit.n_prompts, n_rows), min(self.fit.n_queries, n_rows)

    @property
    def n_judged(self) -> int:
        """How many validation rows chose the router; 0 where it is the last one of its training."""
        before = self.origin.taken if self.origin is not None else {}
        return sum(source.n_judged for source in self.sources or () if source.name not in before)


def describe(
    decoder: Decoder,
    tasks: Sequence[Task],
    fit: FitConfig,
    layers: tuple[int, ...],
    features: Features,
    n_learned: Mapping[str, int] | None = None,
    n_judged: Mapping[str, int] | None = None,
) -> Description:
    """Returns the description of a router fitted on a decoder.

    Args:
        decoder: the decoder.
        tasks: the source tasks.
        fit: the settings.
        layers: the routed layers.
        features: what the router reads.
        n_learned: rows that it was trained on, by task; None for training rows alone.
        n_judged: validation rows that chose it, by task; None for none.
    """
    model = decoder.model
    return Description(
        base_model=model.config.name_or_path or type(model).__name__,
        model_type=decoder.stack.config.model_type,
        fingerprint=decoder.fingerprint,
        **vars(decoder.dims),
        layers=layers,
        encoder=features.fingerprint,
        n_features=features.n_features,
        tasks={task.name: len(task.train) for task in tasks},
        sources=sources_of(tasks, fit, n_learned, n_judged),
        rows=rows_digest(tasks),
        fit=fit,
        versions={name: version(name) for name in ("icrouting", "torch", "transformers")},
        base_weights=decoder.base_weights,
        chat_template=template_digest(tasks),
    )
