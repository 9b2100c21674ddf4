"""Linear probes: logistic regression on frozen representations.

They are held against scikit-learn and plain passes.
"""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import tiny
from fitted import fit_method
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import stack_of
from icrouting.evaluation import records
from icrouting.evaluation.evaluate import Evaluation
from icrouting.methods import Settings, make
from icrouting.methods.probes import STRENGTHS, ProbeEncoder, ProbeHidden, logistic_regression
from icrouting.routing.encoder import load_encoder
from icrouting.tasks.task import Example, Task, TaskSpec

TASK = tiny.task("toy", n_test=30)
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")
KINDS = (ProbeHidden, ProbeEncoder)


@pytest.fixture(scope="module")
def settings(encoder_folder):
    return Settings(encoder=str(encoder_folder))


def fitted(kind, settings, model, tokenizer, task=TASK):
    method = kind(settings)
    return fit_method(method, model, tokenizer, [task])


def blobs(n_classes, n=60, n_features=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % n_classes
    centres = torch.randn(n_classes, n_features, generator=generator)
    return centres[labels] + torch.randn(n, n_features, generator=generator), labels


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("C", STRENGTHS)
def test_the_minimum_is_that_of_the_textbook_loss(C, n_classes):
    features, labels = blobs(n_classes)
    weight, bias = (
        found.requires_grad_() for found in logistic_regression(features, labels, n_classes, C)
    )
    losses = torch.nn.functional.cross_entropy(
        features.double() @ weight.mT + bias, labels, reduction="sum"
    )
    (losses + weight.square().sum() / (2 * C)).backward()
    assert torch.allclose(weight.grad, torch.zeros_like(weight), atol=1e-4)
    assert torch.allclose(bias.grad, torch.zeros_like(bias), atol=1e-4)


def test_a_class_without_a_row_is_never_answered():
    features, labels = blobs(2)
    weight, bias = logistic_regression(features, labels, 4, 1.0)
    assert bias[2:].tolist() == [-np.inf, -np.inf]
    assert set((features.double() @ weight.mT + bias).argmax(1).tolist()) == {0, 1}


def test_rows_of_one_class_are_refused():
    features, labels = blobs(1)
    with pytest.raises(ValueError, match="have one only"):
        logistic_regression(features, labels, 2, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_features_are_what_the_vocabulary_head_reads_at_the_last_token(
    family, settings, tokenizer
):
    method = ProbeHidden(settings)
    method.decoder = Decoder.of(tiny.model(family), tokenizer)
    texts = [TASK.prompt(row) + "." * (5 * i % 7) + ":" for i, row in enumerate(TASK.test[:6])]
    read, seen = method.features(texts), []
    with method.model.get_output_embeddings().register_forward_pre_hook(
        lambda head, args: seen.append(args[0])
    ):
        for text in texts:
            method.model(**tokenizer(text, return_tensors="pt"))
    assert torch.allclose(read, torch.cat([state[:, -1] for state in seen]), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_probe_is_scikit_learns_on_standardised_features(kind, settings, tokenizer):
    model = tiny.model("llama")
    method = fitted(kind, settings, model, tokenizer)
    C = max(method.tried, key=lambda tried: tried["accuracy"])["C"]  # the first of equals
    read = lambda rows: method.features([TASK.prompt(row) for row in rows]).double().numpy()  # noqa: E731
    scaler = StandardScaler().fit(read(TASK.train))
    # with two classes scikit-learn has one weight in place of two opposite ones: half the penalty
    slow = LogisticRegression(C=2 * C, tol=1e-10, max_iter=10_000)
    slow.fit(scaler.transform(read(TASK.train)), TASK.train_labels)
    found = method.adjusted(TASK, TASK.test, torch.zeros(len(TASK.test), 2))
    expected = torch.tensor(slow.decision_function(scaler.transform(read(TASK.test)))).float()
    assert torch.allclose(
        found[:, 1] - found[:, 0], expected, atol=2e-3 * float(expected.abs().max())
    )
    assert (method.n_labelled, method.n_trained) == (46, method.n_cached(TASK))
    assert [tried["C"] for tried in method.tried] == list(STRENGTHS)


def test_the_hidden_probe_learns_a_task_that_the_model_cannot_do(settings, tokenizer, tmp_path):
    """The toy task's label is the prompt's first word.

    A random model is at chance, its state is not.
    """
    methods = make(["zero-shot", "probe-hidden"], settings)
    evaluation = Evaluation(
        Decoder.of(tiny.model("llama"), tokenizer), methods, [TASK], tmp_path / "r"
    )
    evaluation.run([TASK], (0,), 30)
    right = {method.name: [] for method in methods}
    for record in records.read(tmp_path / "r"):
        right[record.method].append(record.prediction == record.label)
    assert len(right["probe-hidden"]) == 30
    assert np.mean(right["probe-hidden"]) > np.mean(right["zero-shot"]) + 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch_and_come_back_from_the_tensors(
    kind, settings, tokenizer
):
    method = fitted(kind, settings, tiny.model("llama"), tokenizer)
    together = method.adjusted(TASK, TASK.test, torch.zeros(30, 2))
    alone = torch.cat([method.adjusted(TASK, [row], torch.zeros(1, 2)) for row in TASK.test])
    assert torch.allclose(together, alone, atol=1e-4)
    again = kind(settings)
    again.decoder = Decoder.of(method.model, tokenizer)
    again.restore(method.tensors())
    assert torch.equal(again.adjusted(TASK, TASK.test, torch.zeros(30, 2)), together)
    assert not method.edits_model
    assert not stack_of(method.model)._forward_hooks


def test_the_encoders_probe_reads_the_prompts_text(settings, tokenizer, encoder_folder):
    method = ProbeEncoder(settings)
    method.decoder = Decoder.of(tiny.model("llama"), tokenizer)
    texts = [TASK.prompt(row) for row in TASK.test[:5]]
    assert torch.allclose(
        method.features(texts), load_encoder(str(encoder_folder), "cpu")(texts), atol=1e-5
    )


def test_examples_with_fewer_choices_are_scored_on_those(settings, tokenizer):
    def row(number, n):
        return Example({"text": f"film {number}"}, tuple("abcd"[:n]), number % n)

    spec = TaskSpec("letters", "far", "{text}\n{choices}\nAnswer:")
    task = Task(
        spec, tuple(row(i, 2 + i % 3) for i in range(20)), (), tuple(row(i, 3) for i in range(6))
    )
    method = fitted(ProbeHidden, settings, tiny.model("llama"), tokenizer, task)
    wide = Example({"text": "film"}, tuple("abcde"), 4)  # wider than any row that was learned from
    found = method.adjusted(task, [row(0, 2), row(1, 3), wide], torch.zeros(3, 5))
    assert found.isinf().sum(1).tolist() == [3, 2, 1]
    assert found.isfinite().long().argmin(1).tolist() == [2, 3, 4]


def test_rows_are_at_most_those_of_the_settings(settings, tokenizer, encoder_folder):
    few = Settings(encoder=str(encoder_folder), train_rows=9)
    assert fitted(ProbeEncoder, few, tiny.model("llama"), tokenizer).n_labelled == 9 + 6


def test_a_probe_without_validation_rows_or_with_two_tasks_says_so(settings, tokenizer):
    bare = Task(TASK.spec, TASK.train, TASK.test)
    with pytest.raises(
        ValueError, match="probe-hidden chooses on validation rows: give 5 training rows or more"
    ):
        fitted(ProbeHidden, settings, tiny.model("llama"), tokenizer, bare)
    with pytest.raises(ValueError, match="one task's labels, got 2 tasks"):
        ProbeHidden(settings).fit(
            tiny.model("llama"), tokenizer, [TASK, TASK], np.random.default_rng(0)
        )
    with pytest.raises(
        ValueError, match="there is no 'probe-hidden-once': a probe answers with the labels"
    ):
        make(["probe-hidden-once"], settings)
