"""A residual probe: from a few labels, what is to be added to the model's own option scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor

from icrouting.decoder.hooks import edited_inputs
from icrouting.decoder.scoring import score
from icrouting.decoder.states import last_outputs
from icrouting.methods.base import Scores
from icrouting.methods.batch_calibration import (
    Estimate,
    check_options,
    drawn_rows,
    estimated,
    has_prior,
)
from icrouting.methods.probes import Probe
from icrouting.routing.pids import late_third
from icrouting.runtime.defaults import usual_defaults
from icrouting.tasks.task import Example, Task

# Whether the prior is taken away first, and the inverse regularisation of the weight; at 0 nothing
# is learned, so that few rows need not make the model worse (`benchmarks.few_labels`).
GRID: tuple[tuple[bool, float], ...] = (
    *((True, 1.0), (True, 0.0), (False, 0.0), (True, 1 / 3)),
    *((False, 1.0), (True, 3.0), (False, 3.0), (True, 10.0), (False, 10.0)),
    *((True, 100.0), (False, 100.0)),
)
N_FOLDS = 5
MOST_STEPS = 500

Array = np.ndarray


@dataclass(frozen=True)
class Rows:
    """Labelled rows, as a fit reads them.

    Attributes:
        features: standardised, [n_rows, n_features].
        offsets: what the model itself says of the options, by whether its prior is taken away:
            log-probabilities [n_rows, n_options], -inf where a row has fewer options.
        targets: labels [n_rows], or each row's probabilities of all options.
    """

    features: Array
    offsets: dict[bool, Array]
    targets: Array


@dataclass(frozen=True)
class Lesson:
    """What a correction is learned from.

    Attributes:
        examples: rows of the task.
        targets: their labels, or shares of all options, as in `Rows`.
        n_labelled: how many labels were read for it.
    """

    examples: Sequence[Example]
    targets: Array
    n_labelled: int


class ProbeResidual(Probe):
    """The model's option scores, plus a linear correction from its own states (not in the paper).

    The correction reads the state that enters the routed layers and the one that the vocabulary
    head reads, at the prompt's last token; it is fitted on up to `--train-rows` labelled rows and
    the validation rows. It starts as nothing, and its size is held by a penalty, so that with
    few labels the answers stay near the model's own. The penalty, and whether the
    model's prior over the options is taken away first (`batch-calibration`, from unlabelled
    prompts), are chosen by the log-loss of N_FOLDS-fold cross-validation; to add nothing is one of
    the settings. So it needs no validation slice, and has a meaning from a row a class on.

    Attributes:
        weight: [n_options, n_features], as for features that are not standardised.
        bias: [n_options].
        scores: of the prompts that the prior is estimated from, [n_prompts, n_options].
        calibrated: one number: whether that prior is taken away.
    """

    name = "probe-residual"
    learned = ("weight", "bias", "scores", "calibrated")
    cached = ("weight", "bias")
    scores: Float[Tensor, "n_prompts n_options"]
    calibrated: Float[Tensor, "1"]
    _estimate: Estimate | None = None

    def features(self, texts: Sequence[str]) -> Float[Tensor, "n_texts n_features"]:
        """Returns the states that enter the routed layers and the vocabulary head."""
        head = self.decoder.base.get_output_embeddings()
        assert head is not None, "a causal language model has a vocabulary head"
        entry = self.decoder.layers[late_third(self.decoder.dims.n_layers)[0]]
        states, _ = last_outputs(self.decoder, [entry, head], texts, edited_inputs)
        return torch.cat(states, dim=1)

    def learn(self, rng: np.random.Generator) -> None:
        """Estimates the prior, chooses a setting by cross-validation, and fits it on all rows."""
        if len(self.sources) != 1:
            raise ValueError(
                f"a probe learns one task's labels, got {len(self.sources)} tasks: fit one for each"
            )
        (task,) = self.sources
        batch = drawn_rows(task, rng)
        lesson = self.lesson(task, rng)
        self.scores = self._plain_scores(task, batch)
        rows, mean, deviation = self._rows(task, batch, lesson)
        calibrated, C = self._chosen(rows, rng)
        weight, bias = residual_fit(rows.features, rows.offsets[calibrated], rows.targets, C)
        # The scaling goes into the weight, so that it takes features as they are.
        weight = weight / deviation
        bias = bias - weight @ mean
        self.weight = torch.from_numpy(weight).float()
        self.bias = torch.from_numpy(bias).float()
        self.calibrated = torch.tensor([float(calibrated)])
        self.n_labelled = lesson.n_labelled
        self.n_trained = self.weight.numel() + self.bias.numel()

    def lesson(self, task: Task, rng: np.random.Generator) -> Lesson:
        """Returns labelled rows: up to `train_rows`, and those of the validation slice."""
        picked = rng.permutation(len(task.train))[: self.settings.train_rows]
        labelled = [*(task.train[place] for place in picked), *task.validation]
        if not labelled:
            raise ValueError(f"{self.name} learns from labelled rows, and {task.name!r} has none")
        return Lesson(labelled, np.array([row.label for row in labelled]), len(labelled))

    @usual_defaults()
    def adjusted(self, task: Task, examples: Sequence[Example], scores: Scores) -> Scores:
        """Returns the model's log-probabilities over the options, corrected."""
        offsets = self._offsets(task, examples, scores, bool(self.calibrated))
        texts = [self.prompt(task, example).text for example in examples]
        corrections = self.features(texts) @ self.weight.mT + self.bias
        corrected = offsets.clone()
        # An option that no labelled row has is left as the model has it.
        n_known = min(offsets.shape[1], corrections.shape[1])
        corrected[:, :n_known] += corrections[:, :n_known]
        return corrected

    def n_cached(self, task: Task) -> int:
        """Returns the numbers of the correction and of one prior."""
        return super().n_cached(task) + self.scores.shape[1]

    def _plain_scores(self, task: Task, rows: Sequence[Example]) -> Scores:
        prompts = [self.prompt(task, row) for row in rows]
        options = [task.options(row) for row in rows]
        return score(self.decoder, prompts, options, label_scoring=task.spec.label_scoring)

    def _rows(
        self, task: Task, batch: Sequence[Example], lesson: Lesson
    ) -> tuple[Rows, Array, Array]:
        """Returns a lesson's rows, and mean and deviation by which features are standardised."""
        examples = lesson.examples
        texts = [self.prompt(task, row).text for row in (*batch, *examples)]
        features = self.features(texts).double()
        mean = features.mean(0)
        deviation = features.std(0, correction=0)
        # A channel that only rounding moves is left out.
        deviation[deviation <= 1e-6 * mean.abs()] = torch.inf
        # Rows of length one on average, whatever the model's width.
        deviation = deviation * features.shape[1] ** 0.5
        standardised = (features[len(batch) :] - mean) / deviation
        scores = self._plain_scores(task, examples)
        offsets = {}
        for calibrated in (True, False):
            if not calibrated or has_prior(self.scores):
                kind = self._offsets(task, examples, scores, calibrated)
                offsets[calibrated] = kind.double().numpy()
        rows = Rows(standardised.numpy(), offsets, lesson.targets)
        return rows, mean.numpy(), deviation.numpy()

    def _offsets(
        self, task: Task, examples: Sequence[Example], scores: Scores, calibrated: bool
    ) -> Scores:
        """Returns log-probabilities over the options, less their prior where it is asked."""
        if not calibrated:
            return scores.log_softmax(1)
        self._estimate = estimated(self._estimate, self.sources[0].spec, self.scores)
        calibration = self._estimate.calibration
        options = [task.options(example) for example in examples]
        check_options(calibration, options)
        return calibration.adjusted(scores, options, "")[0].log_softmax(1)

    def _chosen(self, rows: Rows, rng: np.random.Generator) -> tuple[bool, float]:
        """Returns the setting of the least log-loss on rows that were left out."""
        allowed = [setting for setting in GRID if setting[0] in rows.offsets]
        allowed = allowed[: self.settings.tries]
        if len(allowed) == 1 or len(rows.targets) < 2:
            return allowed[0]
        self.tried += cross_validated(rows, allowed, rng)
        best = min(self.tried, key=lambda setting: setting["loss"])
        return best["calibrated"], best["C"]


