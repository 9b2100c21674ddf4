import pytest
import torch
from filelock import FileLock

import tiny

# Tiny models gain nothing from threads, and lose much where tests share a machine.
torch.set_num_threads(1)

# Long tests first: two workers that steal from one another then end together.
LONG_MARKS = ("processes", "slow", "pinned", "browser")


def pytest_collection_modifyitems(items):
    def place(item):
        marks = [mark for mark in LONG_MARKS if item.get_closest_marker(mark)]
        return LONG_MARKS.index(marks[0]) if marks else len(LONG_MARKS)

    items.sort(key=place)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id):
    """A function that fills a folder by its name, once for all workers of a session."""
    base = tmp_path_factory.getbasetemp()
    # Each worker has a folder of its own in that of the session.
    session = base if worker_id == "master" else base.parent

    def made(name, fill):
        folder = session / name
        with FileLock(session / f"{name}.lock"):
            if not (folder / "complete").exists():
                folder.mkdir()
                fill(folder)
                (folder / "complete").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    return tiny.encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def world(tmp_path_factory, encoder_folder):
    """A model folder, a data folder and a fitted router, all tiny."""
    from commands import make_world

    folder = tmp_path_factory.mktemp("world")
    make_world(folder, encoder_folder)
    return folder


@pytest.fixture(scope="session")
def alone(made_once, encoder_folder):
    """A world with a fit and a run that one process made there undisturbed; only to be read."""
    from children import finish, start_evaluation, start_fit
    from commands import make_world

    def fill(folder):
        (folder / "world").mkdir()
        make_world(folder / "world", encoder_folder)
        fitting = start_fit(folder / "world", encoder_folder, folder / "router", 1)
        evaluating = start_evaluation(folder / "world", folder / "run", 1)
        assert finish([*fitting, *evaluating]) == [0, 0]

    return made_once("alone", fill)
