"""Several processes give what one gives: the same PIDs, the same router, the same table."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from children import FIT, finish, kill, start, start_evaluation, start_fit
from commands import on
from icrouting.fitting.account import Account
from icrouting.icr import InContextRouter
from icrouting.runtime import processes
from runs_alike import assert_same_table, cut_short

pytestmark = pytest.mark.processes


def assert_same_router(folder, expected, within=1e-4):
    got, wanted = InContextRouter.from_pretrained(folder), InContextRouter.from_pretrained(expected)
    for side in ("query_pids", "key_pids"):
        a, b = getattr(got.pids, side), getattr(wanted.pids, side)
        assert (a @ a.mT - b @ b.mT).abs().max() <= 1e-6
    for a, b in zip(got.router.parameters(), wanted.router.parameters(), strict=True):
        assert (a - b).abs().max() <= within


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_n_processes_fit_and_measure_what_one_does(n, alone, encoder_folder, tmp_path):
    fitting = start_fit(alone / "world", encoder_folder, tmp_path / "router", n)
    assert finish(fitting) == [0] * n
    assert_same_router(tmp_path / "router", alone / "router")
    assert finish(start_evaluation(alone / "world", tmp_path / "run", n)) == [0] * n
    assert_same_table(tmp_path / "run", alone / "run")


@pytest.mark.slow
def test_in_bfloat16_processes_agree_to_what_it_rounds(alone, encoder_folder, tmp_path):
    for n in (1, 2):  # prompts in batches of other sizes
        out = tmp_path / f"{n}"
        fitting = start_fit(alone / "world", encoder_folder, out, n, torch.bfloat16)
        assert finish(fitting) == [0] * n
    assert_same_router(tmp_path / "2", tmp_path / "1", within=5e-3)


@pytest.mark.slow
def test_a_fit_that_lost_a_process_ends_and_goes_on_with_another_number(
    alone, encoder_folder, tmp_path
):
    folder = tmp_path / "router"
    first = start_fit(alone / "world", encoder_folder, folder, 2)
    while not list(folder.rglob("moments.safetensors")):
        assert first[0].is_alive(), "the fit was over before it could be stopped"
        time.sleep(0.002)
    assert kill(first[1])
    assert finish(first) == [2, -signal.SIGKILL]
    assert not (folder / "config.json").exists()
    assert finish(start_fit(alone / "world", encoder_folder, folder, 3)) == [0] * 3
    assert_same_router(folder, alone / "router")


@pytest.mark.slow
def test_an_evaluation_that_lost_a_process_goes_on_with_another_number(alone, tmp_path):
    run = tmp_path / "run"
    first = start_evaluation(alone / "world", run, 3)
    while not list(run.glob("records.*.jsonl")):
        assert first[0].is_alive(), "the run was over before it could be stopped"
        time.sleep(0.002)
    assert kill(first[2])
    finish(first)
    cut_short(run / "records.1.jsonl")
    assert finish(start_evaluation(alone / "world", run, 2)) == [0, 0]
    assert_same_table(run, alone / "run")


@pytest.mark.slow
def test_processes_judge_a_training_together_as_one_does_alone(alone, encoder_folder, tmp_path):
    world = alone / "world"
    where = [*on(world), "--encoder", encoder_folder]
    for n_processes in (1, 2):
        out = tmp_path / str(n_processes)
        command = ["fit", "--out", out, *where, *FIT.split(), "--min-steps", 30, "--patience", 2]
        assert finish(start(n_processes, *command)) == [0] * n_processes
    assert_same_router(tmp_path / "2", tmp_path / "1")
    accounts = [Account.of(tmp_path / name / "fit") for name in ("1", "2")]
    assert accounts[0].n_held >= 10
    assert accounts[0].step == accounts[1].step


@pytest.mark.parametrize("option", ["--seed", "--data"])
def test_processes_that_were_told_different_things_are_refused(
    option, alone, encoder_folder, tmp_path
):
    world = alone / "world"
    other = tmp_path / "data"
    for name in ("sst2", "mr"):
        (other / name).mkdir(parents=True)
        for split in ("train", "test"):
            lines = (world / "data" / name / f"{split}.jsonl").read_text().splitlines()
            (other / name / f"{split}.jsonl").write_text("\n".join(lines[1:]))
    values = {"--seed": [1, 2], "--data": [world / "data", other]}[option]
    where = [*on(world), "--encoder", encoder_folder]
    command = ["fit", "--out", tmp_path / "router", *where, *FIT.split(), option, values]
    log = tmp_path / "errors"
    told = start(2, *command, log=log)
    assert finish(told) == [2, 2]
    what = {"--seed": "seed", "--data": "rows"}[option]
    assert f"the processes were started with different {what}" in log.read_text()
    assert not (tmp_path / "router").exists()


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            RuntimeError("Connection closed by peer"),
            ConnectionError,
            r"has died .*\(Connection closed by peer\)",
        ),
        (RuntimeError(), ConnectionError, r"has died .*\(RuntimeError\)"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            torch.OutOfMemoryError,
            "CUDA out of memory",
        ),
    ],
)
def test_only_what_may_mean_a_dead_process_is_called_one(error, kind, said, monkeypatch):
    def fail(*args):
        raise error

    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr(processes, "here", lambda: two)
    monkeypatch.setattr(processes, "reduce", fail)
    with pytest.raises(kind, match=said):
        processes.total(torch.ones(2))
    two.device = "no such device"  # a tensor that cannot be moved says nothing of the others
    with pytest.raises(RuntimeError, match="no such device"):
        processes.total(torch.ones(2))


def test_a_process_leaves_its_group_before_its_interpreter_ends(capfd):
    script = (
        "import atexit, os, torch.distributed as group; from icrouting.runtime import processes; "
    )
    script += "say = lambda when: os.write(1, f'{when} {group.is_initialized()}\\n'.encode()); "
    script += "atexit.register(say, 'end'); processes.wait(); say('joined')"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29535",
    ]
    done = subprocess.run([*launcher, "--no-python", sys.executable, "-c", script], timeout=240)
    said = sorted(capfd.readouterr().out.split("\n"))
    assert (done.returncode, said) == (
        0,
        ["", "end False", "end False", "joined True", "joined True"],
    )


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_both_launchers_start_it(launcher, alone, encoder_folder, tmp_path):
    how = {
        "torch.distributed.run": "--nproc_per_node 2 --master_port 29533",
        "accelerate.commands.launch": "--cpu --num_processes 2 --num_machines 1 "
        "--mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1 "
        "--main_process_port 29534",
    }[launcher]
    where = [*on(alone / "world"), "--encoder", encoder_folder]
    command = [sys.executable, "-m", launcher, *how.split(), "-m", "icrouting.cli"]
    command += ["fit", "--out", tmp_path / "router", *where, *FIT.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("router saved") == 1
    settings = json.loads((tmp_path / "router" / "fit" / "fit.json").read_text())
    assert settings["n_prompts"] == 23
    InContextRouter.from_pretrained(tmp_path / "router")
