"""The last lines of a fit."""

import dataclasses
import shlex

import pytest

import tiny
from commands import fit
from icrouting import FitConfig
from icrouting.cli import ending
from icrouting.decoder.backbone import Backbone
from icrouting.evaluation.records import BASELINE, Record
from icrouting.fitting.account import Account
from icrouting.fitting.validation import Look


@pytest.fixture
def words(world, encoder_folder, tmp_path, capsys):
    """What a fit prints that is checked on seven held-back rows."""
    fit(world, encoder_folder, tmp_path / "router", "--check", "7", "--min-steps", "3")
    # A console's lines are as wide as the terminal.
    return " ".join(capsys.readouterr().out.split())


def test_a_fit_ends_with_what_was_learned_and_what_it_does_on_held_back_rows(words):
    assert "learned from 9 of 32 rows of sst2" in words
    assert "trained for all 3 steps" in words
    assert "sst2 │ 7" in words
    assert "next: icr eval --router" in words


@pytest.mark.slow
def test_a_fit_that_was_finished_before_is_not_asked_again(
    world, encoder_folder, tmp_path, capsys, monkeypatch
):
    fit(world, encoder_folder, tmp_path / "router")
    monkeypatch.setattr(ending, "_answers", lambda *args: pytest.fail("asked again"))
    fit(world, encoder_folder, tmp_path / "router", "--check", "7")
    assert "holds this router already" in " ".join(capsys.readouterr().out.split())


def test_a_negative_number_of_held_back_rows_is_refused(world, encoder_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(world, encoder_folder, tmp_path / "router", "--check", "-1")
    assert "check must be a number of rows, 0 or more, got -1" in capsys.readouterr().err


def test_the_next_command_names_what_the_fit_was_told():
    asked = ["--data", "my data", "--tasks", "sst2", "own.toml"]
    measured, answered = ending.next_commands("out", Backbone("pinned:smollm2-135m"), asked)
    assert shlex.split(measured)[:4] == ["icr", "eval", "--router", "out"]
    assert "--model pinned:smollm2-135m --data 'my data' --tasks sst2 own.toml" in measured
    assert shlex.split(answered)[:4] == ["icr", "predict", "out", "rows.csv"]


def record(method, index, is_right):
    return Record(method, "toy", 0, index, 1, int(is_right), (0.0, 1.0), 5, 0.1)


def test_accuracies_and_gain_are_those_of_the_same_rows():
    plain = [record(BASELINE, index, index < 2) for index in range(10)]
    routed = [record(ending.ROUTED, index, index < 8) for index in range(10)]
    (line,) = ending._lines({BASELINE: plain, ending.ROUTED: routed}, ["toy"])
    name, before, after, gain = line
    assert (name, before, after, gain.value, gain.n) == ("toy", 0.2, 0.8, pytest.approx(0.6), 10)
    assert gain.low < 0.6 < gain.high


def test_rows_that_were_left_out_are_counted():
    task = dataclasses.replace(tiny.task(), n_dropped=3)
    config = FitConfig(min_steps=0, patience=0)
    assert "40 rows of toy (3 more repeat" in ending.learned_from([task], config)


def test_rows_of_a_slice_too_small_to_validate_on_are_counted_as_learned_from():
    config = FitConfig(min_steps=30, patience=2)
    assert "46 rows of toy" in ending.learned_from([tiny.task()], config)


def account(**changes):
    looks = {"kept": Look(80, 0.5, 0.75), "last": Look(130, 0.6, 0.7)}
    return Account(**{"step": 130, "n_steps": 300, "n_held": 20, **looks, **changes})


def test_an_account_says_that_training_stopped_and_which_router_is_kept():
    text = account().in_words()
    assert "130 of at most 300 steps" in text
    assert "the router of step 80 is kept, validation loss 0.500, accuracy 75% of 20 rows" in text


def test_an_account_of_a_training_to_the_end_says_that_the_last_router_is_kept():
    text = account(step=300, kept=None).in_words()
    assert "all 300 steps; the last router is kept, validation loss 0.600" in text


def test_an_account_without_validation_says_why():
    text = account(step=300, kept=None, last=None, n_held=0).in_words()
    assert text.endswith("too few validation rows to judge it on")


def test_a_checkpoint_of_an_earlier_version_has_no_account(tmp_path):
    assert Account.of(tmp_path) is None
