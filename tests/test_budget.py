"""The minutes of a comparison."""

import json

import pytest

import tiny
from icrouting.comparing.budget import Budget, Sizes, sizes_of, timing_of, work_of
from icrouting.comparing.ladder import LADDER
from icrouting.methods.settings import COMPARED

SIZES = Sizes(n_train=67, n_validation=16, n_test=36, n_demos=20, router=2000.0)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_what_nothing_is_known_of_is_begun(tmp_path):
    budget = Budget(1, tmp_path / "spent.json", Clock())
    assert budget.expected(1e9) is None
    assert budget.has_room(1e9)


def test_a_unit_of_work_takes_what_those_before_took(tmp_path):
    budget = Budget(1, tmp_path / "spent.json", Clock())
    budget.note("zero-shot", 3.0, work=30.0)
    assert budget.expected(100.0) == pytest.approx(10.0)
    budget.note("icr", 17.0, work=70.0)
    assert budget.expected(100.0) == pytest.approx(20.0)


def test_work_is_begun_as_long_as_it_is_expected_to_end_in_time(tmp_path):
    clock = Clock()
    budget = Budget(1, tmp_path / "spent.json", clock)
    budget.note("zero-shot", 3.0, work=30.0)
    clock.now += 40
    assert budget.has_room(199.0)
    assert not budget.has_room(201.0)


def test_a_later_command_knows_the_pace_and_has_minutes_of_its_own(tmp_path):
    clock = Clock()
    budget = Budget(1, tmp_path / "spent.json", clock)
    budget.note("zero-shot", 3.0, work=30.0)
    clock.now += 3600
    later = Budget(1, tmp_path / "spent.json", clock)
    assert later.expected(10.0) == pytest.approx(1.0)
    assert later.has_room(10.0)
    assert not budget.has_room(10.0)


def test_a_fit_that_was_stopped_counts_for_no_pace(tmp_path):
    budget = Budget(1, tmp_path / "spent.json", Clock())
    budget.note("icr", 0.0, fit=50.0)
    assert budget.expected(10.0) is None
    assert json.loads((tmp_path / "spent.json").read_text())["icr"]["fit"] == 50.0


def test_every_method_of_the_ladder_has_work_and_more_rows_are_more_of_it():
    more = Sizes(n_train=670, n_validation=100, n_test=300, n_demos=20, router=20_000.0)
    for name in LADDER:
        assert 0 < work_of(name, SIZES, COMPARED) < work_of(name, more, COMPARED)
        assert timing_of(name, SIZES) > 0


def test_a_prompt_of_ones_own_is_taken_to_be_as_long_as_a_few_shot_one():
    assert work_of("prompt:mine", SIZES, COMPARED) == work_of("few-shot", SIZES, COMPARED)
    assert timing_of("prompt:mine", SIZES) == timing_of("few-shot", SIZES)


def test_sizes_are_those_of_the_task():
    task = tiny.task(n_train=40, n_test=12)
    assert sizes_of(task, COMPARED, 7.0) == Sizes(40, 6, 12, 10, 7.0)
