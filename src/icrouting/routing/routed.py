"""A model while it is routed, and what can be asked of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.batches import tokenize
from icrouting.decoder.scoring import score
from icrouting.routing.effect import describe, run_both, warn_if_nothing
from icrouting.routing.reader import Reader
from icrouting.routing.router import Routing
from icrouting.tasks.task import Task


@dataclass(frozen=True)
class Routed:
    """An attached model; comes from `InContextRouter.attached`.

    `layers` are the routed ones; `strength` is the factor on the routing vector; `last` holds the tokens of the
    prompts that were routed or scored last.
    """

    reader: Reader
    layers: tuple[int, ...]
    strength: float
    last: list[list[int]]

    def score(
        self, prompts: Sequence[str], options: Sequence[str] | Sequence[Sequence[str]]
    ) -> Float[Tensor, "n_prompts n_options"]:
        """Returns each option's logit at the position after each prompt; options are for all prompts or a list each.

        Zero-shot prompts end right before the space and the answer ("Sentiment:").
        """
        scores = score(self.reader.decoder, prompts, options)
        self.last[:] = tokenize(self.reader.decoder.tokenizer, prompts)
        return scores

    def routing(self, prompts: Sequence[str]) -> Routing:
        """Returns what the router decides for prompts; no routed layer runs."""
        return self.reader.of_tokens(self.reader.decoder.tokenize(prompts))

    def effect(self, prompts: Sequence[str] | None = None) -> str:
        """Returns in one line of numbers what routing does to prompts; warns when that is numerically nothing.

        Each prompt is run twice, alone, on the `eager` kernel. None takes those that were routed or scored last; a
        plain call at strength 0 is not seen.
        """
        reader = self.reader
        found = self.last if prompts is None else reader.decoder.tokenize(prompts)
        token_lists = [
            list(tokens) for tokens in dict.fromkeys(map(tuple, found))
        ]  # beams repeat their prompt
        if not token_lists:
            raise ValueError(
                "nothing has been routed yet: give `effect` prompts, or call the model first"
            )
        passes = [run_both(reader.decoder.model, tokens, self.layers) for tokens in token_lists]
        self.last[:] = token_lists
        warn_if_nothing(passes)
        return describe(passes, reader.of_tokens(token_lists))


def routing_summary(
    routed: Routed, layers: Sequence[int], tasks: Sequence[Task], n_items: int = 50
) -> dict[str, Any]:
    """Returns what a router decides on each task: its mean head gates and mean |alpha|, for the report."""
    found = {}
    for task in tasks:
        routing = routed.routing([task.prompt(example) for example in task.test[:n_items]])
        found[task.name] = {
            "head_gates": routing.head_gates.mean(0).tolist(),
            "routing_vector_abs": routing.routing_vector.abs().mean(0).tolist(),
        }
    return {"layers": list(layers), "tasks": found}
