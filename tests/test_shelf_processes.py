"""Fits of several processes on one shelf: at once, of several processes each, and killed."""

import time

import pytest
import torch

from children import FIT, finish, kill, start
from commands import make_world, on
from icrouting.fitting.shelf import STAGE_FILE
from icrouting.icr import InContextRouter
from icrouting.runtime.storage import load_metadata

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def world_in_float32(made_once, encoder_folder):
    def fill(folder):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("icrouting.decoder.loading.default_dtype", lambda: torch.float32)
            make_world(folder, encoder_folder)

    return made_once("shelf-world", fill)


def start_fit(world, encoder_folder, out, n_processes, *more):
    where = [*on(world), "--encoder", encoder_folder]
    return start(n_processes, "fit", "--out", out, *where, *FIT.split(), *more)


def test_fits_at_once_share_what_is_the_same_and_give_what_each_gives_alone(
    world_in_float32, encoder_folder, tmp_path
):
    shared = ("--stages", tmp_path / "stages")
    fits = [
        start_fit(world_in_float32, encoder_folder, tmp_path / f"rank{rank}", 1, *shared, *how)
        for rank, how in ((2, ()), (3, ("--rank", "3")))
    ]
    assert [finish(processes) for processes in fits] == [[0], [0]]
    assert len(list((tmp_path / "stages").glob(f"*/{STAGE_FILE}"))) == 2
    alone = tmp_path / "alone"
    assert finish(start_fit(world_in_float32, encoder_folder, alone, 1, "--rank", "3")) == [0]
    expected = InContextRouter.from_pretrained(alone)
    assert InContextRouter.from_pretrained(tmp_path / "rank3").digest() == expected.digest()


def test_a_warm_start_of_two_processes_that_is_killed_goes_on_with_one(
    world_in_float32, encoder_folder, tmp_path
):
    where = [*on(world_in_float32), "--from", world_in_float32 / "router", "--tasks", "mr"]
    how = ["--n-queries", "60", "--epochs", "40", "--batch-size", "4", "--keep", "3"]
    out = tmp_path / "new"
    first = start(2, "fit", "--out", out, *where, *how)
    checkpoint = out / "fit" / "training.safetensors"
    while not checkpoint.exists():
        assert first[0].is_alive(), "the fit was over before it could be stopped"
        time.sleep(0.002)
    assert kill(first[0])
    finish(first)
    assert int(load_metadata(checkpoint)["step"]) > 0
    assert finish(start(1, "fit", "--out", out, *where, *how)) == [0]
    assert finish(start(1, "fit", "--out", tmp_path / "alone", *where, *how)) == [0]
    got = InContextRouter.from_pretrained(out)
    wanted = InContextRouter.from_pretrained(tmp_path / "alone")
    assert got.description == wanted.description
    for a, b in zip(got.router.parameters(), wanted.router.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-3


def test_what_two_processes_keep_one_takes_up(world_in_float32, encoder_folder, tmp_path):
    shared = ("--stages", tmp_path / "stages")
    both = start_fit(world_in_float32, encoder_folder, tmp_path / "both", 2, *shared)
    assert finish(both) == [0, 0]
    written = {file: file.stat().st_ino for file in (tmp_path / "stages").rglob("[mt]*.*")}
    assert {file.name for file in written} >= {"moments.safetensors", "trunk.bin"}
    one = start_fit(world_in_float32, encoder_folder, tmp_path / "one", 1, *shared, "--lr", "0.02")
    assert finish(one) == [0]
    assert {file: file.stat().st_ino for file in written} == written
    both_pids = InContextRouter.from_pretrained(tmp_path / "both").pids
    assert InContextRouter.from_pretrained(tmp_path / "one").pids == both_pids
