"""`icr predict`: a file of answers, whole after a kill, that keeps what the rows had."""

import csv
import json
import os
import time

import pandas
import pytest
import torch

import tiny
from children import SERVER, child, kill
from fitted import SMALL, fit_method
from icrouting.cli import main
from icrouting.cli import predict as room
from icrouting.decoder import loading
from icrouting.icr import InContextRouter
from icrouting.methods import Settings, make
from icrouting.methods.saved import save_method
from icrouting.runtime import appended, progress

TASK = tiny.task("rows", n_train=2, n_test=40)
TEXTS = [row.fields["text"] for row in TASK.test]
OPTIONS = ("negative", "positive")


def write_csv(file, texts=TEXTS, **columns):
    """A CSV of texts, each with a number of its own and further columns."""
    frame = pandas.DataFrame({"id": [f"{n:03}" for n in range(len(texts))], "text": texts})
    frame.assign(**columns).to_csv(file, index=False, quoting=csv.QUOTE_ALL)
    return file


@pytest.fixture
def rows(tmp_path):
    return write_csv(tmp_path / "rows.csv")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(room, "WINDOW", 7)
    monkeypatch.setattr(loading, "default_dtype", lambda: torch.float32)


def run(world, rows, out, *more):
    """Runs `icr predict` with a world's router."""
    arguments = ["predict", str(world / "router"), str(rows), "--out", str(out), *more]
    main.main([*arguments, "--model", str(world / "model")])


def refused(capsys, *arguments):
    """The one line that refuses a command."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def table(file):
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))


def test_answers_are_those_of_routed_predict_in_the_rows_order(world, rows, tmp_path, tokenizer):
    run(world, rows, tmp_path / "answers.csv")
    icr = InContextRouter.from_pretrained(world / "router")
    with icr.attached(tiny.model("llama"), tokenizer) as routed:
        expected = routed.predict([{"text": text} for text in TEXTS])
    answers = table(tmp_path / "answers.csv")
    assert [row["text"] for row in answers] == TEXTS
    assert [row["id"] for row in answers] == [f"{n:03}" for n in range(len(TEXTS))]
    assert [row["label"] for row in answers] == [each.label for each in expected]
    assert [row["status"] for row in answers] == [each.status for each in expected]
    for row, each in zip(answers, expected, strict=True):
        assert float(row["probability"]) == pytest.approx(each.probability, abs=1e-5)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_any_kind_of_rows_gives_any_kind_of_answers(kind, ending, world, tmp_path):
    frame = pandas.DataFrame({"id": ["007", 'a "b", c\td'], "text": TEXTS[:2]})
    source, out = tmp_path / f"rows.{kind}", tmp_path / f"answers.{ending}"
    if kind == "jsonl":
        frame.to_json(source, orient="records", lines=True)
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(source)
    else:
        frame.to_csv(source, index=False, sep="\t" if kind == "tsv" else ",")
    run(world, source, out)
    if ending == "jsonl":
        answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    else:
        answers = table(out)
    assert [row["id"] for row in answers] == list(frame["id"])
    assert [row["text"] for row in answers] == TEXTS[:2]
    assert {row["label"] for row in answers} <= set(OPTIONS)


def test_cells_come_out_as_they_went_in(world, tmp_path):
    odd = ["007", " space ", "", 'a "quote"', "two\nlines", "a\rb", "NaN", "1e5", "ä,ö;ü", "\u2028"]
    source = write_csv(tmp_path / "rows.csv", TEXTS[: len(odd)], odd=odd)
    run(world, source, tmp_path / "answers.csv")
    assert [row["odd"] for row in table(tmp_path / "answers.csv")] == odd


def test_a_row_that_does_not_fit_is_a_line_with_its_reason(world, tmp_path, capsys):
    source = tmp_path / "rows.csv"
    long = "x" * 200_000
    lines = ["id,text", "0,a joy", "1", "2,a,b", f"3,{long}", '4,"a"b', "5,a bore", "6, "]
    source.write_bytes("\n".join(lines).encode() + b"\n7,na\xefve\n")
    run(world, source, tmp_path / "answers.csv")
    content = (tmp_path / "answers.csv").read_bytes()
    assert b"7,na\xefve," in content
    decoded = content.decode("utf-8", "replace")
    csv.field_size_limit(10**9)
    answers = list(csv.DictReader(decoded.splitlines()))
    statuses = [row["status"] for row in answers]
    assert len(answers) == 8
    assert statuses[1].startswith("malformed: task 'sst2' needs the fields ['text'], missing here")
    assert statuses[2] == "malformed: rows.csv:4: 3 cells, the heading has 2"
    assert statuses[3] == "too long"
    assert answers[3]["text"] == long
    assert statuses[4].startswith("malformed: rows.csv:6: not CSV")
    assert statuses[6].startswith("malformed: field 'text' must be a text that is not empty")
    assert statuses[7].startswith("malformed: this row is not UTF-8 text")
    assert answers[0]["label"] in OPTIONS
    assert answers[5]["label"] in OPTIONS
    assert "malformed 5" in capsys.readouterr().out.replace("\n", " ")


def test_a_line_that_is_no_json_is_a_line_with_its_reason(world, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "a joy"}\nnonsense\n[1]\n{"text": true, "x": {"y": 1}}\n')
    run(world, source, tmp_path / "answers.jsonl")
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    first, second, third, fourth = map(json.loads, lines)
    assert first["label"] in OPTIONS
    assert second["status"].startswith("malformed: rows.jsonl:2: not a JSON object")
    assert third["status"] == "malformed: rows.jsonl:3: not a JSON object but a list"
    assert fourth["x"] == {"y": 1}
    assert fourth["status"].startswith("malformed: field 'text' must be a text")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": 1}, r"has a column 'label' already: say with --prefix"),
        ({"status": 1}, r"has a column 'status' already"),
    ],
)
def test_a_column_that_is_there_is_not_written_over(columns, said, world, tmp_path, capsys):
    source = write_csv(tmp_path / "rows.csv", **columns)
    assert said in refused(capsys, world, source, tmp_path / "answers.csv")
    run(world, source, tmp_path / "answers.csv", "--prefix", "predicted_")
    (name,) = columns
    first = table(tmp_path / "answers.csv")[0]
    assert first[name] == "1"
    assert first["predicted_label"] in OPTIONS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("words\nx\n", "needs the columns ['text'], missing: ['text']; its columns are ['words']"),
        ("text,text\nx,y\n", "more than one column is called 'text'"),
        ("text\n", "holds no row"),
        ("", "holds no row"),
    ],
)
def test_a_file_that_cannot_be_answered_is_refused(content, said, world, tmp_path, capsys):
    source = tmp_path / "rows.csv"
    source.write_text(content)
    assert said in refused(capsys, world, source, tmp_path / "answers.csv")
    assert not (tmp_path / "answers.csv").exists()


def test_rows_that_are_not_there_are_refused(world, tmp_path, capsys):
    line = refused(capsys, world, tmp_path / "none.csv", tmp_path / "answers.csv")
    assert "none.csv: No such file" in line


def test_answers_of_another_ending_are_refused(world, rows, tmp_path, capsys):
    line = refused(capsys, world, rows, tmp_path / "answers.xlsx")
    assert "--out must end in one of .csv, .tsv, .jsonl" in line


def stopped_after(monkeypatch, n_windows, error):
    """Has the answers' file refuse a window, after some."""
    plain, seen = appended._write_all, []

    def refusing(descriptor, piece):
        seen.append(piece)
        # The first piece is the heading.
        if len(seen) == n_windows + 2:
            os.write(descriptor, bytes(piece[:40]))
            raise error
        plain(descriptor, piece)

    monkeypatch.setattr(appended, "_write_all", refusing)


