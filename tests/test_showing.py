"""What objects show of themselves, and that no digest moves with it."""

import sys

import pytest

import icrouting
import tiny
from fitted import small_fit
from icrouting import PAPER, Example, FitConfig, InContextRouter, Task, TaskSpec
from icrouting.cli import main
from icrouting.methods import Settings, make
from icrouting.runtime.showing import in_short, ranges
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import rows_digest

TEMPLATE = 'It\'s {text}\n"Team":'
SPEC = TaskSpec("tickets", "far", TEMPLATE, ("Access", "Hard\tware"), {"text": {"a": "b"}})
ROWS = (
    Example({"text": "l\N{LATIN SMALL LETTER O WITH DIAERESIS}st 'my' \"key\""}, (), 0),
    Example({"text": "\n"}, ("x", "y's"), 1),
)


def test_digests_of_rows_are_those_that_folders_of_earlier_versions_hold():
    task = Task(SPEC, ROWS, ROWS[:1])
    other = Task(TaskSpec("q", "near", "{q}{choices}"), ROWS[1:], ROWS, ROWS)
    assert rows_digest([task]) == "7e5481c3926d6829"
    assert rows_digest([other]) == "927ae8fb02d948fb"
    assert rows_digest([task, other]) == "e741f9c0615ce02f"


def test_a_task_shows_counts_in_place_of_its_rows():
    task = Task(SPEC, ROWS * 500, ROWS, n_dropped=3)
    shown = repr(task)
    assert "1000 train, 0 validation, 2 test, 3 left out" in shown
    assert len(shown) < 200


def test_an_example_shows_the_beginning_of_its_texts():
    assert repr(Example({"text": "a joy"}, (), 1)) == "Example({'text': 'a joy'}, label=1)"
    assert len(repr(Example({"text": "long " * 1000}, (), 1))) < 120
    assert "choices=('x', \"y's\")" in repr(ROWS[1])


def test_many_options_are_shown_by_the_first_and_their_number():
    spec = TaskSpec("banking", "far", "{text}:", tuple(f"option {i}" for i in range(77)))
    assert "'option 5', ... 77 in all)" in repr(spec)
    assert in_short(("a",)) == "('a')"


def test_settings_show_what_differs_from_the_defaults():
    assert repr(FitConfig()) == "FitConfig()"
    assert repr(FitConfig(rank=4, lr=0.5)) == "FitConfig(rank=4, lr=0.5)"
    assert repr(Settings(tries=2)) == "Settings(tries=2)"
    namespace = {"FitConfig": FitConfig}
    assert eval(repr(PAPER), namespace) == PAPER


def test_a_router_shows_its_model_tasks_layers_rank_and_digest(saved_router):
    icr = InContextRouter.from_pretrained(saved_router)
    shown = repr(icr)
    for said in ("Qwen2ForCausalLM", "fitted on toy", "layers 3-4", "rank 3", icr.digest()):
        assert said in shown
    for part in (icr.pids, icr.description):
        assert len(repr(part)) < 300


def test_an_attached_model_and_a_method_show_what_they_are_in_one_line():
    model = tiny.model("llama")
    task = tiny.task()
    tokenizer = tiny.tokenizer()
    config = small_fit(layers=(3,), rank=2, n_prompts=4, n_queries=4, demos_per_class=5)
    icr = InContextRouter.fit(model, tokenizer, [task], config)
    with icr.attached(model, tokenizer, strength=0.5) as routed:
        assert "layers 3, strength 0.5" in repr(routed)
        routing = routed.routing([task.prompt(row) for row in task.test[:3]])
        assert repr(routing).startswith("Routing(queries: 3, 1 layers, rank 2")
    (method,) = make(["zero-shot"], Settings())
    assert repr(method) == "ZeroShot('zero-shot', not fitted)"


def test_a_prompt_shows_the_size_of_its_context():
    assert repr(Prompt("", "Review:")) == "Prompt('Review:')"
    assert repr(Prompt("a" * 5000, "b:")) == "Prompt(5,000 characters of context, 'b:')"


@pytest.mark.parametrize(
    ("numbers", "said"), [((), ""), ((3,), "3"), ((3, 20, 21, 22), "3, 20-22")]
)
def test_numbers_that_follow_one_another_are_a_range(numbers, said):
    assert ranges(numbers) == said


def test_the_front_door_lists_its_names_and_its_version():
    assert set(icrouting.__all__) <= set(dir(icrouting))
    assert icrouting.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = icrouting.Nothing


@pytest.mark.parametrize("is_argument", [True, False])
def test_the_command_says_its_version(is_argument, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["icr", "--version"])
    main.main(["--version"] if is_argument else None)
    assert capsys.readouterr().out == f"icr {icrouting.__version__}\n"