def cross_validated(
    rows: Rows, settings: Sequence[tuple[bool, float]], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Returns each setting with its "accuracy" and log-"loss" on rows that were left out."""
    n_rows = len(rows.targets)
    labels = rows.targets if rows.targets.ndim == 1 else rows.targets.argmax(1)
    folds = np.array_split(rng.permutation(n_rows), N_FOLDS)
    tried = []
    for calibrated, C in settings:
        log_probs = _left_out(rows, calibrated, C, folds)
        right = log_probs.argmax(1) == labels
        loss = cross_entropy(log_probs, rows.targets) / n_rows
        measured = {"accuracy": float(right.mean()), "loss": float(loss)}
        tried.append({"calibrated": calibrated, "C": C, **measured})
    return tried


def _left_out(rows: Rows, calibrated: bool, C: float, folds: Sequence[Array]) -> Array:
    """Returns each row's log-probabilities by a fit on the rows of the other folds."""
    offsets = rows.offsets[calibrated]
    log_probs = np.empty_like(offsets)
    for fold in _filled(folds):
        others = np.setdiff1d(np.arange(len(offsets)), fold)
        weight, bias = residual_fit(rows.features[others], offsets[others], rows.targets[others], C)
        corrected = offsets[fold] + rows.features[fold] @ weight.T + bias
        log_probs[fold] = log_softmax(corrected, axis=1)
    return log_probs


def _filled(folds: Sequence[Array]) -> Iterator[Array]:
    """Yields the folds that hold a row: there may be fewer rows than folds."""
    for fold in folds:
        if len(fold):
            yield fold


def cross_entropy(
    log_probs: Float[Array, "n_rows n_options"],
    targets: Int[Array, "n_rows"] | Float[Array, "n_rows n_options"],
) -> float:
    """Returns the sum over rows, in nats, of labels or of shares of all options."""
    if targets.ndim == 1:
        return -float(log_probs[np.arange(len(targets)), targets].sum())
    # An option that a row does not have is -inf, and has no share: it adds nothing.
    has_share = targets > 0
    return -float((targets[has_share] * log_probs[has_share]).sum())


def residual_fit(
    features: Float[Array, "n_rows n_features"],
    offsets: Float[Array, "n_rows n_options"],
    targets: Int[Array, "n_rows"] | Float[Array, "n_rows n_options"],
    C: float,
) -> tuple[Float[Array, "n_options n_features"], Float[Array, "n_options"]]:
    """Returns the weight and bias that are to be added to what the model says, in float64.

    They minimise the sum of cross-entropies of `offsets + features @ weight.T + bias`, plus
    |weight|^2 / (2 C) + |bias|^2 / 2. Both are zero at a C of 0. Targets are labels, or each row's
    probabilities of all options.
    """
    n_features = features.shape[1]
    n_options = offsets.shape[1]
    weight = np.zeros((n_options, n_features))
    bias = np.zeros(n_options)
    if C == 0:
        return weight, bias
    # The weight lies in the span of the rows, which has fewer dimensions where rows are few.
    _, _, span = np.linalg.svd(features, full_matrices=False)
    inside = features @ span.T
    shares = np.eye(n_options)[targets] if targets.ndim == 1 else targets

    def loss_and_gradient(flat: Array) -> tuple[float, Array]:
        numbers = flat.reshape(n_options, -1)
        tail, shift = numbers[:, :-1], numbers[:, -1]
        log_probs = log_softmax(offsets + inside @ tail.T + shift, axis=1)
        loss = cross_entropy(log_probs, shares)
        loss += np.square(tail).sum() / (2 * C) + np.square(shift).sum() / 2
        gaps = np.exp(log_probs) - shares
        gradient = np.column_stack([gaps.T @ inside + tail / C, gaps.sum(0) + shift])
        return loss, gradient.ravel()

    start = np.zeros(n_options * (inside.shape[1] + 1))
    options = {"maxiter": MOST_STEPS, "gtol": 1e-7, "ftol": 1e-12}
    best = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    numbers = best.x.reshape(n_options, -1)
    return numbers[:, :-1] @ span, numbers[:, -1]
