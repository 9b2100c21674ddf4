"""A model while it is routed, and what can be asked of it."""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icrouting.config import BiasRows
from icrouting.decoder.batches import tokenize
from icrouting.decoder.hold import Hold
from icrouting.decoder.scoring import score
from icrouting.decoder.texts import listed, prompts_of
from icrouting.routing.calibration import (
    DEFAULT_WAY,
    BatchCalibration,
    Calibrating,
    mixture_of,
    scored_by,
)
from icrouting.routing.effect import Passes, describe, run_both, warn_if_nothing
from icrouting.routing.likeness import Likeness, UnlikePrompts
from icrouting.routing.predictions import (
    CALIBRATED,
    LEFT_ALONE,
    ROUTED,
    Asked,
    Prediction,
    predicted,
)
from icrouting.routing.priors import Way, fewest_prompts
from icrouting.routing.reader import Reader
from icrouting.routing.router import Routing
from icrouting.routing.shipped import TaskCalibration, known_specs, reading_of
from icrouting.routing.sources import Source
from icrouting.runtime.progress import track
from icrouting.runtime.showing import ranges
from icrouting.tasks.chat import Messages
from icrouting.tasks.prompts import zero_shot
from icrouting.tasks.streams import rows_of
from icrouting.tasks.task import LabelScoring, Task, TaskSpec, digest_of_template, spec_among

