"""Fits on a task whose labels share their beginnings, and its answers."""

import dataclasses

import numpy as np
import pytest
import torch

import tiny
from fitted import fit_method
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.labels import partings
from icrouting.decoder.scoring import option_tokens, score, score_options
from icrouting.evaluation.predictor import Predictor
from icrouting.fitting.losses import option_loss
from icrouting.fitting.queries import training_queries
from icrouting.icr import InContextRouter
from icrouting.methods import Settings, distilling, make, task_vectors
from icrouting.methods.live import Live
from icrouting.methods.registry import LEARNING
from icrouting.methods.task_vectors import TaskVectors, sweep
from icrouting.methods.tuning import answered
from icrouting.routing.features import features_of
from icrouting.tasks.task import rows_digest
from test_chat import speaking

FEW_SHOT = ["good: good team\nfilm:", "dull: good ball\na film:"]
OPTIONS = ("good ball", "good team", "dull vote joy")


def relabelled(task, options=OPTIONS, label_scoring="sum"):
    """The rows of a task, with other options in turn."""

    def rows(split):
        return tuple(
            dataclasses.replace(row, label=place % len(options)) for place, row in enumerate(split)
        )

    spec = dataclasses.replace(task.spec, options=options, label_scoring=label_scoring)
    return dataclasses.replace(
        task,
        spec=spec,
        train=rows(task.train),
        validation=rows(task.validation),
        test=rows(task.test),
    )


TASK = relabelled(tiny.task("toy", n_train=24, n_test=4))


def test_an_answer_has_a_place_for_every_token_where_options_part():
    labels = [[1, 2, 3], [1, 2, 4, 5], [6], [1, 7], [1, 2]]
    seen = [[(p.beginning, p.following, p.token) for p in partings(labels, i)] for i in range(5)]
    first, third = ([], [1, 6]), ([1, 2], [3, 4])
    assert seen[0] == [(*first, 1), ([1], [2, 7], 2), (*third, 3)]
    assert seen[1] == [(*first, 1), ([1], [2, 7], 2), (*third, 4)]
    assert seen[2] == [(*first, 6)]
    assert seen[3] == [(*first, 1), ([1], [2, 7], 7)]
    assert seen[4] == [(*first, 1), ([1], [2, 7], 2)]


def test_a_label_from_which_none_parts_is_known_by_its_first_token():
    (place,) = partings([[1], [1, 2]], 0)
    assert (place.beginning, place.token) == ([], 1)


def test_training_rows_are_those_of_first_tokens_where_options_differ_there(tokenizer):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    rows = []
    for label_scoring in ("first", "sum"):
        task = relabelled(tiny.task(), ("good ball", "joy", "dull vote joy"), label_scoring)
        rows.append(answered(decoder, [(task, example) for example in task.train]))
    assert rows[0] == rows[1]


def queries_of(task, tokenizer, encoder_folder):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    config = FitConfig(layers=(3, 4), n_queries=6, encoder=str(encoder_folder), min_steps=0)
    features = features_of(str(encoder_folder), decoder, "cpu")
    return training_queries(decoder, [task], features, 3, config)[0]


def test_a_router_s_loss_is_the_constrained_one_of_the_answer_s_tokens(tokenizer, encoder_folder):
    model = tiny.model("llama")
    queries = queries_of(TASK, tokenizer, encoder_folder)
    by_text = {TASK.prompt(row): row for row in TASK.train}
    expected = {text: 0.0 for text in {query.text for query in queries}}
    for text in expected:
        labels = option_tokens(tokenizer, text, OPTIONS)
        answer = labels[by_text[text].label]
        ids = tokenizer(text).input_ids
        for n_read in range(len(answer)):
            # The tokens that some option has behind what the answer begins with.
            allowed = sorted(
                {t[n_read] for t in labels if t[:n_read] == answer[:n_read] and t[n_read:]}
            )
            logits = model(torch.tensor([[*ids, *answer[:n_read]]])).logits[0, -1]
            log_probs = logits[allowed].log_softmax(-1)
            expected[text] -= log_probs[allowed.index(answer[n_read])].item()
    found = dict.fromkeys(expected, 0.0)
    for query in queries:
        logits = model(torch.tensor([query.state.tokens])).logits[:, -1]
        loss = option_loss(logits, torch.tensor([query.option_ids]), torch.tensor([query.label]))
        found[query.text] += loss.item()
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_router_reads_the_prompt_alone(tokenizer, encoder_folder):
    by_text = {}
    for query in queries_of(TASK, tokenizer, encoder_folder):
        by_text.setdefault(query.text, []).append(query)
    assert any(len(queries) > 1 for queries in by_text.values())
    for queries in by_text.values():
        assert all(torch.equal(query.features, queries[0].features) for query in queries)


