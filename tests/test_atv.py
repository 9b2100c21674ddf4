"""Adaptive task vectors: each prompt's own, and their mean over a task's prompts."""

import dataclasses

import numpy as np
import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hooks import edited
from icrouting.decoder.scoring import option_ids, option_tokens, score_options
from icrouting.methods import make
from icrouting.methods.atv import Atv, AtvAveraged
from icrouting.routing.encoder import load_encoder
from test_chat import speaking

TASK = tiny.task("toy", n_train=24, n_test=6)
# Of mixed lengths, so that a batch of them is padded.
TEXTS = [TASK.prompt(row) + "." * (3 * place % 7) + ":" for place, row in enumerate(TASK.test)]
OPTIONS = list(TASK.spec.options)
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox")


def unfitted(kind, family, tokenizer, settings, task=TASK):
    """A method with a random network, whose vectors change answers."""
    method = kind(settings)
    method.decoder = Decoder.of(tiny.model(family), tokenizer)
    method.sources = [task]
    method.tried = []
    method.cost = {}
    n_layers = len(method.decoder.layers)
    width = method.decoder.hidden_size
    n_features = load_encoder(settings.encoder).n_features
    draw = torch.Generator().manual_seed(3)
    shapes = {
        "hidden_weight": (8, n_features),
        "hidden_bias": (8,),
        "vector_weight": (n_layers, width, 8),
        "vector_bias": (n_layers, width),
        "scales": (n_layers,),
    }
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors["hidden_weight"] /= n_features**0.5
    method.restore(tensors)
    return method


def slow_scores(method, text, vectors):
    """Scores of one text alone, in one pass without a cache, with vectors added at its end."""
    decoder = method.decoder
    ids = torch.tensor(decoder.tokenize([text]))

    def add(layer, hidden):
        moved = hidden.clone()
        moved[:, -1] = hidden[:, -1] + vectors[layer]
        return moved

    with edited(list(decoder.layers), add), torch.no_grad():
        logits = decoder.model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits[option_ids(decoder.tokenizer, text, OPTIONS)]


def slow_vectors(method, text):
    """The network's vectors of one text, unit by unit of the hidden layer."""
    (features,) = load_encoder(method.settings.encoder)([text])
    vectors = method.vector_bias.clone()
    for unit, bias in enumerate(method.hidden_bias):
        size = torch.nn.functional.gelu(method.hidden_weight[unit] @ features + bias)
        vectors += size * method.vector_weight[..., unit]
    return method.scales[:, None] * vectors


@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_has_its_own_vectors_at_its_last_token(family, tokenizer, small_settings):
    method = unfitted(Atv, family, tokenizer, small_settings)
    expected = [slow_scores(method, text, slow_vectors(method, text)) for text in TEXTS]
    with method.applied(TASK):
        scores = score_options(method.decoder.model, tokenizer, TEXTS, OPTIONS)
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_averaged_all_prompts_have_the_mean_over_training_prompts(
    family, tokenizer, small_settings
):
    method = unfitted(AtvAveraged, family, tokenizer, small_settings)
    read = TASK.train[: small_settings.train_rows]
    mean = torch.stack([slow_vectors(method, TASK.prompt(row)) for row in read]).mean(0)
    torch.testing.assert_close(method.mean_vectors(TASK), mean, atol=1e-4, rtol=1e-4)
    expected = [slow_scores(method, text, mean) for text in TEXTS]
    with method.applied(TASK):
        scores = score_options(method.decoder.model, tokenizer, TEXTS, OPTIONS)
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_two_answer_otherwise(tokenizer, small_settings):
    scores = []
    for kind in (Atv, AtvAveraged):
        method = unfitted(kind, "llama", tokenizer, small_settings)
        scores.append(score_options(method.decoder.model, tokenizer, TEXTS, OPTIONS))
        with method.applied(TASK):
            scores.append(score_options(method.decoder.model, tokenizer, TEXTS, OPTIONS))
        # Left, the model is as it was.
        left = score_options(method.decoder.model, tokenizer, TEXTS, OPTIONS)
        assert torch.equal(left, scores[0])
    plain, adaptive, _, averaged = scores
    assert (adaptive - plain).abs().max() > 1e-2
    assert (averaged - plain).abs().max() > 1e-2
    assert (adaptive - averaged).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [Atv, AtvAveraged])
@pytest.mark.parametrize("zero", ["scales", "vectors"])
def test_vectors_of_zero_change_nothing(kind, zero, tokenizer, small_settings):
    method = unfitted(kind, "llama", tokenizer, small_settings)
    if zero == "scales":
        method.scales = torch.zeros_like(method.scales)
    else:
        method.vector_weight = torch.zeros_like(method.vector_weight)
        method.vector_bias = torch.zeros_like(method.vector_bias)
    plain = score_options(method.decoder.model, tokenizer, TEXTS, OPTIONS)
    with method.applied(TASK):
        assert torch.equal(score_options(method.decoder.model, tokenizer, TEXTS, OPTIONS), plain)


def mean_loss(method, rows):
    logits = method._following_logits(method.tensors(), [row for row, _ in rows])
    target = torch.tensor([answer for _, answer in rows])
    return torch.nn.functional.cross_entropy(logits, target).item()


