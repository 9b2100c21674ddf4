"""What starts at once: help, and a user's mistake in a file, before torch or a model is loaded."""

import subprocess
import sys

import pytest

from commands import on
from icrouting.cli import main, reading
from icrouting.runtime import launch

ROWS = "text,label\n" + "\n".join(f"ticket {i},{i % 2}" for i in range(20))
TASK = 'template = "Ticket: {text}"\noptions = ["no", "yes"]\n[splits]\nrows = "rows.csv"\n'
# By name, what takes long to import.
HEAVY = "('torch', 'transformers', 'pandas', 'pyarrow', 'datasets', 'huggingface_hub')"


def imported_by(code, folder):
    """The heavy modules that some code imports in a process of its own, and what it printed."""
    ending = f"; import sys; print('imported', [n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code + ending],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    (*_, last) = done.stdout.strip().splitlines()
    return last.removeprefix("imported "), done.stdout + done.stderr


def of_command(arguments, folder):
    words = arguments.split()
    code = (
        "import contextlib; from icrouting.cli import main\n"
        f"with contextlib.suppress(SystemExit): main.main({words!r})\npass"
    )
    return imported_by(code, folder)


MISTAKES = {
    "a key that is not known": ("fit --out r --tasks odd.toml", "key 'optoins' is not known"),
    "a column that is missing": ("fit --out r --tasks lacking.toml", "missing here: ['team']"),
    "no such task file": ("eval --out r --tasks none.toml", "cannot read the task file"),
    "no such folder": ("eval --out r --tasks sst2 --data none", "expected a folder none/sst2"),
    "no such task": ("eval --out r --tasks sst3 --data .", "did you mean"),
    "a folder that is a file": ("fit --out rows.csv/r --tasks good.toml", "rows.csv is a file"),
    "a router that is none": ("eval --out r --router . --tasks good.toml", "is no router: config"),
    "no such router": ("eval --out r --router ./none --tasks good.toml", "no router at './none'"),
    "a dry run of odd rows": ("fit --dry-run --out r --tasks odd.toml", "'optoins' is not known"),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.csv").write_text(ROWS)
    (tmp_path / "good.toml").write_text(TASK)
    (tmp_path / "odd.toml").write_text(TASK.replace("options", "optoins"))
    (tmp_path / "lacking.toml").write_text(f'label = "team"\n{TASK}')
    return tmp_path


@pytest.mark.processes
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_is_said_before_torch_is_imported(mistake, folder):
    arguments, said = MISTAKES[mistake]
    heavy, shown = of_command(arguments, folder)
    assert said in shown
    assert heavy == "[]"
    assert not (folder / "r").exists()


@pytest.mark.processes
@pytest.mark.parametrize("command", ["", "fit", "eval", "report", "generate", "inspect", "demo"])
def test_the_help_of_every_command_imports_nothing_heavy(command, tmp_path):
    heavy, shown = of_command(f"{command} --help", tmp_path)
    assert "usage: icr" in shown
    assert heavy == "[]"


READING = {
    "a list": "Task.from_rows([dict(text=f'a {i}', label=i % 2) for i in range(20)], *HOW)",
    "a CSV": "Task.from_rows('rows.csv', *HOW)",
    "a task file": "load_task('good.toml', '')",
}


@pytest.mark.processes
@pytest.mark.parametrize("kind", READING)
def test_reading_a_task_imports_nothing_heavy(kind, folder):
    how = "HOW = ('{text}:', ['no', 'yes'])"
    code = f"from icrouting import Task, load_task; {how}; print(len({READING[kind]}.test))"
    heavy, shown = imported_by(code, folder)
    assert shown.startswith("6\n")
    assert heavy == "[]"


@pytest.mark.parametrize("name", launch._PLACES)
def test_a_process_that_was_launched_beside_others_is_not_taken_to_be_alone(name, monkeypatch):
    assert launch.is_alone()
    monkeypatch.setenv(name, "1")
    assert not launch.is_alone()


def test_a_folder_that_may_not_be_written_is_said_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *asked: False)
    with pytest.raises(ValueError, match=f"you may not write in {tmp_path}: choose another"):
        reading.check_out(tmp_path / "a" / "b")


def test_a_pinned_encoder_that_is_unknown_is_said_before_the_model_is_loaded(
    world, tmp_path, capsys, monkeypatch
):
    from icrouting.cli import fit as room

    monkeypatch.setattr(room, "load", lambda model: pytest.fail("loaded"))
    where = [*on(world), "--tasks", "sst2", "--out", str(tmp_path / "r")]
    with pytest.raises(SystemExit):
        main.main(["fit", *where, "--encoder", "constant:pinned:minilmm"])
    assert "unknown pinned encoder 'pinned:minilmm'" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["--task none --fields a", "--fields none=a b"])
def test_fields_that_do_not_fit_are_said_before_the_model_is_loaded(
    asked, world, capsys, monkeypatch
):
    from icrouting.cli import look

    monkeypatch.setattr(look, "load", lambda model: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        main.main(["generate", "--router", str(world / "router"), *asked.split()])
    assert "error: " in capsys.readouterr().err
