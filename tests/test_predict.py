"""Predictions: a label, probabilities and a status for every row, whatever stands in it."""

import re
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

import tiny
from fitted import SMALL, fit_method, small_fit
from icrouting.icr import InContextRouter
from icrouting.methods import Settings, make
from icrouting.methods.saved import load_method, save_method
from icrouting.tasks.rows import unlabelled
from icrouting.tasks.task import TaskSpec

TASK = tiny.task("toy", n_train=60, n_test=30)
OTHER = tiny.task("another", n_train=60)
OPTIONS = list(TASK.spec.options)
ROWS = [dict(row.fields) for row in TASK.test[:7]]
TEXTS = [TASK.prompt(row) for row in TASK.test[:7]]
CONFIG = small_fit(n_prompts=8, n_queries=60)


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def icr(model, tokenizer):
    return InContextRouter.fit(model, tokenizer, [TASK], CONFIG)


@pytest.fixture
def routed(icr, model, tokenizer):
    with icr.attached(model, tokenizer) as attached:
        yield attached


def test_predictions_are_the_softmax_of_the_scores(routed):
    predictions = routed.predict(ROWS)
    shares = routed.score(TEXTS, OPTIONS).double().softmax(1)
    for prediction, row in zip(predictions, shares, strict=True):
        assert list(prediction.probabilities) == OPTIONS
        assert list(prediction.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert prediction.label == OPTIONS[int(row.argmax())]
        assert prediction.probability == max(prediction.probabilities.values())


def test_the_status_is_what_the_gate_said(routed):
    rows = ROWS + [{"text": f"quite{'!' * n} 7"} for n in range(1, 12)]
    prompts = [f"Review: {row['text']}\nSentiment:" for row in rows]
    vectors = routed.routing(prompts).routing_vector
    assert [each.status for each in routed.predict(rows)] == [
        "left alone" if not row.any() else "routed" for row in vectors
    ]


def test_where_no_prompt_is_known_all_are_left_alone(icr, model, tokenizer):
    numbers = replace(icr.gate.numbers, limits=(1e-9,))
    strict = replace(icr, gate=replace(icr.gate, numbers=numbers))
    with strict.attached(model, tokenizer) as attached:
        assert {each.status for each in attached.predict(ROWS)} == {"left alone"}
    with strict.attached(model, tokenizer, gate=False) as attached:
        assert {each.status for each in attached.predict(ROWS)} == {"routed"}
    with icr.attached(model, tokenizer, strength=0.0) as attached:
        assert {each.status for each in attached.predict(ROWS)} == {"left alone"}


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        tuple(ROWS),
        pandas.DataFrame(ROWS),
        [{"number": 3, **row, "label": "anything"} for row in ROWS],
    ],
    ids=["list", "tuple", "frame", "with further columns"],
)
def test_rows_may_come_as_they_are(rows, routed):
    assert routed.predict(rows) == routed.predict(ROWS)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rows_may_be_a_file(ending, routed, tmp_path):
    frame, path = pandas.DataFrame(ROWS), tmp_path / f"rows.{ending}"
    if ending == "csv":
        frame.to_csv(path, index=False)
    elif ending == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    assert routed.predict(path) == routed.predict(ROWS)


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"texts": "a joy"}, r"malformed: task 'toy' needs the fields \['text'\], missing here"),
        ({"text": " "}, "malformed: field 'text' must be a text that is not empty"),
        ({"text": True}, "malformed: field 'text' must be a text"),
        ({"text": "\udcff"}, "malformed: this row is not UTF-8 text"),
        ("a joy", "malformed: expected a dict of columns, got 'a joy'"),
        ({"text": "joy " * 600}, "too long"),
        ({"text": "x" * 200_000}, "too long"),
    ],
)
def test_a_row_that_does_not_fit_says_why_and_disturbs_no_other(row, status, routed):
    expected = routed.predict(ROWS)
    predictions = routed.predict([*ROWS[:3], row, *ROWS[3:]])
    bad = predictions.pop(3)
    assert predictions == expected
    assert bad.label is None
    assert bad.probability is None
    assert re.match(status, bad.status)


def test_a_prompt_that_an_option_merges_with_is_a_row_that_does_not_fit(routed):
    spec = TaskSpec("bare", "far", "{text}", tuple(OPTIONS))
    good, bad = {"text": "a joy :"}, {"text": "a joy "}
    first, second, third = routed.predict([good, bad, good], spec)
    assert second.status.startswith("malformed: a prompt needs no space at its end")
    assert first == third
    assert first.label in OPTIONS


def test_options_that_cannot_be_told_apart_are_said_for_each_row(routed):
    spec = TaskSpec("twice", "far", "{text}:", ("joyful", "joyless"))
    statuses = {each.status for each in routed.predict(ROWS[:2], spec)}
    assert len(statuses) == 1
    assert "share their first token" in statuses.pop()


def test_scores_that_are_not_finite_are_no_answer(routed, monkeypatch):
    from icrouting.routing import predictions as room

    plain = room.score

    def broken(*args, **kwargs):
        scores = plain(*args, **kwargs)
        scores[1, 0] = torch.nan
        return scores

    monkeypatch.setattr(room, "score", broken)
    statuses = [each.status for each in routed.predict(ROWS[:3])]
    assert statuses[1] == "not finite"
    assert "not finite" not in (statuses[0], statuses[2])


