import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest

from fake_run import fake_config, fake_records, record
from icrouting.cli import main
from icrouting.evaluation import answers, records
from icrouting.evaluation.runs import command
from icrouting.report import page as report
from icrouting.runtime.storage import load_json, save_json

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PUBLISHED = sorted(RESULTS.glob("*/answers.json"))
FIELDS = ("label", "prediction", "n_tokens", "seconds")


@pytest.fixture
def lines():
    """A run's records; one seed of ICR has answered two items only."""
    accuracies = {(m, t["name"]): 0.6 for m in ("zero-shot", "icr") for t in fake_config()["tasks"]}
    ragged = [record(index, method="icr", seed=2, is_right=index % 3 > 0) for index in (29, 4)]
    return [*fake_records(accuracies), *ragged]


@pytest.fixture
def run(tmp_path, lines):
    folder = tmp_path / "run"
    folder.mkdir()
    save_json(folder / "config.json", fake_config())
    records.append(folder / "records.jsonl", lines)
    return folder


def by_key(folder):
    return {one.key: one for one in records.read(folder / "records.jsonl")}


def drop_logits(file):
    """Makes of a file of answers what was written before logits were kept."""
    content = load_json(file)
    for cells_by_task in content["answers"].values():
        for cells_by_seed in cells_by_task.values():
            for cell in cells_by_seed.values():
                del cell["logits"]
    save_json(file, content)


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main.main(["report", *map(str, arguments)])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.slow
def test_a_run_made_again_of_its_kept_answers_reports_what_it_did(
    run, tmp_path, lines, with_logits
):
    answers.keep(run, tmp_path / "out", "icr report")
    if not with_logits:
        drop_logits(tmp_path / "out" / "answers.json")
    answers.restore(tmp_path / "out", tmp_path / "again")
    again = by_key(tmp_path / "again")
    assert {key: [getattr(one, name) for name in FIELDS] for key, one in again.items()} == {
        one.key: [getattr(one, name) for name in FIELDS] for one in lines
    }
    pages = [report.write(tmp_path / name).summary.lines for name in ("run", "again")]
    pd.testing.assert_frame_equal(*pages)
    assert (tmp_path / "run" / "report.csv").read_text() == (
        tmp_path / "again" / "report.csv"
    ).read_text()
    with pytest.raises(ValueError, match="already"):
        answers.restore(tmp_path / "out", tmp_path / "run")


def test_kept_logits_come_back_to_three_decimals(run, tmp_path, lines):
    answers.keep(run, tmp_path / "out", "icr report")
    answers.restore(tmp_path / "out", tmp_path / "again")
    again = by_key(tmp_path / "again")
    for line in lines:
        assert again[line.key].option_logits == pytest.approx(line.option_logits, abs=5.001e-4)
        assert all(round(logit, 3) == logit for logit in again[line.key].option_logits)


def test_answers_without_logits_restore_and_are_kept_again(run, tmp_path):
    """A run that goes on from such answers has logits of its new items alone."""
    answers.keep(run, tmp_path / "out", "icr report")
    drop_logits(tmp_path / "out" / "answers.json")
    answers.restore(tmp_path / "out", tmp_path / "again")
    assert all(
        math.isnan(x) for one in by_key(tmp_path / "again").values() for x in one.option_logits
    )
    more = record(7, method="icr", seed=2)
    records.append(tmp_path / "again" / "records.jsonl", [more])
    answers.keep(tmp_path / "again", tmp_path / "out again", "icr report")
    answers.restore(tmp_path / "out again", tmp_path / "third")
    third = by_key(tmp_path / "third")
    with_logits = {key for key, one in third.items() if not math.isnan(one.option_logits[0])}
    assert with_logits == {more.key}
    assert third[more.key].option_logits == more.option_logits


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
@pytest.mark.slow
def test_the_published_answers_are_those_of_the_published_tables(file):
    rights_by_cell = defaultdict(list)
    for one in answers.read_records(file):
        rights_by_cell[one.task, one.method].append(one.label == one.prediction)
    table = pd.read_csv(file.parent / "report.csv").query("kind == 'task'")
    published = table.set_index(["name", "method"]).accuracy.to_dict()
    accuracies = {cell: fmean(rights) for cell, rights in rights_by_cell.items()}
    assert accuracies == pytest.approx(published)


