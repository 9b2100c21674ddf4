"""A comparison of methods on one task, on tiny models."""

import json

import pytest

import tiny
from fitted import small_fit
from icrouting.comparing.comparison import compare
from icrouting.comparing.ladder import LADDER, LIMITS, ladder, limit_of
from icrouting.config import FitConfig
from icrouting.evaluation import records
from icrouting.evaluation.evaluate import Evaluation
from icrouting.icr import InContextRouter
from icrouting.methods import Settings
from icrouting.report import page

# Whoever makes one takes seconds.
pytestmark = pytest.mark.slow

SMALL = Settings(
    demos_per_class=2, i2cl_epochs=1, tries=1, train_rows=40, train_epochs=1, encoder="hidden"
)
FIT = small_fit(layers=None, n_prompts=4, n_queries=8, rank=2, hidden_width=5)
QUICK = ("zero-shot", "calibration", "few-shot", "probe-hidden", "icr")
PAIR = ("zero-shot", "probe-hidden")


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama")


def run(model, out, methods=PAIR, lines=None, **changes):
    say = [].append if lines is None else lines.append
    arguments = {"settings": SMALL, "fit": FIT, "methods": methods, "say": say} | changes
    task = arguments.pop("task", tiny.task("tickets", n_test=20))
    return compare(task, model, tiny.tokenizer(), out, **arguments)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A comparison that ended, with its lines of progress; only to be read."""
    folder = tmp_path_factory.mktemp("comparison") / "run"
    lines = []
    return run(model, folder, QUICK, lines), lines


def test_every_method_has_a_line_in_order_of_cost(whole):
    found, lines = whole
    assert [line.method for line in found.board.lines] == list(QUICK)
    assert [line.split(":")[0] for line in lines] == [
        *("zero-shot", "calibration", "few-shot", "probe-hidden", "ICR")
    ]
    assert all(" % (" in line and " ms a prompt" in line for line in lines)
    assert "fit " in lines[3]
    assert "fit " in lines[4]


def test_a_line_has_what_a_method_costs(whole):
    found, _ = whole
    lines = {line.method: line for line in found.board.lines}
    assert lines["zero-shot"].ratio == 1.0
    assert all(line.ratio is not None for line in lines.values())
    assert [lines[name].labelled for name in QUICK[:4]] == [0, 0, 4, 40]
    assert lines["few-shot"].n_cached > lines["probe-hidden"].n_cached > 0
    assert lines["icr"].fit_seconds is not None


def test_the_answer_names_the_recommended_method_and_its_rows(whole):
    found, _ = whole
    assert found.board.recommendation.method in found.answer
    assert "20 held-back rows" in found.answer
    # A full stop behind a sentence; those of numbers have digits behind them.
    assert found.answer.count(". ") == 1


def test_the_files_hold_the_answer_and_every_method(whole):
    found, _ = whole
    text = (found.folder / "compare.md").read_text()
    assert found.answer in text
    content = json.loads((found.folder / "compare.json").read_text())
    assert content["answer"] == found.answer
    assert {"command", "commit", "seed", "versions", "model"} <= content.keys()
    assert [line["method"] for line in content["lines"]] == list(QUICK)
    for line in found.board.lines:
        assert line.limit in text


def test_the_run_is_one_whose_report_can_be_made_again(whole):
    found, _ = whole
    kept = (found.folder / "report.md").read_text()
    report = page.write(found.folder)
    assert (found.folder / "report.md").read_text() == kept
    assert not report.summary.unfinished
    assert report.run.router == InContextRouter.from_pretrained(found.folder / "router").digest()


def test_the_same_call_computes_nothing_again(whole, model, monkeypatch):
    found, _ = whole
    before = (found.folder / "records.jsonl").read_bytes()
    monkeypatch.setattr(Evaluation, "predict", None)
    monkeypatch.setattr(InContextRouter, "fit", None)
    again = run(model, found.folder, QUICK)
    assert (found.folder / "records.jsonl").read_bytes() == before
    assert again.answer == found.answer
    assert again.board == found.board


def test_a_comparison_that_was_stopped_goes_on(whole, model, tmp_path, monkeypatch):
    def stopped(*arguments, **more):
        raise KeyboardInterrupt

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(InContextRouter, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "run", QUICK, lines)
    assert len(lines) == 4
    n_before = len(records.read(tmp_path / "run" / "records.jsonl"))
    assert n_before == 4 * 20
    again = run(model, tmp_path / "run", QUICK)
    found, _ = whole
    shares = [line.accuracy for line in again.board.lines]
    assert shares == [line.accuracy for line in found.board.lines]
    assert again.board.recommendation == found.board.recommendation


def test_a_further_method_joins_a_comparison_in_its_place(model, tmp_path):
    run(model, tmp_path / "run")
    lines = []
    found = run(model, tmp_path / "run", ("calibration", *PAIR), lines)
    assert [line.method for line in found.board.lines] == ["zero-shot", "calibration", PAIR[1]]


def test_without_time_zero_shot_alone_is_measured_and_the_rest_is_named(model, tmp_path):
    lines = []
    found = run(model, tmp_path / "run", QUICK, lines, minutes=1e-9)
    assert [line.method for line in found.board.lines] == ["zero-shot"]
    assert list(found.board.missed) == list(QUICK[1:])
    assert all(seconds > 0 for seconds in found.board.missed.values())
    assert "Not run, for lack of time: calibration (about" in found.answer
    assert "was not run: about" in (found.folder / "compare.md").read_text()
    assert "not run" in lines[-1]
    # The same command goes on, with minutes of its own.
    again = run(model, tmp_path / "run", PAIR)
    assert [line.method for line in again.board.lines] == list(PAIR)


def test_a_router_that_reads_the_hidden_state_is_not_said_to_need_an_encoder(whole):
    found, _ = whole
    assert "encoder" not in found.board.line("icr").limit
    assert "encoder" not in limit_of("icr", "constant:hidden")
    assert limit_of("icr", "pinned:minilm").endswith("needs a sentence encoder beside the model")


def test_a_method_that_does_not_fit_is_named_with_its_reason(model, tmp_path):
    found = run(model, tmp_path / "run", ("zero-shot", "probe-encoder"))
    assert "names none" in found.board.refused["probe-encoder"]
    assert "does not fit: it reads by" in (found.folder / "compare.md").read_text()


def test_a_router_that_cannot_be_fitted_leaves_the_other_methods(model, tmp_path):
    wrong = FitConfig(layers=(90,), encoder="hidden")
    found = run(model, tmp_path / "run", ("icr", "calibration"), fit=wrong)
    assert "icr" in found.board.refused
    assert [line.method for line in found.board.lines] == ["zero-shot", "calibration"]


def test_a_folder_of_other_rows_is_refused(model, tmp_path):
    run(model, tmp_path / "run", ("zero-shot",))
    with pytest.raises(ValueError, match="holds another run"):
        run(model, tmp_path / "run", task=tiny.task("tickets", n_test=21))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0.0}, "above 0"),
        ({"methods": ("few-short",)}, "few-shot"),
        ({"settings": Settings(router="somewhere")}, "leave router out"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_ladder_has_what_was_asked_for_in_its_order_and_the_baseline_first():
    task = tiny.task()
    assert ladder(task) == list(LADDER)
    assert ladder(task, ["icr", "icv", "few-shot"]) == ["zero-shot", "few-shot", "icr", "icv"]
    assert set(LIMITS) == set(LADDER)