@pytest.mark.slow
def test_a_router_learns_labels_that_share_their_beginnings(tokenizer, encoder_folder):
    model = tiny.model("llama")
    config = FitConfig(
        layers=(3, 4),
        rank=3,
        hidden_width=13,
        n_prompts=4,
        demos_per_class=1,
        epochs=12,
        min_steps=0,
        patience=0,
        lr=0.03,
        batch_size=6,
        encoder=str(encoder_folder),
    )
    router = InContextRouter.fit(model, tokenizer, [TASK], config)
    prompts = [TASK.prompt(row) for row in TASK.train]
    labels = torch.tensor([row.label for row in TASK.train])
    plain = score_options(model, tokenizer, prompts, OPTIONS, label_scoring="sum")
    with router.attached(model, tokenizer) as routed:
        trained = routed.score(prompts, OPTIONS, label_scoring="sum")
    losses = [torch.nn.functional.cross_entropy(scores, labels) for scores in (plain, trained)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", LEARNING, ids=lambda kind: kind.name)
@pytest.mark.slow
def test_a_rival_learns_labels_that_share_their_beginnings(kind, tokenizer, small_settings):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    method = fit_method(kind(small_settings), decoder.model, tokenizer, [TASK])
    records = Predictor(decoder).predict(method, TASK, [0, 1, 2, 3], 0)
    assert [len(record.option_logits) for record in records] == [3] * 4


@pytest.mark.parametrize("name", ["zero-shot", "calibration", "few-shot"])
def test_a_prompting_method_answers_with_whole_labels(name, tokenizer):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    (method,) = make([name], Settings(demos_per_class=1))
    method = fit_method(method, decoder.model, tokenizer, [TASK])
    records = Predictor(decoder).predict(method, TASK, [0, 1, 2, 3], 0)
    prompts = [method.prompt(TASK, row) for row in TASK.test]
    sums = score_options(decoder.model, tokenizer, prompts, OPTIONS, label_scoring="sum")
    expected = method.adjusted(TASK, TASK.test, sums)
    found = torch.tensor([record.option_logits for record in records])
    assert torch.allclose(found, expected, atol=1e-3)


def test_the_untouched_model_reads_anew_where_labels_are_scored_another_way(tokenizer):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    (method,) = make(["zero-shot"], Settings())
    fit_method(method, decoder.model, tokenizer, [TASK])
    predictor = Predictor(decoder)
    options = ("good ball", "joy", "dull vote joy")
    first, whole = (
        predictor.predict(method, relabelled(TASK, options, way), [0], 0)[0].option_logits
        for way in ("first", "sum")
    )
    assert max(whole) < min(first)


def test_a_layer_s_accuracy_is_that_of_whole_labels_under_its_vector(tokenizer, small_settings):
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    method = fit_method(TaskVectors(small_settings), decoder.model, tokenizer, [TASK])
    vectors = torch.stack([method.vectors[method.layer]] * len(method.vectors))
    accuracies = sweep(decoder, [(TASK, row) for row in TASK.validation], vectors)
    method.accuracies = torch.zeros_like(method.accuracies)
    for layer, accuracy in enumerate(accuracies.tolist()):
        method.accuracies[layer] = 1.0
        method.vectors = vectors
        assert method.validated() == pytest.approx(accuracy)
        method.accuracies[layer] = 0.0


def test_label_scoring_changes_a_digest_of_rows_only_where_it_is_no_default():
    # Kept by run folders of earlier versions.
    digest = "4fea320f42a0c074"
    first = dataclasses.replace(tiny.task().spec, label_scoring="first")
    assert rows_digest([dataclasses.replace(tiny.task(), spec=first)]) == digest
    other = {digest}
    for way in ("sum", "mean"):
        spec = dataclasses.replace(tiny.task().spec, label_scoring=way)
        other.add(rows_digest([dataclasses.replace(tiny.task(), spec=spec)]))
    assert len(other) == 3


def test_a_teacher_reads_as_much_of_the_answer_as_its_student(tokenizer, monkeypatch):
    monkeypatch.setattr(distilling, "N_DRAWS", 1)
    monkeypatch.setattr(distilling, "_few_shot_texts", lambda task, n, rng: FEW_SHOT)
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    method = Live(Settings(demos_per_class=1, train_rows=2))
    method.decoder = decoder
    method.sources = [dataclasses.replace(TASK, train=TASK.train[:2])]
    lessons = distilling.lessons_of(method, np.random.default_rng(0))
    # Two labels that begin alike, and one place further on where they part.
    assert len(lessons.teacher) == len(lessons.token_lists) == 4
    (answer, *_) = option_tokens(tokenizer, "a:", OPTIONS)
    for place, teacher in enumerate(lessons.teacher):
        beginning = answer[:1] if place % 2 else []
        tokens = [*tokenizer(FEW_SHOT[place // 2]).input_ids, *beginning]
        expected = decoder.model(torch.tensor([tokens])).logits[0, -1].softmax(-1)
        assert torch.allclose(teacher.float().exp(), expected, atol=1e-3)


def test_a_layer_is_judged_on_a_chat_as_it_is_asked(monkeypatch):
    """Options follow a chat's prompt without a space, in the sweep as in the evaluation."""
    model = tiny.model("llama")
    bound = TASK.in_chat().bound_to(speaking())
    decoder = Decoder.of(model, speaking())
    asked = []

    def spied(decoder, prompts, *args, **kwargs):
        asked.extend(prompts)
        return score(decoder, prompts, *args, **kwargs)

    monkeypatch.setattr(task_vectors, "score", spied)
    vectors = torch.zeros(len(decoder.layers), model.config.hidden_size)
    task_vectors.sweep(decoder, [(bound, bound.train[0])], vectors, 1.0)
    assert {prompt.joint for prompt in asked} == {bound.joint} == {""}
