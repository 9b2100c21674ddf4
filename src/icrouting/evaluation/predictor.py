"""Predictor: a model's answers to methods' prompts; what has been read is not read again."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from icrouting.decoder.batches import finite_rows, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.passes import KeptContext
from icrouting.decoder.scoring import have_finite_scores, score
from icrouting.evaluation.records import Record
from icrouting.methods import Method
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import LabelScoring, Task


@dataclass(frozen=True)
class _PlainScores:
    """What the untouched model said of some prompts, and the seconds per prompt that it took."""

    prompts: list[Prompt]
    options: list[tuple[str, ...]]
    label_scoring: LabelScoring
    scores: Tensor
    seconds: float


class Predictor:
    """A model that answers test items by one method after the other."""

    def __init__(self, decoder: Decoder, *, skip_nan: bool = False):
        self.decoder = decoder
        self.skip_nan = skip_nan
        # By method: the task that it answered last, and the contexts that were read for it.
        self._kept_contexts: dict[str, tuple[str, dict[str, KeptContext]]] = {}
        self._plain: _PlainScores | None = None

    def forget(self, method: Method) -> None:
        """Drops the contexts that were read under what a method had learned before."""
        self._kept_contexts.pop(method.name, None)

    def predict(
        self, method: Method, task: Task, indices: Sequence[int], seed: int
    ) -> list[Record]:
        """Returns the records of one method on some test items of one task.

        With `skip_nan`, items whose scores are not finite have none.

        Raises:
            ValueError: the method does not fit the task, or a score is not finite.
        """
        method = method.on(task)
        examples = [task.test[index] for index in indices]
        prompts = [method.prompt(task, example) for example in examples]
        options = [task.options(example) for example in examples]
        token_lists = tokenize(self.decoder.tokenizer, [prompt.text for prompt in prompts])
        # A method's own work after the model's counts as its time too.
        plain_scores, seconds = self._scores(method, task, prompts, options)
        started = time.monotonic()
        scores = method.adjusted(task, examples, plain_scores)
        seconds += (time.monotonic() - started) / len(prompts)
        if len(scores) != len(prompts):
            raise ValueError(
                f"{method.name} gives scores of {len(scores)} prompts, of {len(prompts)} that were "
                "asked: let `adjusted` return a row for each"
            )
        texts = [prompt.text for prompt in prompts]
        is_finite = have_finite_scores(scores, plain_scores, options)
        predictions = scores.argmax(1).tolist()
        answers = []
        for place in finite_rows(is_finite, texts, "option scores", self.skip_nan):
            n_options = len(options[place])  # further scores pad the row to the others' length
            answer = Record(
                method=method.name,
                task=task.name,
                seed=seed,
                index=indices[place],
                label=examples[place].label,
                prediction=predictions[place],
                option_logits=tuple(scores[place, :n_options].tolist()),
                n_tokens=len(token_lists[place]),
                seconds=seconds,
            )
            answers.append(answer)
        return answers

    def _scores(
        self, method: Method, task: Task, prompts: list[Prompt], options: list[tuple[str, ...]]
    ) -> tuple[Tensor, float]:
        """Returns option scores and seconds per prompt.

        The untouched model reads equal prompts only once.
        """
        label_scoring = task.spec.label_scoring
        asked = (prompts, options, label_scoring)
        plain = self._plain
        if (
            not method.edits_model
            and plain
            and (plain.prompts, plain.options, plain.label_scoring) == asked
        ):
            return plain.scores, plain.seconds
        contexts = self._contexts(method, task, prompts[0].context)
        with method.applied(task):  # entered once for many prompts, so not in their time
            started = time.monotonic()
            scores = score(
                self.decoder,
                prompts,
                options,
                label_scoring=label_scoring,
                kept=contexts,
                finite_only=False,
            )
            seconds = (time.monotonic() - started) / len(prompts)
        if not method.edits_model:
            self._plain = _PlainScores(*asked, scores, seconds)
        return scores, seconds

    def _contexts(self, method: Method, task: Task, context: str) -> dict[str, KeptContext]:
        """The contexts read for a method so far, or none where they do not serve the next prompts.

        A context that was read under one task's edits says nothing of another's.
        """
        task_before, contexts = self._kept_contexts.get(method.name, ("", {}))
        is_stale = method.edits_model and task_before != task.name
        if context not in contexts or is_stale:
            contexts = {}  # rather than one more: the contexts of a large model are large
        self._kept_contexts[method.name] = task.name, contexts
        return contexts
