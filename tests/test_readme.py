"""The examples of README and guide run, and pictures and tables are the committed runs'."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from icrouting.tasks import staicc
from pinned import fetch_or_skip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README + GUIDE, re.DOTALL)


@pytest.mark.pinned
def test_the_ten_lines_run(tmp_path, monkeypatch, pinned_tasks):
    fetch_or_skip("smollm2-135m", "minilm")
    # Other tests check that the sets read the same each time; to read three takes ten seconds.
    monkeypatch.setattr(staicc, "read_task", lambda spec: pinned_tasks[spec.name])
    monkeypatch.chdir(tmp_path)
    # The same lines, on fewer prompts and queries.
    code, n_changes = re.subn(
        r"n_prompts=40, n_queries=400", "n_prompts=4, n_queries=16, epochs=1", BLOCKS[0]
    )
    assert n_changes == 1
    names: dict = {}
    exec(code, names)
    assert names["scores"].shape == (2, 2)
    assert names["tokens"].shape[0] == 2
    assert (tmp_path / "my-router" / "README.md").exists()
    names["tasks"] = [dataclasses.replace(task, train=task.train[:26]) for task in names["tasks"]]
    exec(BLOCKS[1], names)
    assert names["scores"].shape == (2, 2)


def test_the_own_task_reads_as_the_readme_says(tmp_path):
    from icrouting import load_task

    names: dict = {}
    exec(BLOCKS[2], names)
    (tmp_path / "tickets").mkdir()
    for split in ("train", "test"):
        rows = [
            (f"the screen of the {split} is dark", 1),
            (f"I lost the password of the {split}", 0),
        ]
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (tmp_path / "tickets" / f"{split}.jsonl").write_text("\n".join(lines))
    task = load_task(names["spec"], data=tmp_path)
    assert task.prompt(task.test[0]) == "Ticket: the screen of the test is dark\nTeam:"
    assert task.answer(task.test[0]) == "Hardware"


def test_tables_are_those_of_the_committed_runs():
    import sys

    sys.path.append(str(ROOT / "docs"))
    import results

    assert (ROOT / "docs" / "results.md").read_text() == results.page(), (
        "run python docs/results.py"
    )


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_picture_of_who_wins_is_drawn_from_the_committed_runs():
    sys.path.append(str(ROOT / "docs"))
    import who_wins

    assert who_wins.drawn() == who_wins.digest(), "run python docs/who_wins.py"
    lines = who_wins.gains().set_index(["mark", "run", "name", "method"]).gain
    assert lines.index.is_unique
    assert {mark for mark, *_ in lines.index} == set(who_wins.KINDS)


def test_every_wing_and_every_room_of_its_own_is_in_the_file_map():
    package = ROOT / "src" / "icrouting"
    wings = {f"{file.parent.name}/" for file in package.glob("*/__init__.py")}
    rooms = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    pages = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert wings | rooms <= set(re.findall(r"`([\w.]+/?)`", pages))


def test_contributing_names_every_room_of_a_wing():
    """But for methods, of which each is a room of its name."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    for wing in (ROOT / "src" / "icrouting").glob("*/__init__.py"):
        if wing.parent.name == "methods":
            continue
        (line,) = [line for line in lines if line.startswith(f"| `{wing.parent.name}/`")]
        rooms = {file.stem for file in wing.parent.glob("*.py") if not file.stem.startswith("__")}
        assert rooms <= set(re.findall(r"\w+", line.split("|")[3])), wing.parent.name


def test_the_picture_of_the_ladder_is_drawn_from_the_committed_records():
    sys.path.append(str(ROOT / "docs"))
    import ladder

    assert ladder.drawn() == ladder.digest(), "run python docs/ladder.py"


def test_the_page_of_ablations_is_made_from_the_committed_sweeps():
    sys.path.append(str(ROOT / "docs"))
    import ablations

    page = (ROOT / "docs" / "ablations.md").read_text()
    assert page == ablations.page(), "run python docs/ablations.py"
    assert ablations.verdicts()


def test_what_is_said_of_an_ablation_is_in_its_table():
    sys.path.append(str(ROOT / "docs"))
    import ablations

    for model, by_preset in ablations.verdicts().items():
        for preset, read in by_preset.items():
            table = "\n".join(ablations.table_of(ablations.SWEEPS / model / preset / "sweep.md"))
            said = re.findall(r"\(?[+\N{MINUS SIGN}]\d+\.\d\b", read["here"] + read["verdict"])
            assert said, preset
            assert not [number for number in said if number.strip("(") not in table], preset


def test_the_picture_of_unseen_tasks_is_drawn_from_the_committed_records():
    sys.path.append(str(ROOT / "docs"))
    import unseen

    assert unseen.drawn() == unseen.digest(), "run python docs/unseen.py"