@pytest.mark.slow
def test_the_command_keeps_a_runs_answers_and_makes_the_run_of_them_again(run, tmp_path, capsys):
    published, again = tmp_path / "published", tmp_path / "again"
    main.main(["report", str(run), "--keep-answers", str(published)])
    assert f"answers: {published / 'answers.json'}" in capsys.readouterr().out
    assert load_json(published / "answers.json")["command"] == command()
    assert (run / "report.html").exists()
    main.main(["report", str(published), "--restore-to", str(again)])
    assert by_key(again).keys() == by_key(run).keys()
    assert load_json(again / "config.json") == load_json(run / "config.json")
    assert (again / "report.csv").read_text() == (run / "report.csv").read_text()


def test_nothing_is_overwritten(run, tmp_path, capsys):
    published, other = tmp_path / "published", tmp_path / "other"
    answers.keep(run, published, "icr report")
    other.mkdir()
    save_json(other / "config.json", fake_config(n_test=31))
    for arguments, message in (
        ((run, "--keep-answers", published), "answers.json exists already"),
        ((run, "--keep-answers", other), "another run's already"),
        ((published, "--restore-to", run), "holds records already"),
        ((published, "--restore-to", other), "another run's already"),
        ((run, "--restore-to", tmp_path / "new"), "answers.json"),
    ):
        assert message in failure(capsys, *arguments)
    assert not (tmp_path / "new").exists()
    assert load_json(other / "config.json")["n_test"] == 31


def test_damaged_answers_are_named_in_one_line(run, tmp_path, capsys):
    file = answers.keep(run, tmp_path / "out", "icr report")
    whole = load_json(file)
    cell = whole["answers"]["icr"]["mr"]["2"]
    damages = {
        "Field required": {key: value for key, value in cell.items() if key != "chosen"},
        "shorter": {**cell, "chosen": cell["chosen"][:-1]},
        "invalid literal": {**cell, "chosen": "!" * len(cell["chosen"])},
        "could not convert": {**cell, "logits": cell["logits"].replace("0.250", "much")},
        "logits for the 2 options": {**cell, "logits": cell["logits"].replace("0.250", "1 2")},
    }
    for message, damaged in damages.items():
        content = load_json(file)
        content["answers"]["icr"]["mr"]["2"] = damaged
        save_json(file, content)
        line = failure(capsys, file.parent, "--restore-to", tmp_path / "again")
        assert "answers.json is damaged" in line
        assert message in line
        save_json(file, whole)


@pytest.mark.parametrize("n_items", [1, 3])
def test_answers_among_many_options_are_kept_and_made_again(run, tmp_path, n_items):
    logits = tuple(float(place) for place in range(77))
    banking = []
    for index in range(n_items):
        answer = {"label": 40 + index, "prediction": 9 + 30 * index, "option_logits": logits}
        banking.append(replace(record(index, task="banking"), **answer))
    # Another method has answered the last item alone.
    banking.append(replace(banking[-1], method="zero-shot", prediction=76))
    records.append(run / "records.jsonl", banking)
    file = answers.keep(run, tmp_path / "out", "icr report")
    assert load_json(file)["tasks"]["banking"]["n_options"] == " ".join(["77"] * n_items)
    answers.restore(tmp_path / "out", tmp_path / "again")
    again = by_key(tmp_path / "again")
    for line in banking:
        restored = again[line.key]
        assert (restored.label, restored.prediction) == (line.label, line.prediction)
        assert restored.option_logits == line.option_logits
    assert again.keys() == by_key(run).keys()


def test_answers_among_few_options_are_kept_as_they_always_were(run, tmp_path):
    records.append(run / "records.jsonl", [replace(record(3, task="b"), option_logits=(0.5,) * 77)])
    content = load_json(answers.keep(run, tmp_path / "out", "icr report"))
    cell = content["answers"]["icr"]["mr"]["2"]
    n_items = len(content["tasks"]["mr"]["items"].split())
    assert content["tasks"]["mr"]["n_options"] == "2" * n_items
    assert len(content["tasks"]["mr"]["labels"]) == len(cell["chosen"]) == n_items
    assert set(cell["chosen"]) == set("01.")


def test_a_run_without_records_is_not_kept(run, tmp_path):
    (run / "records.jsonl").unlink()
    with pytest.raises(ValueError, match="no records"):
        answers.keep(run, tmp_path / "out", "icr report")
    assert not (tmp_path / "out").exists()
