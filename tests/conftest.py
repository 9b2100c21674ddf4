import pickle
import shutil

import pytest
import torch
from filelock import FileLock

import shapes

# Before the first module of the package is imported.
shapes.check_where_arrays_are_named()

import pinned
import tiny
from fitted import SMALL
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.fitting.training import Trainer
from icrouting.methods import Settings
from icrouting.routing import artifact
from icrouting.routing.description import describe
from icrouting.routing.features import features_of
from icrouting.routing.router import Router

# Tiny models gain nothing from threads, and lose much where tests share a machine.
torch.set_num_threads(1)

# Long tests first: two workers that steal from one another then end together.
LONG_MARKS = ("processes", "slow", "pinned", "browser")

FURTHER_FAMILIES = set(tiny.ALL_CONFIGS) - set(tiny.CONFIGS)


def of_a_further_family(item):
    """Whether a test is a repetition for one of the families beyond those of `tiny.CONFIGS`."""
    families = FURTHER_FAMILIES
    # Each of two dozen rivals, too, in every one of them.
    if item.path.stem == "test_rivals":
        families = set(tiny.ALL_CONFIGS) - {"llama"}
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(isinstance(each, str) and each in families for each in parameters)


def pytest_collection_modifyitems(items):
    for item in items:
        # `make fast` asks three families, which differ in all that matters to most changes.
        if of_a_further_family(item):
            item.add_marker(pytest.mark.slow)

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
                # What a filling that failed has left would hide its error behind another.
                shutil.rmtree(folder, ignore_errors=True)
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
def saved_router(tmp_path_factory, encoder_folder):
    """A folder with an untrained router of a tiny Qwen2; only to be read or copied."""
    folder = tmp_path_factory.mktemp("artifact")
    model = tiny.model("qwen2")
    config = FitConfig(layers=(3, 4), rank=3, hidden_width=5, basis="pca")
    features = features_of(str(encoder_folder), Decoder.of(model, tiny.tokenizer()), "cpu")
    description = describe(
        Decoder.of(model, tiny.tokenizer()), [tiny.task()], config, (3, 4), features
    )
    router = Router(12, 2, 6, 3, 5, torch.Generator().manual_seed(0))
    artifact.save(folder, description, tiny.pids(model), router)
    return folder


@pytest.fixture(scope="session")
def pinned_folder(made_once):
    """A folder with the rows and tasks of all pinned sets."""
    return made_once("pinned", pinned.read_all)


@pytest.fixture(scope="session")
def pinned_rows(pinned_folder):
    """The rows of each pinned set by its name."""
    return pickle.loads((pinned_folder / pinned.ROWS).read_bytes())


@pytest.fixture(scope="session")
def pinned_tasks(pinned_folder):
    """The pinned tasks by their names."""
    return pickle.loads((pinned_folder / pinned.TASKS).read_bytes())


@pytest.fixture(scope="session")
def small_settings(encoder_folder):
    """Settings under which every method is fitted in a moment."""
    return Settings(**SMALL, encoder=str(encoder_folder))


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


@pytest.fixture
def trainers(monkeypatch):
    """The trainers of the fits that are made, each of which runs."""
    ran = []
    run = Trainer.run

    def noted(self):
        ran.append(self)
        run(self)

    monkeypatch.setattr(Trainer, "run", noted)
    return ran
