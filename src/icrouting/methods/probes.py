"""Linear probes: what labelled prompts give without any routing."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from icrouting.decoder.hooks import edited_inputs
from icrouting.decoder.states import last_outputs
from icrouting.methods.base import Method, Scores
from icrouting.methods.regimes import ONCE
from icrouting.routing.encoder import SentenceEncoder, load_encoder, query_texts
from icrouting.runtime.defaults import usual_defaults
from icrouting.tasks.task import Example, Task

# Values of C, which is scikit-learn's inverse regularisation; its default first.
STRENGTHS = (1.0, 0.1, 10.0, 0.01, 100.0, 1e-3, 1e-4)


class Probe(Method, ABC):
    """Multinomial logistic regression on a frozen reading of the bare prompt.

    It goes from features to the label; the model's scores are dropped. It is trained on up to
    `Settings.train_rows` rows, on standardised features, and its regularisation is chosen on
    validation rows. Choices by letter are learned as letters.
    """

    learned = ("weight", "bias")
    cached = ("weight", "bias")
    lacks: Mapping[str, str] = {
        ONCE: "a probe answers with the labels that it was trained on, and a new task has others"
    }
    weight: Float[Tensor, "n_classes n_features"]
    bias: Float[Tensor, "n_classes"]

    @abstractmethod
    def features(self, texts: Sequence[str]) -> Float[Tensor, "n_texts n_features"]:
        """Returns what is read of prompts, in float32."""

    def learn(self, rng: np.random.Generator) -> None:
        """Trains a probe for each strength of regularisation and keeps the best."""
        if len(self.sources) != 1:
            raise ValueError(
                f"a probe learns one task's labels, got {len(self.sources)} tasks: fit one for each"
            )
        (task,) = self.sources
        order = rng.permutation(len(task.train))
        train_rows = [task.train[index] for index in order[: self.settings.train_rows]]
        n_train = len(train_rows)

        # Training and validation rows are read together, and once for all strengths.
        rows = [*train_rows, *task.validation]
        features = self.features([task.prompt(row) for row in rows])
        labels = torch.tensor([row.label for row in rows])
        n_options = [len(task.options(row)) for row in rows]
        self._validation = (features[n_train:], n_options[n_train:], labels[n_train:])

        train_features = features[:n_train].double()
        train_labels = labels[:n_train]
        mean = train_features.mean(0)
        std = train_features.std(0, correction=0)
        # A channel that only rounding moves is left out.
        std[std <= 1e-6 * mean.abs()] = torch.inf
        standardised = (train_features - mean) / std
        n_classes = max(n_options)

        def build(C: float) -> dict[str, Tensor]:
            weight, bias = logistic_regression(standardised, train_labels, n_classes, C)
            # The scaling goes into the probe, so that it takes features as they are.
            weight = weight / std
            bias = bias - weight @ mean
            return {"weight": weight.float(), "bias": bias.float()}

        self.choose([{"C": C} for C in STRENGTHS], build)
        self.n_labelled = n_train + self.n_validation
        self.n_trained = self.weight.numel() + self.bias.numel()

    def validated(self) -> float:
        """Returns the accuracy on the validation rows; the model need not run for it."""
        features, n_options, labels = self._validation
        guesses = self._scores(features, n_options).argmax(1)
        return float((guesses == labels).float().mean())

    @usual_defaults()
    def adjusted(self, task: Task, examples: Sequence[Example], scores: Scores) -> Scores:
        """Returns the probe's scores instead of the model's."""
        texts = [self.prompt(task, example).text for example in examples]
        n_options = [len(task.options(example)) for example in examples]
        return self._scores(self.features(texts), n_options)

    def _scores(
        self, features: Tensor, n_options: Sequence[int]
    ) -> Float[Tensor, "n_examples n_options"]:
        """Returns each example's scores for its options, -inf where it has fewer."""
        class_scores = features @ self.weight.mT + self.bias
        n_classes = class_scores.shape[1]
        shape = (len(features), max(n_options))
        scores = torch.full(shape, -torch.inf)
        for row, n_row_options in enumerate(n_options):
            # A letter never seen is never answered.
            n_scored = min(n_row_options, n_classes)
            scores[row, :n_scored] = class_scores[row, :n_scored]
        return scores


class ProbeHidden(Probe):
    """A probe on the state that the vocabulary head reads at the prompt's last token."""

    name = "probe-hidden"

    def features(self, texts: Sequence[str]) -> Float[Tensor, "n_texts n_features"]:
        """Returns the backbone's last hidden states."""
        head = self.decoder.base.get_output_embeddings()
        assert head is not None, "a causal language model has a vocabulary head"
        (states,), _ = last_outputs(self.decoder, [head], texts, edited_inputs)
        return states


class ProbeEncoder(Probe):
    """A probe on the embedding that a router reads.

    It says how much of routing's gain is the sentence encoder's.
    """

    name = "probe-encoder"

    def depends_on(self) -> str:
        """Returns the fingerprint of the encoder."""
        return self._encoder().fingerprint

    def features(self, texts: Sequence[str]) -> Float[Tensor, "n_texts n_features"]:
        """Returns the sentence encoder's vectors."""
        # A router's encoder reads prompts back from their tokens, and so must this one.
        token_lists = self.decoder.tokenize(texts)
        read_back = query_texts(self.tokenizer, token_lists)
        return self._encoder()(read_back).cpu()

    def _encoder(self) -> SentenceEncoder:
        """Returns the encoder of the settings, on the model's device."""
        return load_encoder(self.settings.encoder, str(self.decoder.device))


def logistic_regression(
    features: Float[Tensor, "n n_features"],
    labels: Int[Tensor, "n"],
    n_classes: int,
    C: float,
) -> tuple[Float[Tensor, "n_classes n_features"], Float[Tensor, "n_classes"]]:
    """Returns the weight and bias of the regularised fit, in float64.

    They minimise C * (sum of cross-entropies) + |weight|^2 / 2. A class without a row has weight 0
    and bias -inf.

    Raises:
        ValueError: the rows have one label only.
    """
    seen = labels.unique()
    if len(seen) < 2:
        raise ValueError(
            "a probe tells labels apart, and its training rows have one only: give it more rows"
        )
    if len(seen) == 2:
        # For two classes scikit-learn fits one weight in place of two opposite halves, which have
        # half its penalty.
        signs = torch.tensor([[-0.5], [0.5]])
        sklearn_C = 2 * C
    else:
        signs = torch.eye(len(seen))
        sklearn_C = C
    regression = LogisticRegression(C=sklearn_C, tol=1e-7, max_iter=10_000)
    regression.fit(features.double().numpy(), labels.numpy())

    n_features = features.shape[1]
    signs = signs.double()
    weight = torch.zeros(n_classes, n_features).double()
    bias = torch.full((n_classes,), -torch.inf).double()
    weight[seen] = signs @ torch.tensor(regression.coef_)
    bias[seen] = signs @ torch.tensor(regression.intercept_)
    return weight, bias
