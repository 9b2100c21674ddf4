"""What a comparison saves of its winner answers as it did."""

import json
from dataclasses import replace

import pytest

import tiny
from fitted import SMALL, fit_method, small_fit
from icrouting.comparing import winner
from icrouting.comparing.comparison import Comparison
from icrouting.evaluation.predictor import Predictor
from icrouting.icr import InContextRouter
from icrouting.methods import Settings, make
from icrouting.methods.saved import load_method
from icrouting.tasks.task import NamedPrompt
from test_chat import speaking

TASK = tiny.task("tickets")
ROWS = [dict(example.fields) for example in TASK.test]


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


def fitted(model, tokenizer, name, **settings):
    (method,) = make([name], Settings(**(SMALL | settings)))
    return fit_method(method, model, tokenizer, [TASK]).on(TASK)


def labels_of(method):
    with method.attached(method.model, method.tokenizer, TASK) as attached:
        return [prediction.label for prediction in attached.predict(ROWS)]


@pytest.mark.parametrize("name", ["probe-hidden", "task-vectors", "prefix-tuning"])
def test_a_saved_winner_answers_as_it_did(model, tokenizer, tmp_path, name):
    method = fitted(model, tokenizer, name)
    winner.save(tmp_path / "winner", method, TASK, None)
    loaded = load_method(tmp_path / "winner", model, tokenizer)
    assert labels_of(loaded) == labels_of(method)


@pytest.mark.parametrize("name", ["zero-shot", "few-shot", "calibration", "probe-hidden", "i2cl"])
def test_a_prediction_is_what_the_evaluation_has_of_the_row(model, tokenizer, tmp_path, name):
    method = fitted(model, tokenizer, name)
    indices = range(len(TASK.test))
    answers = Predictor(method.decoder).predict(method, TASK, list(indices), seed=0)
    comparison = Comparison(tmp_path, None, "", method, TASK)
    predictions = comparison.predict(ROWS)
    options = TASK.spec.options
    assert [each.label for each in predictions] == [options[each.prediction] for each in answers]
    assert comparison.predict([]) == []
    assert comparison.predict([{"txt": "b"}])[0].status.startswith("malformed")


def test_a_routers_winner_is_a_router(model, tokenizer, tmp_path):
    config = small_fit(layers=None, n_prompts=4, n_queries=8, rank=2)
    icr = InContextRouter.fit(model, tokenizer, [TASK], config)
    icr.save_pretrained(tmp_path / "router")
    method = fitted(model, tokenizer, "icr", router=str(tmp_path / "router"))
    winner.save(tmp_path / "winner", method, TASK, icr)
    loaded = InContextRouter.from_pretrained(tmp_path / "winner")
    assert loaded == icr


def test_what_learns_nothing_leaves_its_prompt(model, tokenizer, tmp_path):
    method = fitted(model, tokenizer, "few-shot")
    winner.save(tmp_path / "winner", method, TASK, None)
    (file,) = (tmp_path / "winner").iterdir()
    note = json.loads(file.read_text())
    assert note["template"] == TASK.spec.template
    assert note["context"] + TASK.prompt(TASK.test[0]) == method.prompt(TASK, TASK.test[0]).text
    assert note["context"].count("Review:") == 4


def note_of(model, tokenizer, name, task):
    (method,) = make([name], Settings())
    method = fit_method(method, model, tokenizer, [task])
    return method, winner._note(method, task.bound_to(tokenizer))


def test_a_prompt_of_ones_own_is_noted_as_it_asks(model, tokenizer):
    prompt = NamedPrompt("prod", "You rate films. Film: {text}\nVerdict:")
    spec = replace(TASK.spec, prompts=(prompt,), label_scoring="sum")
    task = replace(TASK, spec=spec)
    method, note = note_of(model, tokenizer, "prompt:prod", task)
    example = task.test[0]
    asked = note["context"] + note["template"].format(**example.fields)
    assert asked == method.prompt(task, example).text
    assert note["label_scoring"] == "sum"


def test_the_note_says_how_a_chat_is_asked(model):
    prompt = NamedPrompt("prod", "Film: {text}", chat=True, system="Rate films.")
    task = replace(TASK, spec=replace(TASK.spec, prompts=(prompt,)))
    _, note = note_of(model, speaking(), "prompt:prod", task)
    assert (note["chat"], note["system"]) == (True, "Rate films.")
    _, plain_note = note_of(model, speaking(), "zero-shot", task)
    assert (plain_note["chat"], plain_note["system"]) == (False, "")


def test_a_later_winner_takes_the_place_of_an_earlier_one(model, tokenizer, tmp_path):
    winner.save(tmp_path / "winner", fitted(model, tokenizer, "probe-hidden"), TASK, None)
    winner.save(tmp_path / "winner", fitted(model, tokenizer, "zero-shot"), TASK, None)
    assert [file.name for file in (tmp_path / "winner").iterdir()] == ["winner.json"]


def test_somebody_elses_folder_is_left_alone(model, tokenizer, tmp_path):
    (tmp_path / "winner").mkdir()
    (tmp_path / "winner" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no earlier winner"):
        winner.save(tmp_path / "winner", fitted(model, tokenizer, "zero-shot"), TASK, None)
    assert (tmp_path / "winner" / "notes.txt").read_text() == "mine"
