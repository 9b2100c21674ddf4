"""A model while it is routed, and what can be asked of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from icrouting.decoder.batches import tokenize
from icrouting.decoder.hold import Hold
from icrouting.decoder.scoring import score
from icrouting.decoder.texts import prompts_of
from icrouting.routing.effect import Passes, describe, run_both, warn_if_nothing
from icrouting.routing.predictions import LEFT_ALONE, ROUTED, Prediction, predicted
from icrouting.routing.reader import Reader
from icrouting.routing.router import Routing
from icrouting.routing.sources import Source
from icrouting.runtime.showing import ranges
from icrouting.tasks.chat import Messages
from icrouting.tasks.prompts import zero_shot
from icrouting.tasks.streams import rows_of
from icrouting.tasks.task import LabelScoring, Task, TaskSpec, spec_among


@dataclass(frozen=True)
class Routed:
    """An attached model; comes from `InContextRouter.attached`.

    Attributes:
        reader: reads the routing of prompts.
        layers: the routed ones.
        strength: factor on the routing vector.
        last: the tokens of the prompts that were routed or scored last.
        hold: the hold on the model; whatever is asked takes its turn, and is an error once the
            model is no longer attached.
        sources: the tasks that the router was fitted on, as far as it knows them.
    """

    reader: Reader
    layers: tuple[int, ...]
    strength: float
    last: list[list[int]]
    hold: Hold
    sources: tuple[Source, ...] = ()

    def __repr__(self) -> str:
        name = self.reader.decoder.model.config.name_or_path
        layers = ranges(self.layers)
        return f"Routed({name!r}, layers {layers}, strength {self.strength:g})"

    def score(
        self,
        prompts: Sequence[str | Messages],
        options: Sequence[str] | Sequence[Sequence[str]],
        *,
        label_scoring: LabelScoring = "first",
    ) -> Float[Tensor, "n_prompts n_options"]:
        """Returns each option's score behind each prompt, as `score_options` does.

        The tokens of an option are routed by its prompt, as those that are generated are.

        Args:
            prompts: zero-shot prompts, ending right before the space and the answer ("Sentiment:");
                or conversations, lists of {"role": "user", "content": "..."}, which the tokenizer's
                chat template renders, and which options answer without a space.
            options: the answers to choose from, for all prompts or a list each.
            label_scoring: "first" for the logit of an option's first token, "sum" or "mean" for the
                log-probabilities of all.
        """
        decoder = self.reader.decoder
        whole_prompts = prompts_of(prompts, decoder.tokenizer)
        with self.hold.turn():
            scores = score(decoder, whole_prompts, options, label_scoring=label_scoring)
            # Batches may have come in another order, and the last of them alone would be
            # remembered.
            self.last[:] = tokenize(decoder.tokenizer, [prompt.text for prompt in whole_prompts])
        return scores

    def predict(self, rows: Any, task: str | Task | TaskSpec | None = None) -> list[Prediction]:
        """Returns a prediction for each row, without a look at any label.

        A row that does not fit, or is too long for the model, says so in its status. A prompt that
        the gate does not know is answered by the base model, and its status is "left alone".

        Args:
            rows: a list of dicts, a data frame, a `datasets.Dataset` or the path of a file; further
                columns are of no account.
            task: how rows become prompts: the name of one of the tasks that the router was fitted
                on, which None takes where there is but one, or a task or its spec.

        Raises:
            ValueError: these are no rows, or the task is not known.
        """
        spec = spec_among(task, [source.spec for source in self.sources])
        reader = self.reader
        with self.hold.turn(), reader.decisions.noted() as is_routed:

            def status(token_lists: Sequence[Sequence[int]]) -> list[str]:
                # What no gate was asked about was routed.
                routed = [is_routed.get(tuple(tokens), True) for tokens in token_lists]
                return [ROUTED if each and self.strength else LEFT_ALONE for each in routed]

            return predicted(
                reader.decoder,
                Task(spec, (), ()).bound_to(reader.decoder.tokenizer),
                rows_of(rows, spec),
                prompt=zero_shot,
                adjusted=lambda task, examples, scores: scores,
                status=status,
            )

    def routing(self, prompts: Sequence[str | Messages]) -> Routing:
        """Returns what the router decides for prompts; no routed layer runs."""
        with self.hold.turn():
            return self.reader.of_tokens(self._tokens_of(prompts))

    def effect(self, prompts: Sequence[str | Messages] | None = None) -> str:
        """Returns in one line of numbers what routing does to prompts.

        Warns when that is numerically nothing. Each prompt is run twice, alone, on the `eager`
        kernel.

        Args:
            prompts: None takes those that were routed or scored last; a plain call at strength 0 is
                not seen.
        """
        with self.hold.turn(), self.reader.decisions.noted() as is_routed:
            passes, routing = self._compared(prompts)
        is_left_alone = bool(is_routed) and not any(is_routed.values())
        warn_if_nothing(passes, is_left_alone=is_left_alone)
        return describe(passes, routing)

    def _tokens_of(self, prompts: Sequence[str | Messages]) -> list[list[int]]:
        decoder = self.reader.decoder
        whole_prompts = prompts_of(prompts, decoder.tokenizer)
        return decoder.tokenize([prompt.text for prompt in whole_prompts])

    def _compared(self, prompts: Sequence[str | Messages] | None) -> tuple[list[Passes], Routing]:
        decoder = self.reader.decoder
        token_lists = self.last if prompts is None else self._tokens_of(prompts)
        # Beams repeat their prompt.
        distinct = [list(tokens) for tokens in dict.fromkeys(map(tuple, token_lists))]
        if not distinct:
            raise ValueError(
                "nothing has been routed yet: give `effect` prompts, or call the model first"
            )
        passes = [run_both(decoder.model, tokens, self.layers) for tokens in distinct]
        # Each of these passes was routed, too.
        self.last[:] = distinct
        return passes, self.reader.of_tokens(distinct)


def routing_summary(
    routed: Routed, layers: Sequence[int], tasks: Sequence[Task], n_items: int = 50
) -> dict[str, Any]:
    """Returns a router's mean head gates and mean |alpha| on each task, for the report."""
    decided: dict[str, dict[str, Any]] = {}
    for task in tasks:
        routing = routed.routing([task.prompt(example) for example in task.test[:n_items]])
        decided[task.name] = {
            "head_gates": routing.head_gates.mean(0).tolist(),
            "routing_vector_abs": routing.routing_vector.abs().mean(0).tolist(),
        }
    return {"layers": list(layers), "tasks": decided}
