"""Shipped calibrations: what a prior is tied to, and that it answers for nothing else."""

import copy
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fitted
import tiny
from fitted import small_fit
from icrouting.decoder.scoring import score_options
from icrouting.icr import InContextRouter
from icrouting.routing.calibration import BatchCalibration, CalibrationStream
from icrouting.routing.gate import PromptGate
from icrouting.routing.shipped import known_specs, reading_of
from icrouting.tasks.task import TaskSpec, spec_among
from test_chat import CHATML, TURNS

TASK = tiny.task("toy", n_train=60, n_test=30)
ROWS = [dict(row.fields) for row in TASK.test]
TEXTS = [TASK.prompt(row) for row in TASK.test]
OPTIONS = list(TASK.spec.options)
MINE = TaskSpec("mine", "far", "Note: {text}\nMood:", ("good", "bad"))
FILE = "calibration.safetensors"


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def strict(model, tokenizer):
    config = small_fit(n_prompts=8, n_queries=60)
    return fitted.strict(InContextRouter.fit(model, tokenizer, [TASK], config))


def calibrated(icr, model, tokenizer, spec=MINE, **settings):
    with icr.attached(model, tokenizer, **settings) as routed:
        calibration, _ = routed.calibrate_task(ROWS, spec)
    return icr.with_calibration(calibration)


@pytest.fixture(scope="module")
def safe(strict, model, tokenizer):
    return calibrated(strict, model, tokenizer)


@pytest.fixture
def saved(safe, tmp_path):
    safe.save_pretrained(tmp_path / "safe")
    return tmp_path / "safe"


def statuses(icr, model, tokenizer, spec=MINE, **settings):
    with icr.attached(model, tokenizer, **settings) as routed:
        return {each.status for each in routed.predict(ROWS, spec)}