def test_a_full_disk_is_a_line_and_the_same_command_goes_on(
    world, rows, tmp_path, monkeypatch, capsys
):
    run(world, rows, tmp_path / "whole.csv")
    out = tmp_path / "answers.csv"
    with monkeypatch.context() as patched:
        stopped_after(patched, 3, OSError(28, "No space left on device"))
        capsys.readouterr()
        line = refused(capsys, world, rows, out)
    assert "No space left on device): make room; it keeps 21 rows, and the same command" in line
    assert len(table(out)) == 21
    run(world, rows, out)
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_ctrl_c_says_what_is_kept(world, rows, tmp_path, monkeypatch, capsys):
    stopped_after(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(SystemExit) as stop:
        run(world, rows, tmp_path / "answers.csv")
    assert stop.value.code == 130
    assert "answers.csv keeps 14 rows; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [b"", b"half a li", b'0,"two\nli'])
def test_what_stands_behind_the_last_whole_window_is_cut(
    cut, world, rows, tmp_path, monkeypatch, capsys
):
    run(world, rows, tmp_path / "whole.csv")
    out = tmp_path / "answers.csv"
    with monkeypatch.context() as patched:
        stopped_after(patched, 1, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            run(world, rows, out)
    with out.open("ab") as file:
        file.write(cut)
    run(world, rows, out)
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_finished_answers_are_not_made_again(world, rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "answers.csv"
    run(world, rows, out)
    before = out.read_bytes()

    def no_model(model):
        raise AssertionError("the model is not needed")

    monkeypatch.setattr(room, "load", no_model)
    capsys.readouterr()
    run(world, rows, out)
    assert out.read_bytes() == before
    assert "40 rows" in capsys.readouterr().out


def test_answers_to_other_rows_or_settings_are_refused(world, rows, tmp_path, capsys):
    out = tmp_path / "answers.csv"
    run(world, rows, out)
    before = out.read_bytes()
    others = write_csv(tmp_path / "others.csv", TEXTS[:9])
    for arguments in ([others, out], [rows, out, "--no-gate"], [rows, out, "--prefix", "x_"]):
        line = refused(capsys, world, *arguments)
        assert "answers.csv belongs to something else" in line
    assert out.read_bytes() == before


def test_finished_answers_are_those_of_the_dtype_that_is_asked_for(world, rows, tmp_path, capsys):
    out = tmp_path / "answers.csv"
    run(world, rows, out)
    line = refused(capsys, world, rows, out, "--dtype", "bfloat16")
    assert "answers.csv belongs to something else (dtype" in line
    run(world, rows, out, "--dtype", "float32")
    assert "it was finished before" in capsys.readouterr().out


def test_a_winner_that_learned_nothing_is_refused_by_its_reason(rows, tmp_path, capsys):
    (tmp_path / "winner").mkdir()
    (tmp_path / "winner" / "winner.json").write_text("{}")
    with pytest.raises(SystemExit):
        main.main(
            ["predict", str(tmp_path / "winner"), str(rows), "--out", str(tmp_path / "a.csv")]
        )
    assert "holds a winner that learned nothing" in capsys.readouterr().err


def test_a_file_that_is_no_answers_is_left_alone(world, rows, tmp_path, capsys):
    out = tmp_path / "answers.csv"
    out.write_text("precious")
    assert "is there already, and no answers.csv.state.json" in refused(capsys, world, rows, out)
    assert out.read_text() == "precious"


def test_answers_that_were_shortened_by_hand_are_refused(
    world, rows, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "answers.csv"
    with monkeypatch.context() as patched:
        stopped_after(patched, 1, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            run(world, rows, out)
    out.write_text("")
    capsys.readouterr()
    assert "answers.csv was changed: it has 0 bytes" in refused(capsys, world, rows, out)


def test_the_last_line_counts_and_says_what_is_next(world, rows, tmp_path, capsys):
    run(world, rows, tmp_path / "answers.csv")
    said = capsys.readouterr().out.replace("\n", " ")
    assert "answers.csv: 40 rows (routed 40); " in said
    assert "rows/s. Next: check the least sure answers" in said


def test_off_a_terminal_a_line_a_minute_says_how_far_it_is(
    world, rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    run(world, rows, tmp_path / "answers.csv")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("predict:")]
    assert len(lines) == 6
    assert lines[0].startswith("predict: 7 of 40 rows, ")
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("predict: 40 of 40 rows, ")


def test_a_saved_method_answers_a_file_too(world, rows, tmp_path, encoder_folder, tokenizer):
    settings = Settings(**SMALL, encoder=str(encoder_folder))
    (made,) = make(["probe-hidden"], settings)
    task = tiny.task("toy")
    model = tiny.model("llama")
    probe = fit_method(made, model, tokenizer, [task]).on(task)
    save_method(probe, tmp_path / "probe")
    arguments = ["predict", str(tmp_path / "probe"), str(rows), "--out", str(tmp_path / "a.csv")]
    main.main([*arguments, "--model", str(world / "model")])
    with probe.attached(model, tokenizer, task) as attached:
        expected = attached.predict([{"text": text} for text in TEXTS])
    answers = table(tmp_path / "a.csv")
    assert [row["label"] for row in answers] == [each.label for each in expected]
    assert {row["status"] for row in answers} == {"answered"}


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    texts = [f"{TEXTS[n % 40]} {n}" for n in range(280)]
    return write_csv(tmp_path_factory.mktemp("many") / "rows.csv", texts)


def start(world, rows, out):
    """Starts `icr predict` in a process of its own."""
    arguments = ["predict", str(world / "router"), str(rows), "--out", str(out)]
    arguments += ["--model", str(world / "model")]
    process = SERVER.Process(target=small_child, args=(arguments,))
    process.start()
    return process


def small_child(arguments):
    room.WINDOW = 7
    child(0, 1, 0, arguments, torch.float32, None)


@pytest.mark.processes
@pytest.mark.slow
def test_killed_at_five_points_it_comes_to_the_same_file(world, many_rows, tmp_path):
    run(world, many_rows, tmp_path / "whole.csv")
    out = tmp_path / "answers.csv"
    state = tmp_path / "answers.csv.state.json"
    n_killed = 0
    for part in (0, 1, 2, 3, 4):
        process = start(world, many_rows, out)
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if state.exists() and json.loads(state.read_text())["n_rows"] > part * 40:
                break
            time.sleep(0.001)
        n_killed += kill(process)
    assert n_killed == 5, "the test's rows are too few to kill five times"
    final = start(world, many_rows, out)
    final.join(120)
    assert final.exitcode == 0
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