def test_training_starts_at_the_model_and_lowers_the_loss(tokenizer, small_settings):
    settings = dataclasses.replace(small_settings, tries=1, train_rows=24, train_epochs=5)
    # Without rows held back, which might end it.
    task = dataclasses.replace(TASK, validation=())
    method = fit_method(Atv(settings), tiny.model("llama"), tokenizer, [task])
    rows = method._rows([(task, row) for row in task.train])
    after = mean_loss(method, rows)
    method.vector_weight = torch.zeros_like(method.vector_weight)
    method.vector_bias = torch.zeros_like(method.vector_bias)
    before = mean_loss(method, rows)
    texts = [task.prompt(row) for row in task.train]
    scores = score_options(method.decoder.model, tokenizer, texts, OPTIONS)
    labels = torch.tensor([row.label for row in task.train])
    plain = torch.nn.functional.cross_entropy(scores, labels).item()
    assert before == pytest.approx(plain, abs=1e-5)
    assert after < 0.8 * before


@pytest.mark.parametrize("label_scoring", ["sum", "mean"])
@pytest.mark.parametrize("chat", [False, True])
def test_training_reads_whole_labels_as_answering_does(
    label_scoring, chat, tokenizer, small_settings
):
    options = ("good ball", "good team")
    spec = dataclasses.replace(TASK.spec, options=options, label_scoring=label_scoring, chat=chat)
    tokenizer = speaking() if chat else tokenizer
    task = dataclasses.replace(TASK, spec=spec).bound_to(tokenizer)
    method = unfitted(Atv, "llama", tokenizer, small_settings, task)
    rows = method._rows([(task, row) for row in task.test])
    # The options part at one place alone: a row each, and nothing else tells them apart.
    assert len(rows) == len(task.test)
    logits = method._following_logits(method.tensors(), [row for row, _ in rows])
    first = [row.following.index(rows[0][0].following[0]) for row, _ in rows]
    assert first == [0] * len(rows)
    prompts = [method.prompt(task, row) for row in task.test]
    with method.applied(task):
        scores = score_options(
            method.decoder.model, tokenizer, prompts, options, label_scoring=label_scoring
        )
    # In a chat a space between two words may be a token of its own.
    labels = option_tokens(tokenizer, prompts[0].query, options, task.joint)
    n_tokens = len(labels[0]) if label_scoring == "mean" else 1
    torch.testing.assert_close(
        n_tokens * (scores[:, 0] - scores[:, 1]),
        logits[:, 0] - logits[:, 1],
        atol=1e-4,
        rtol=1e-4,
    )


def test_the_control_has_the_very_network(tokenizer, small_settings):
    model = tiny.model("llama")
    adaptive = fit_method(Atv(small_settings), model, tokenizer, [TASK], seed=1)
    averaged = fit_method(AtvAveraged(small_settings), model, tokenizer, [TASK], seed=2)
    assert adaptive.tried == averaged.tried
    for name, tensor in adaptive.tensors().items():
        assert torch.equal(tensor, averaged.tensors()[name]), name


def test_the_control_s_network_is_chosen_without_averaging(tokenizer, small_settings, monkeypatch):
    adaptive = unfitted(Atv, "llama", tokenizer, small_settings)
    averaged = unfitted(AtvAveraged, "llama", tokenizer, small_settings)
    monkeypatch.setattr(AtvAveraged, "mean_vectors", lambda *args: pytest.fail("averaged"))
    assert averaged.validated() == adaptive.validated()


def test_the_mean_reads_no_label(tokenizer, small_settings):
    method = unfitted(AtvAveraged, "llama", tokenizer, small_settings)
    flipped = tuple(dataclasses.replace(row, label=1 - row.label) for row in TASK.train)
    unlike = dataclasses.replace(TASK, train=flipped)
    assert torch.equal(method.mean_vectors(TASK), method.mean_vectors(unlike))


def test_a_task_without_training_prompts_has_no_mean(tokenizer, small_settings):
    method = unfitted(AtvAveraged, "llama", tokenizer, small_settings)
    with pytest.raises(ValueError, match="'toy' has none: give it some, which need no labels"):
        method.applied(dataclasses.replace(TASK, train=()))


def test_once_fitted_the_control_goes_by_the_prompts_of_the_task_at_hand(tokenizer, small_settings):
    model = tiny.model("llama")
    other = tiny.task("another", n_train=24, n_test=6)
    (method,) = make(["atv-averaged-once"], small_settings)
    method.fit(model, tokenizer, [TASK], np.random.default_rng(0))
    assert not torch.equal(method.mean_vectors(TASK), method.mean_vectors(other))


def test_what_is_kept_is_the_network_or_a_tasks_vectors(tokenizer, small_settings):
    method = fit_method(Atv(small_settings), tiny.model("llama"), tokenizer, [TASK])
    assert method.n_cached(TASK) == method.n_trained + len(method.scales)
    averaged = AtvAveraged(small_settings)
    averaged.take(method.in_force(), method.decoder, [TASK])
    assert averaged.n_cached(TASK) == len(method.scales) * method.decoder.hidden_size