def rewritten(file, change):
    """The file with its list of priors, and other metadata, changed."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    entries = json.loads(metadata["priors"])
    change(metadata, entries)
    save_file(tensors, file, {**metadata, "priors": json.dumps(entries)})


def loaded_or_refusal(folder):
    try:
        return InContextRouter.from_pretrained(folder)
    except ValueError as error:
        return error


# -- the gate


def with_other_gate(icr):
    """The router with another gate that knows no prompt either."""
    states = icr.gate.states + 1.0
    return replace(icr, gate=PromptGate(states, icr.gate.numbers))


def test_a_prior_by_one_gate_is_not_that_of_another(safe, model, tokenizer, tmp_path, caplog):
    other = with_other_gate(safe)
    assert statuses(safe, model, tokenizer) == {"calibrated"}
    assert statuses(other, model, tokenizer) == {"left alone"}
    other.save_pretrained(tmp_path)
    assert InContextRouter.from_pretrained(tmp_path).calibrations == ()
    assert "left out the prior of 'mine'" in caplog.text


def test_scores_by_one_gate_of_the_users_own_are_not_calibrated_by_another(
    strict, model, tokenizer
):
    def shut(hidden):
        return torch.zeros(len(hidden))

    def half(hidden):
        return torch.full((len(hidden),), 0.5)

    with strict.attached(model, tokenizer, gate=shut) as routed:
        calibration = routed.calibrate(TEXTS, OPTIONS)
        routed.score(TEXTS, OPTIONS, calibration=calibration)
    with (
        strict.attached(model, tokenizer, gate=half) as routed,
        pytest.raises(ValueError, match="estimate it with what answers"),
    ):
        routed.score(TEXTS, OPTIONS, calibration=calibration)


def test_a_file_that_does_not_name_its_gate_is_of_the_one_beside_it(saved, safe, model, tokenizer):
    def as_before(metadata, entries):
        del metadata["sha256"]
        entries[0]["made_of"] = entries[0]["made_of"].rpartition(" ")[0]

    rewritten(saved / FILE, as_before)
    again = InContextRouter.from_pretrained(saved)
    assert again == safe
    assert statuses(again, model, tokenizer) == {"calibrated"}


def test_a_prior_of_another_strength_stands_beside_the_first(safe, model, tokenizer):
    both = calibrated(safe, model, tokenizer, strength=0.5)
    assert len(both.calibrations) == 2
    assert statuses(both, model, tokenizer) == {"calibrated"}
    assert statuses(both, model, tokenizer, strength=0.5) == {"calibrated"}
    assert statuses(both, model, tokenizer, strength=0.25) == {"left alone"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_moves_a_prior_by_next_to_nothing(strict, model, tokenizer, dtype):
    priors = []
    for each in (model, copy.deepcopy(model).to(dtype)):
        scores = score_options(each, tokenizer, TEXTS, OPTIONS)
        priors.append(BatchCalibration.of(scores, OPTIONS).log_prior)
    spread = score_options(model, tokenizer, TEXTS, OPTIONS).diff(dim=1).std()
    assert (priors[1] - priors[0]).abs().max() < 0.01 * spread


# -- how options are scored


def test_scores_of_another_kind_get_no_prior(strict, model, tokenizer):
    stream = CalibrationStream()
    with strict.attached(model, tokenizer) as routed:
        calibration = routed.calibrate(TEXTS, OPTIONS, label_scoring="sum")
        routed.score(TEXTS, OPTIONS, label_scoring="sum", calibration=calibration)
        routed.score(TEXTS, OPTIONS, calibration=stream)
        for other in ("first", "mean"):
            with pytest.raises(ValueError, match="estimate it with what answers"):
                routed.score(TEXTS, OPTIONS, label_scoring=other, calibration=calibration)
        with pytest.raises(ValueError, match="begin another"):
            routed.score(TEXTS, OPTIONS, label_scoring="mean", calibration=stream)


@pytest.mark.parametrize("label_scoring", ["sum", "mean"])
def test_a_task_scored_otherwise_ships_its_prior(strict, model, tokenizer, tmp_path, label_scoring):
    spec = replace(MINE, options=("good", "bad bad"), label_scoring=label_scoring)
    calibrated(strict, model, tokenizer, spec).save_pretrained(tmp_path)
    again = InContextRouter.from_pretrained(tmp_path)
    assert statuses(again, model, tokenizer, spec) == {"calibrated"}
    other = replace(spec, label_scoring="first")
    assert statuses(again, model, tokenizer, other) == {"left alone"}


# -- chats


def in_chat(template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_chats_that_another_template_words_get_no_prior(strict, model, tmp_path):
    spec = replace(MINE, chat=True)
    calibrated(strict, model, in_chat(CHATML), spec).save_pretrained(tmp_path)
    again = InContextRouter.from_pretrained(tmp_path)
    assert statuses(again, model, in_chat(CHATML), spec) == {"calibrated"}
    with pytest.warns(UserWarning, match="chats that another chat template worded"):
        assert statuses(again, model, in_chat(TURNS), spec) == {"left alone"}
    both = calibrated(again, model, in_chat(TURNS), spec)
    for template in (CHATML, TURNS):
        assert statuses(both, model, in_chat(template), spec) == {"calibrated"}


def test_a_template_is_of_no_account_where_there_is_no_chat(safe, model):
    assert statuses(safe, model, in_chat(TURNS)) == {"calibrated"}


def conversations(texts):
    return [[{"role": "user", "content": text}] for text in texts]


def test_scores_of_chats_are_calibrated_by_chats_of_their_template(strict, model):
    chats = conversations(TEXTS)
    with strict.attached(model, in_chat(CHATML)) as routed:
        calibration = routed.calibrate(chats, OPTIONS)
        routed.score(chats, OPTIONS, calibration=calibration)
        with pytest.raises(ValueError, match="on chats worded by template"):
            routed.score(TEXTS, OPTIONS, calibration=calibration)
    with (
        strict.attached(model, in_chat(TURNS)) as routed,
        pytest.raises(ValueError, match="on chats worded by template"),
    ):
        routed.score(chats, OPTIONS, calibration=calibration)


def test_chats_of_several_tasks_are_warned_of(strict, model):
    others = [f"Text: {number}\nTopic:" for number in range(10)]
    with strict.attached(model, in_chat(CHATML)) as routed:
        with pytest.warns(UserWarning, match="end in 2 ways"):
            routed.calibrate(conversations([*TEXTS, *others]), OPTIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            routed.calibrate(conversations(TEXTS), OPTIONS)


# -- names


def test_a_task_named_like_a_source_of_another_template_is_refused(strict, model, tokenizer):
    spec = replace(MINE, name="toy")
    with pytest.raises(ValueError, match=r"'toy' is known here already and reads otherwise"):
        calibrated(strict, model, tokenizer, spec)


def test_two_templates_of_one_name_are_refused(safe, model, tokenizer):
    turned = replace(MINE, options=("bad", "good"))
    with pytest.raises(ValueError, match="give this one a name of its own"):
        calibrated(safe, model, tokenizer, turned)


def test_where_two_templates_have_a_name_it_stands_for_none(safe, model, tokenizer):
    """As files of an earlier version may have it."""
    (calibration,) = safe.calibrations
    named = replace(calibration, spec=replace(MINE, name="toy"))
    both = replace(safe, calibrations=(named,))
    with both.attached(model, tokenizer) as routed:
        with pytest.raises(ValueError, match="2 templates are known here as 'toy'"):
            routed.predict(ROWS, "toy")
        predictions = routed.predict(ROWS, named.spec)
    assert {each.status for each in predictions} == {"calibrated"}


def test_a_source_that_is_calibrated_is_known_once(strict, model, tokenizer):
    (source,) = strict.description.sources
    assert reading_of(source.spec) == reading_of(TASK.spec)
    both = calibrated(strict, model, tokenizer, TASK.spec)
    specs = known_specs(both.description.sources, both.calibrations)
    assert spec_among("toy", specs) == source.spec
    assert len(specs) == 1


# -- the file


def test_a_changed_byte_of_the_file_is_refused_or_changes_no_prior(saved, safe):
    file = saved / FILE
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    n_refused = 0
    # The length of the header, the header and the numbers.
    for place in [0, *rng.integers(len(whole), size=60).tolist(), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(7))
        file.write_bytes(damaged)
        again = loaded_or_refusal(saved)
        assert again == safe or FILE in str(again)
        n_refused += isinstance(again, ValueError)
    assert n_refused > 50


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata, entries: metadata.update(format="2"),
        lambda metadata, entries: entries[0].update(colour="red"),
        lambda metadata, entries: entries[0]["spec"].update(colour="red"),
        lambda metadata, entries: entries[0].update(way="softly"),
        lambda metadata, entries: entries[0].update(options=["good"]),
        lambda metadata, entries: entries.append(entries[0]),
        lambda metadata, entries: metadata.update(sha256="0"),
    ],
)
def test_what_another_version_wrote_is_refused(saved, change):
    def without_digest(metadata, entries):
        metadata.pop("sha256")
        change(metadata, entries)

    rewritten(saved / FILE, without_digest)
    with pytest.raises(ValueError, match=FILE):
        InContextRouter.from_pretrained(saved)


def test_a_file_without_chats_says_nothing_of_templates(saved):
    with safe_open(saved / FILE, "pt") as opened:
        (entry,) = json.loads(opened.metadata()["priors"])
    assert set(entry) == {"spec", "options", "way", "made_of"}


# -- prompts


def test_one_prompt_many_times_says_as_little_as_once(strict, model, tokenizer):
    with strict.attached(model, tokenizer) as routed:
        with pytest.raises(ValueError, match="1 prompts of one list of options that differ"):
            routed.calibrate_task(ROWS[:1] * 20, MINE)
        with pytest.raises(ValueError, match="1 prompts say nothing"):
            routed.calibrate(TEXTS[:1] * 20, OPTIONS)


def test_rows_of_choices_that_are_one_prompt_get_no_prior(strict, model, tokenizer):
    spec = TaskSpec("choices", "far", "Question: {text}\n{choices}\nAnswer:", label_scoring="sum")
    rows = [{**row, "choices": ["red", "blue"]} for row in ROWS]
    rows += [{"text": "the same", "choices": ["red", "blue", "green"]}] * 9
    with strict.attached(model, tokenizer) as routed:
        calibration, _ = routed.calibrate_task(rows, spec)
    assert [prior.options for prior in calibration.by_options] == [("A", "B")]
