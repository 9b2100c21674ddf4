"""`icr calibrate`: a router's folder gets the priors of a task, and `icr predict` goes by them."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch

import tiny
from fitted import strict
from icrouting.cli import calibrate as room
from icrouting.cli import main, predict
from icrouting.decoder import loading
from icrouting.icr import InContextRouter
from icrouting.routing.priors import WAYS

TASK = tiny.task("rows", n_train=2, n_test=40)
ROWS = [{"text": row.fields["text"], "label": "good", "id": n} for n, row in enumerate(TASK.test)]
MOOD = 'template = "Note: {text}\\nMood:"\noptions = ["good", "bad"]\n'


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(loading, "default_dtype", lambda: torch.float32)


@pytest.fixture
def router(world, tmp_path):
    """A world's router with a gate that knows no prompt."""
    strict(InContextRouter.from_pretrained(world / "router")).save_pretrained(tmp_path / "router")
    return tmp_path / "router"


@pytest.fixture
def mood(tmp_path):
    file = tmp_path / "mood.toml"
    file.write_text(MOOD)
    return file


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["id", "text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    return file


def run(world, *arguments):
    main.main([*map(str, arguments), "--model", str(world / "model")])


def refused(capsys, world, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(world, *arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def table(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_rows_of_a_new_task_are_answered_without_the_models_lean(
    world, router, mood, rows, tmp_path, capsys
):
    run(world, "calibrate", router, rows, "--task", mood)
    told = capsys.readouterr().out
    assert "not read, labels among them: id, label." in told
    assert "mood: 40 of 40 rows (left alone 40)." in told
    assert f"icr predict {router} {rows} --task mood" in told
    assert "Over 40 prompts the model leans to" in told
    out = tmp_path / "answers.csv"
    run(world, "predict", router, rows, "--task", "mood", "--out", out, "--prefix", "new_")
    assert {row["new_status"] for row in table(out)} == {"calibrated"}
    (calibration,) = InContextRouter.from_pretrained(router).calibrations
    assert calibration.n_prompts == 40


def test_of_a_long_file_rows_are_drawn(world, router, mood, rows, capsys):
    run(world, "calibrate", router, rows, "--task", mood, "--most", "9")
    assert "mood: 9 of 40 rows" in capsys.readouterr().out
    (calibration,) = InContextRouter.from_pretrained(router).calibrations
    assert calibration.n_prompts == 9


def test_another_folder_leaves_the_router_as_it_is(world, router, mood, rows, tmp_path):
    before = sorted(file.read_bytes() for file in router.iterdir())
    run(world, "calibrate", router, rows, "--task", mood, "--out", tmp_path / "safe")
    assert sorted(file.read_bytes() for file in router.iterdir()) == before
    assert InContextRouter.from_pretrained(tmp_path / "safe").calibrations


def test_predict_says_at_the_end_where_rows_are_unlike_those_of_the_prior(
    world, router, mood, rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(predict, "WINDOW", 35)
    others = tmp_path / "others.jsonl"
    lines = [json.dumps({"text": f"{'!' * 30} {n} ? {n}"}) + "\n" for n in range(70)]
    others.write_text("".join(lines))
    run(world, "calibrate", router, rows, "--task", mood)
    ask = ("predict", router, "--task", "mood", "--prefix", "new_", "--out")
    capsys.readouterr()
    run(world, *ask, tmp_path / "answers.csv", rows)
    assert "Look out" not in capsys.readouterr().out
    run(world, *ask, tmp_path / "others.csv", others)
    assert capsys.readouterr().out.count("Look out: the rows that were calibrated") == 1


def two_moods(tmp_path):
    """Task files of two tasks."""
    files = []
    for name, cue in (("mood", "Mood"), ("tone", "Tone")):
        files.append(tmp_path / f"{name}.toml")
        files[-1].write_text(MOOD.replace("Mood", cue))
    return files


def names(folder):
    return {each.spec.name for each in InContextRouter.from_pretrained(folder).calibrations}


def test_a_second_task_leaves_the_first_ones_prior_in_another_folder(world, router, rows, tmp_path):
    for file in two_moods(tmp_path):
        run(world, "calibrate", router, rows, "--task", file, "--out", tmp_path / "safe")
    assert names(tmp_path / "safe") == {"mood", "tone"}
    assert names(router) == set()


def test_two_processes_that_calibrate_at_once_keep_both_priors(
    world, router, rows, tmp_path, monkeypatch
):
    mood, tone = two_moods(tmp_path)
    usual = room.save

    def overtaken(*arguments):
        monkeypatch.setattr(room, "save", usual)
        # The other one began later, and is done before this one saves.
        run(world, "calibrate", router, rows, "--task", tone)
        usual(*arguments)

    monkeypatch.setattr(room, "save", overtaken)
    run(world, "calibrate", router, rows, "--task", mood)
    assert names(router) == {"mood", "tone"}
    assert not list(router.parent.glob("*.lock"))


def test_what_could_not_be_saved_is_refused_before_a_model_is_loaded(
    world, router, rows, mood, tmp_path, monkeypatch, capsys
):
    other = tmp_path / "other"
    strict(InContextRouter.from_pretrained(world / "router")).save_pretrained(other)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    like_a_source = tmp_path / "source.toml"
    sources = InContextRouter.from_pretrained(router).description.sources
    assert sources
    like_a_source.write_text(f'name = "{sources[0].name}"\n{MOOD}')
    empty = tmp_path / "empty.csv"
    empty.write_text("text\n")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a day"\n')
    monkeypatch.setattr(room, "load", lambda *_: pytest.fail("a model was loaded"))
    for nothing in (empty, broken):
        line = refused(capsys, world, "calibrate", router, nothing, "--task", mood)
        assert nothing.name in line
    ask = ("calibrate", router, rows, "--task")
    assert "holds another router" in refused(capsys, world, *ask, mood, "--out", other)
    assert "is not a router's" in refused(capsys, world, *ask, mood, "--out", theirs)
    assert "and reads otherwise" in refused(capsys, world, *ask, like_a_source)


def test_finished_answers_are_not_those_of_other_priors(
    world, router, mood, rows, tmp_path, capsys
):
    run(world, "calibrate", router, rows, "--task", mood, "--most", "9")
    predict = ("predict", router, rows, "--task", "mood", "--prefix", "new_")
    predict = (*predict, "--out", tmp_path / "answers.csv")
    run(world, *predict)
    run(world, "calibrate", router, rows, "--task", mood)
    capsys.readouterr()
    assert "answers.csv" in refused(capsys, world, *predict)


def test_a_router_without_a_gate_is_refused(world, router, mood, rows, capsys):
    bare = replace(InContextRouter.from_pretrained(router), gate=None)
    shutil.rmtree(router)
    bare.save_pretrained(router)
    line = refused(capsys, world, "calibrate", router, rows, "--task", mood)
    assert "has no gate, so it routes every prompt" in line


def test_what_does_not_fit_is_refused_in_one_line(world, router, mood, rows, tmp_path, capsys):
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps({"note": "a day"}) + "\n")
    assert "missing: ['text']" in refused(capsys, world, "calibrate", router, odd, "--task", mood)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "a day"}) + "\n")
    line = refused(capsys, world, "calibrate", router, short, "--task", mood)
    assert "has 1 prompts of one list of options" in line
    line = refused(capsys, world, "calibrate", router, rows, "--task", mood, "--most", "1")
    assert "--most must be 2" in line
    assert not InContextRouter.from_pretrained(router).calibrations


def test_the_command_offers_every_way():
    assert main.Calibration.__args__ == WAYS