def test_no_rows_have_no_predictions(routed):
    assert routed.predict([]) == []


def test_of_several_sources_one_has_to_be_named(icr, model, tokenizer):
    sources = icr.description.sources
    both = (*sources, replace(sources[0], name="more", template="Text: {text}\nLabel:"))
    two = replace(icr, description=replace(icr.description, sources=both))
    with two.attached(model, tokenizer) as attached:
        with pytest.raises(ValueError, match=r"which task's template .* one of toy, more"):
            attached.predict(ROWS)
        with pytest.raises(ValueError, match=r"no task 'other' is known here.* toy, more"):
            attached.predict(ROWS, "other")
        plain = attached.score([f"Text: {row['text']}\nLabel:" for row in ROWS], OPTIONS)
        predictions = attached.predict(ROWS, "more")
    assert [OPTIONS.index(each.label) for each in predictions] == plain.argmax(1).tolist()


def test_a_router_of_an_earlier_version_asks_for_the_task(icr, model, tokenizer):
    old = replace(icr, description=replace(icr.description, sources=None))
    with old.attached(model, tokenizer) as attached:
        with pytest.raises(ValueError, match="an earlier version saved this: give the task"):
            attached.predict(ROWS)
        assert len(attached.predict(ROWS, TASK)) == len(ROWS)


def test_words_are_replaced_as_in_the_fit(model, tokenizer):
    spec = replace(TASK.spec, words={"text": {"A": "a joy", "B": "so dull"}})
    icr = InContextRouter.fit(model, tokenizer, [replace(TASK, spec=spec)], CONFIG)
    with icr.attached(model, tokenizer) as attached:
        assert attached.predict([{"text": "A"}]) == attached.predict([{"text": "a joy"}])


def test_a_source_whose_rows_bring_choices_gives_its_spec_back(routed):
    choices = "{text}\n{choices}\nAnswer ({letters}):"
    source = replace(routed.sources[0], template=choices, options=("A", "B", "C"))
    assert source.spec.options == ()
    row = {"text": "which", "choices": "joy|dull"}
    assert unlabelled(row, source.spec).choices == ("joy", "dull")
    with pytest.raises(ValueError, match=r"missing here: \['choices'\]"):
        unlabelled({"text": "which"}, source.spec)


def test_predictions_make_a_table(routed):
    table = pandas.DataFrame(routed.predict(ROWS))
    assert list(table.columns) == ["label", "probability", "status", "probabilities"]
    assert len(table) == len(ROWS)


def test_a_prediction_says_itself_in_a_line(routed):
    (prediction,) = routed.predict(ROWS[:1])
    assert repr(prediction).startswith(f"Prediction({prediction.label!r}, 0.")


# The same verbs for every saved method


@pytest.fixture(scope="module")
def settings(encoder_folder):
    return Settings(**SMALL, encoder=str(encoder_folder))


@pytest.fixture(scope="module", params=["probe-hidden", "prefix-tuning", "task-vectors-once"])
def method(request, settings, model, tokenizer):
    (made,) = make([request.param], settings)
    return fit_method(made, model, tokenizer, [TASK]).on(TASK)


def test_a_saved_method_predicts_by_the_scores_that_count(method, model, tokenizer, tmp_path):
    save_method(method, tmp_path)
    again = load_method(tmp_path, model, tokenizer)
    assert [task.spec for task in again.sources] == [TASK.spec]
    with again.attached(model, tokenizer, again.sources[0]) as attached:
        predictions = attached.predict(ROWS)
        shares = attached.score(TEXTS, OPTIONS).double().softmax(1)
    for prediction, row in zip(predictions, shares, strict=True):
        assert list(prediction.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert prediction.status == "answered"


def test_a_method_is_asked_inside_its_with(method, model, tokenizer):
    with method.attached(model, tokenizer, TASK):
        pass
    with pytest.raises(ValueError, match="is attached to no model"):
        method.predict(ROWS)


def test_a_probe_scores_prompts_by_itself(settings, model, tokenizer):
    (made,) = make(["probe-hidden"], settings)
    probe = fit_method(made, model, tokenizer, [TASK]).on(TASK)
    with probe.attached(model, tokenizer, TASK) as attached:
        found = attached.score(TEXTS, OPTIONS)
    expected = probe.adjusted(TASK, TASK.test[:7], found)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["few-shot", "calibration"])
def test_what_reads_rows_predicts_but_scores_no_bare_prompts(name, settings, model, tokenizer):
    (made,) = make([name], settings)
    made.fit(model, tokenizer, [], np.random.default_rng(0))
    with made.attached(model, tokenizer, TASK) as attached:
        assert {each.status for each in attached.predict(ROWS)} == {"answered"}
        with pytest.raises(ValueError, match="use `predict`"):
            attached.score(TEXTS, OPTIONS)


def test_a_method_scores_prompts_that_bring_options_of_their_own(settings, model, tokenizer):
    (made,) = make(["probe-hidden"], settings)
    probe = fit_method(made, model, tokenizer, [TASK]).on(TASK)
    three = ["dull", "joy", "good"]
    with probe.attached(model, tokenizer, TASK) as attached:
        shared = attached.score(TEXTS[:3], OPTIONS)
        scores = attached.score(TEXTS[:3], [OPTIONS, three, OPTIONS])
    assert torch.equal(scores[:, :2], shared)
    assert scores[:, 2].isneginf().all()