# Rows that are asked at once for a prior: a bar moves between them.
WINDOW = 64


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
        made_of: what gives the scores: the router, its strength and its gate.
        calibrations: the priors that came with the router, by which `predict` calibrates what the
            gate leaves alone.
        bias_rows: which rows of attention logits get the bias (`FitConfig.bias_rows`).
    """

    reader: Reader
    layers: tuple[int, ...]
    strength: float
    last: list[list[int]]
    hold: Hold
    sources: tuple[Source, ...] = ()
    made_of: str = ""
    calibrations: tuple[TaskCalibration, ...] = ()
    bias_rows: BiasRows = "all"

    def __repr__(self) -> str:
        name = self.reader.decoder.model.config.name_or_path
        layers = ranges(self.layers)
        spread = self.reader.spread
        ending = "" if spread is None else f", {spread} spread evenly"
        if self.bias_rows == "last":
            ending += ", bias from the last prompt row on"
        return f"Routed({name!r}, layers {layers}, strength {self.strength:g}{ending})"

    def score(
        self,
        prompts: Sequence[str | Messages],
        options: Sequence[str] | Sequence[Sequence[str]],
        *,
        label_scoring: LabelScoring = "first",
        calibration: Calibrating | None = None,
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
            calibration: a prior to take away, from `calibrate`, or a `CalibrationStream` that
                estimates one as it goes; the scores are then log-probabilities over the options,
                less the prior. It costs no pass.

        Raises:
            ValueError: what `score_options` says, or the calibration is of other options, of
                another router, strength or gate, or of another `label_scoring`.
        """
        decoder = self.reader.decoder
        prompts = listed(prompts, "prompts")
        whole_prompts = prompts_of(prompts, decoder.tokenizer)
        one_list: list[str] = []
        asked_of = ""
        if calibration is not None:
            # Before any pass: what does not fit costs nothing then.
            one_list = self._one_list(options)
            asked_of = self._asked_of(prompts, label_scoring)
            calibration.check(one_list, asked_of)
        with self.hold.turn():
            scores = score(decoder, whole_prompts, options, label_scoring=label_scoring)
            # Batches may have come in another order, and the last of them alone would be
            # remembered.
            self.last[:] = tokenize(decoder.tokenizer, [prompt.text for prompt in whole_prompts])
        if calibration is not None:
            return calibration.adjusted(scores, one_list, asked_of)
        return scores

    def calibrate(
        self,
        prompts: Sequence[str | Messages],
        options: Sequence[str],
        *,
        way: Way = DEFAULT_WAY,
        label_scoring: LabelScoring = "first",
    ) -> BatchCalibration:
        """Returns the prior of options, estimated from prompts without labels, for `score`.

        A hundred prompts of the very task will do (Zhou et al. 2023). Warns where they look like
        those of several tasks.

        Args:
            prompts: zero-shot prompts, as `score` takes them.
            options: the answers to choose from.
            way: how the prior is estimated (`routing.priors`).
            label_scoring: as in `score`.

        Raises:
            ValueError: there are fewer prompts than options, or what `score` says.
        """
        prompts = listed(prompts, "prompts")
        options = self._one_list(options)
        texts = [prompt.text for prompt in prompts_of(prompts, self.reader.decoder.tokenizer)]
        # Chats all end as their template does.
        if mixture := mixture_of([_question(prompt) for prompt in prompts]):
            warnings.warn(mixture, stacklevel=2)
        fewest = fewest_prompts(len(options))
        n_distinct = len(set(texts))
        # Before any pass, too.
        if n_distinct < fewest:
            raise ValueError(
                f"{n_distinct} prompts say nothing of the prior of {len(options)} options: give "
                f"{fewest} that differ or more, better a hundred"
            )
        scores = self.score(prompts, options, label_scoring=label_scoring)
        asked_of = self._asked_of(prompts, label_scoring)
        return BatchCalibration.of(scores, options, way, asked_of)

    def _asked_of(self, prompts: Sequence[str | Messages], label_scoring: LabelScoring) -> str:
        """Returns what gives the scores of prompts, and how."""
        asked_of = scored_by(self.made_of, label_scoring)
        if all(isinstance(prompt, str) for prompt in prompts):
            return asked_of
        # The same turns are other prompts in the words of another template.
        template = digest_of_template(self.reader.decoder.tokenizer)
        return f"{asked_of}, on chats worded by template {template}"

    @staticmethod
    def _one_list(options: Sequence[str] | Sequence[Sequence[str]]) -> list[str]:
        """Returns the options that all prompts have; ValueError where there are many lists."""
        entries = listed(options, "options")
        if not all(isinstance(entry, str) for entry in entries):
            raise ValueError(
                "calibration is of one list of options, which all prompts have: score prompts of "
                "different options apart, or ask `predict`, which does so"
            )
        return [str(entry) for entry in entries]

    def predict(self, rows: Any, task: str | Task | TaskSpec | None = None) -> list[Prediction]:
        """Returns a prediction for each row, without a look at any label.

        A row that does not fit, or is too long for the model, says so in its status. A prompt that
        the gate does not know is answered by the base model, and its status is "left alone"; or
        "calibrated", where the router came with the task's prior, which is taken away there. Warns
        (`UnlikePrompts`) where thirty or more such rows are unlike those that it is estimated from.

        Args:
            rows: a list of dicts, a data frame, a `datasets.Dataset` or the path of a file; further
                columns are of no account.
            task: how rows become prompts: the name of one of the tasks that the router was fitted
                on or has priors of, which None takes where there is but one, or a task or its spec.

        Raises:
            ValueError: these are no rows, or the task is not known.
        """
        spec = spec_among(task, known_specs(self.sources, self.calibrations))
        calibration = self._calibration_of(spec)

        def settled(task: Task, asked: Sequence[Asked], scores: Tensor) -> tuple[Tensor, list[str]]:
            statuses = [self._status(row, is_routed) for row in asked]
            if calibration is None:
                return scores, statuses
            return self._calibrated(calibration, asked, scores, statuses)

        reader = self.reader
        with self.hold.turn(), reader.decisions.noted() as is_routed:
            predictions = predicted(
                reader.decoder,
                Task(spec, (), ()).bound_to(reader.decoder.tokenizer),
                rows_of(rows, spec),
                prompt=zero_shot,
                settled=settled,
            )
        if calibration is not None:
            likeness = Likeness([calibration])
            likeness.add(predictions)
            if sentence := likeness.sentence():
                warnings.warn(sentence, UnlikePrompts, stacklevel=2)
        return predictions

    def calibrate_task(
        self, rows: Any, task: str | Task | TaskSpec | None = None, *, way: Way = DEFAULT_WAY
    ) -> tuple[TaskCalibration, list[Prediction]]:
        """Returns the priors of a task for what the gate leaves alone, and the rows' answers.

        `InContextRouter.with_calibration` keeps them with the router, and its `predict` then
        calibrates rows of the task that the gate leaves alone. No label is read.

        Args:
            rows: some hundred of the task's rows, as `predict` takes them.
            task: how rows become prompts, as in `predict`.
            way: how the priors are estimated (`routing.priors`).

        Raises:
            ValueError: there are too few rows that the gate leaves alone.
        """
        spec = spec_among(task, known_specs(self.sources, self.calibrations))
        left_alone: list[tuple[Sequence[str], Tensor]] = []
        # One prompt many times says as little as once.
        distinct: dict[Sequence[str], set[tuple[int, ...]]] = defaultdict(set)

        def settled(task: Task, asked: Sequence[Asked], scores: Tensor) -> tuple[Tensor, list[str]]:
            statuses = [self._status(row, is_routed) for row in asked]
            for row, row_scores, status in zip(asked, scores, statuses, strict=True):
                own_scores = row_scores[: len(row.options)]
                if status == LEFT_ALONE and own_scores.isfinite().all():
                    left_alone.append((row.options, own_scores))
                    distinct[row.options].add(tuple(row.tokens))
            return scores, statuses

        reader = self.reader
        bound_task = Task(spec, (), ()).bound_to(reader.decoder.tokenizer)
        all_rows = rows_of(rows, spec)
        windows = [all_rows[start : start + WINDOW] for start in range(0, len(all_rows), WINDOW)]
        sizes = [len(window) for window in windows]
        predictions = []
        with self.hold.turn(), reader.decisions.noted() as is_routed:
            for window in track(windows, "calibrating", sizes, "rows"):
                predictions += predicted(
                    reader.decoder, bound_task, window, prompt=zero_shot, settled=settled
                )
        if not left_alone:
            raise ValueError(
                f"none of {len(predictions)} rows was left alone by a gate: routed prompts are "
                "answered by what the router learned, and get no prior"
            )
        enough = []
        for row_options, row_scores in left_alone:
            if len(distinct[row_options]) >= fewest_prompts(len(row_options)):
                enough.append((row_options, row_scores))
        if not enough:
            most = max(map(len, distinct.values()))
            raise ValueError(
                f"calibration of {spec.name!r} has {most} prompts of one list of options that "
                "differ: give as many prompts as options or more, better a hundred"
            )
        options = [row_options for row_options, _ in enough]
        # Where rows have fewer options than others, the end is of no account.
        scores = pad_sequence([row_scores for _, row_scores in enough], batch_first=True)
        template = self._chat_template_of(spec)
        calibration = TaskCalibration.of(spec, scores, options, way, self.made_of, template)
        return calibration, predictions

    def _status(self, row: Asked, is_routed: Mapping[tuple[int, ...], bool]) -> str:
        # What no gate was asked about was routed.
        return ROUTED if is_routed.get(tuple(row.tokens), True) and self.strength else LEFT_ALONE

    def _calibration_of(self, spec: TaskSpec) -> TaskCalibration | None:
        """Returns the priors that came with the router for a task; None where there are none."""
        template = self._chat_template_of(spec)
        others = []
        for calibration in self.calibrations:
            # Another strength, or another gate, leaves others alone: then there is none.
            if (calibration.reading, calibration.made_of) != (reading_of(spec), self.made_of):
                continue
            # An earlier version did not keep the template.
            if calibration.chat_template in ("", template):
                return calibration
            others.append(calibration)
        if others:
            warnings.warn(
                f"the prior of {spec.name!r} is of chats that another chat template worded, so it "
                "is not used here: calibrate with this tokenizer, or set the `chat_template` that "
                "it had",
                stacklevel=3,
            )
        return None

    def _chat_template_of(self, spec: TaskSpec) -> str:
        """Returns digits that identify what words a task's chats; empty where it has none."""
        return digest_of_template(self.reader.decoder.tokenizer) if spec.chat else ""

    def _calibrated(
        self,
        calibration: TaskCalibration,
        asked: Sequence[Asked],
        scores: Tensor,
        statuses: Sequence[str],
    ) -> tuple[Tensor, list[str]]:
        """Returns scores without their prior where rows were left alone, and the statuses."""
        scores = scores.clone()
        new_statuses = list(statuses)
        places = [place for place, status in enumerate(statuses) if status == LEFT_ALONE]
        if not places:
            return scores, new_statuses
        options = [asked[place].options for place in places]
        adjusted, is_adjusted = calibration.adjusted(scores[places], options, self.made_of)
        scores[places] = adjusted
        for place, has_prior in zip(places, is_adjusted, strict=True):
            if has_prior:
                new_statuses[place] = CALIBRATED
        return scores, new_statuses

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


def _question(prompt: str | Messages) -> str:
    """Returns what a prompt asks: a text as it is, of a chat its last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


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
