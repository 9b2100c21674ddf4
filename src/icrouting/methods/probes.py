"""Linear probes: what labelled prompts give without any routing, by logistic regression on a frozen representation."""

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
from icrouting.routing.encoder import load_encoder, query_texts
from icrouting.tasks.task import Example, Task

STRENGTHS = (1.0, 0.1, 10.0, 0.01, 100.0, 1e-3, 1e-4)  # scikit-learn's default C first


class Probe(Method, ABC):
    """Multinomial logistic regression from features of the bare prompt to the label; the model's scores are dropped.

    It is trained on up to `Settings.train_rows` rows, on standardised features, and its regularisation is chosen on
    validation rows. Choices by letter are learned as letters.
    """

    learned = ("weight", "bias")
    cached = ("weight", "bias")
    lacks: Mapping[str, str] = {
        ONCE: "a probe answers with the labels that it was trained on, and a new task has others"
    }
    weight: Tensor
    bias: Tensor

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
        rows = [task.train[i] for i in rng.permutation(len(task.train))[: self.settings.train_rows]]
        every, n = [*rows, *task.validation], len(rows)
        features = self.features([task.prompt(row) for row in every])
        labels = torch.tensor([row.label for row in every])
        n_options = [len(task.options(row)) for row in every]
        self._held = features[n:], n_options[n:], labels[n:]
        mean, std = features[:n].double().mean(0), features[:n].double().std(0, correction=0)
        std[std <= 1e-6 * mean.abs()] = torch.inf  # a channel that only rounding moves is left out

        def build(C: float) -> dict[str, Tensor]:
            weight, bias = logistic_regression(
                (features[:n] - mean) / std, labels[:n], max(n_options), C
            )
            weight = weight / std
            return {"weight": weight.float(), "bias": (bias - weight @ mean).float()}

        self.choose([{"C": C} for C in STRENGTHS], build)
        self.n_labelled, self.n_trained = (
            n + self.n_validation,
            self.weight.numel() + self.bias.numel(),
        )

    def validated(self) -> float:
        """Returns the accuracy on the validation rows; the model need not run for it."""
        features, n_options, labels = self._held
        return float((self._scores(features, n_options).argmax(1) == labels).float().mean())

    def adjusted(self, task: Task, examples: Sequence[Example], scores: Scores) -> Scores:
        """Returns the probe's scores instead of the model's."""
        features = self.features([self.prompt(task, example).text for example in examples])
        return self._scores(features, [len(task.options(example)) for example in examples])

    def _scores(
        self, features: Tensor, n_options: Sequence[int]
    ) -> Float[Tensor, "n_examples n_options"]:
        found = features @ self.weight.mT + self.bias
        scores = torch.full((len(features), max(n_options)), -torch.inf)
        for row, n in enumerate(
            min(n, found.shape[1]) for n in n_options
        ):  # a letter never seen is never answered
            scores[row, :n] = found[row, :n]
        return scores


class ProbeHidden(Probe):
    """A probe on the state that the vocabulary head reads at the prompt's last token."""

    name = "probe-hidden"

    def features(self, texts: Sequence[str]) -> Float[Tensor, "n_texts n_features"]:
        """Returns the backbone's last hidden states."""
        head = self.decoder.model.get_output_embeddings()
        assert head is not None, "a causal language model has a vocabulary head"
        return last_outputs(self.decoder, [head], texts, edited_inputs)[0][0]


class ProbeEncoder(Probe):
    """A probe on the embedding that a router reads: how much of routing's gain is the sentence encoder's."""

    name = "probe-encoder"

    def depends_on(self) -> str:
        """Returns the fingerprint of the encoder."""
        return load_encoder(self.settings.encoder, str(self.decoder.device)).fingerprint

    def features(self, texts: Sequence[str]) -> Float[Tensor, "n_texts n_features"]:
        """Returns the sentence encoder's vectors."""
        encoder = load_encoder(self.settings.encoder, str(self.decoder.device))
        token_lists = self.decoder.tokenize(texts)
        return encoder(query_texts(self.tokenizer, token_lists)).cpu()


def logistic_regression(
    features: Float[Tensor, "n n_features"], labels: Int[Tensor, "n"], n_classes: int, C: float
) -> tuple[Float[Tensor, "n_classes n_features"], Float[Tensor, "n_classes"]]:
    """Returns weight and bias that minimise C * (sum of cross-entropies) + |weight|^2 / 2; -inf for unseen classes."""
    seen = labels.unique()
    if len(seen) < 2:
        raise ValueError(
            "a probe tells labels apart, and its training rows have one only: give it more rows"
        )
    # for two classes scikit-learn fits one weight in place of two opposite halves, which have half its penalty
    signs = torch.tensor([[-0.5], [0.5]]) if len(seen) == 2 else torch.eye(len(seen))
    found = LogisticRegression(C=2 * C if len(seen) == 2 else C, tol=1e-7, max_iter=10_000)
    found.fit(features.double().numpy(), labels.numpy())
    weight, bias = (
        torch.zeros(n_classes, features.shape[1]).double(),
        torch.full((n_classes,), -torch.inf).double(),
    )
    weight[seen], bias[seen] = (
        signs.double() @ torch.tensor(part) for part in (found.coef_, found.intercept_)
    )
    return weight, bias
