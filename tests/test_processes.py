"""Several processes give what one gives: the same PIDs, the same router, the same table."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from icrouting.cli import main
from icrouting.decoder import loading
from icrouting.evaluation import evaluate, records
from icrouting.fitting import extraction
from icrouting.icr import InContextRouter
from icrouting.runtime import processes
from test_cli import world  # noqa: F401
from test_kill import table

FIT = (
    "--n-prompts 23 --demos-per-class 1 --n-queries 13 --rank 2 --epochs 2 --batch-size 4 --lr 0.01 --tasks sst2 mr "
    "--hidden-width 5"
)
EVAL = "--tasks sst2 mr --sources sst2 --n-test 14 --demos-per-class 1 --i2cl-epochs 1 --seeds 0 1"
METHODS = "zero-shot calibration few-shot task-vectors task-vectors-once i2cl icr icr-constant icr-uniform-gates-once"


def child(rank, n, port, arguments, dtype):
    """One of n processes, placed as `torchrun` would place it."""
    if n > 1:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": n,
            "LOCAL_WORLD_SIZE": n,
            "MASTER_PORT": port,
        }
        os.environ.update(
            {name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1"
        )
    torch.set_num_threads(1)
    extraction.BLOCK, extraction.SAVE_EVERY_SECONDS, evaluate.CHUNK = 5, 0.0, 3
    loading.default_dtype = lambda: dtype
    main.main(arguments)


def start(n, *arguments, dtype=torch.float32):
    """Starts n processes with the same arguments, or each with its own where an argument is a list."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, started = multiprocessing.get_context("spawn"), []
    for rank in range(n):
        own = [
            str(argument[rank]) if isinstance(argument, list) else str(argument)
            for argument in arguments
        ]
        started.append(context.Process(target=child, args=(rank, n, port, own, dtype)))
        started[-1].start()
    return started


def finish(processes):
    for process in processes:
        process.join(240)
    return [process.exitcode for process in processes]


def fit(world, encoder_folder, out, n, dtype=torch.float32):
    where = ["--model", world / "model", "--data", world / "data", "--encoder", encoder_folder]
    return start(n, "fit", "--out", out, *where, *FIT.split(), dtype=dtype)


def evaluation(world, out, n):
    where = ["--model", world / "model", "--data", world / "data", "--router", world / "router"]
    return start(n, "eval", "--out", out, *where, *EVAL.split(), "--methods", *METHODS.split())


@pytest.fixture(scope="module")
def alone(world, encoder_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    assert finish(
        [*fit(world, encoder_folder, out / "router", 1), *evaluation(world, out / "run", 1)]
    ) == [0, 0]
    return out


def assert_same_router(folder, expected, within=1e-4):
    got, wanted = InContextRouter.from_pretrained(folder), InContextRouter.from_pretrained(expected)
    for side in ("query_pids", "key_pids"):
        a, b = getattr(got.pids, side), getattr(wanted.pids, side)
        assert (a @ a.mT - b @ b.mT).abs().max() <= 1e-6
    for a, b in zip(got.router.parameters(), wanted.router.parameters(), strict=True):
        assert (a - b).abs().max() <= within


def assert_same_table(run, expected):
    key = lambda record: record.key  # noqa: E731
    got, wanted = (sorted(records.read(out / "records.jsonl"), key=key) for out in (run, expected))
    assert [(r.key, r.prediction, r.n_tokens) for r in got] == [
        (r.key, r.prediction, r.n_tokens) for r in wanted
    ]
    assert table(run) == table(expected)
    assert not list(run.glob("records.*.jsonl"))


@pytest.mark.parametrize("n", [2, 3])
def test_n_processes_fit_and_measure_what_one_does(n, alone, world, encoder_folder, tmp_path):
    assert finish(fit(world, encoder_folder, tmp_path / "router", n)) == [0] * n
    assert_same_router(tmp_path / "router", alone / "router")
    assert finish(evaluation(world, tmp_path / "run", n)) == [0] * n
    assert_same_table(tmp_path / "run", alone / "run")


def test_in_bfloat16_processes_agree_to_what_it_rounds(world, encoder_folder, tmp_path):
    for n in (1, 2):  # prompts in batches of other sizes
        assert finish(fit(world, encoder_folder, tmp_path / f"{n}", n, torch.bfloat16)) == [0] * n
    assert_same_router(tmp_path / "2", tmp_path / "1", within=5e-3)


def test_a_fit_that_lost_a_process_ends_and_goes_on_with_another_number(
    alone, world, encoder_folder, tmp_path
):
    folder = tmp_path / "router"
    first = fit(world, encoder_folder, folder, 2)
    while not (folder / "fit" / "moments.safetensors").exists():
        assert first[0].is_alive(), "the fit was over before it could be stopped"
        time.sleep(0.002)
    os.kill(first[1].pid, signal.SIGKILL)
    assert finish(first) == [2, -signal.SIGKILL]
    assert not (folder / "config.json").exists()
    assert finish(fit(world, encoder_folder, folder, 3)) == [0] * 3
    assert_same_router(folder, alone / "router")


def test_an_evaluation_that_lost_a_process_goes_on_with_another_number(alone, world, tmp_path):
    run = tmp_path / "run"
    first = evaluation(world, run, 3)
    while not list(run.glob("records.*.jsonl")):
        assert first[0].is_alive(), "the run was over before it could be stopped"
        time.sleep(0.002)
    os.kill(first[2].pid, signal.SIGKILL)
    assert finish(first)[2] == -signal.SIGKILL
    with open(run / "records.1.jsonl", "ab") as file:
        file.write(b'{"method": "zero-shot", "task"')  # a line that the kill cut short
    assert finish(evaluation(world, run, 2)) == [0, 0]
    assert_same_table(run, alone / "run")


@pytest.mark.parametrize("option", ["--seed", "--data"])
def test_processes_that_were_told_different_things_are_refused(
    option, world, encoder_folder, tmp_path, capfd
):
    other = tmp_path / "data"
    for name in ("sst2", "mr"):
        (other / name).mkdir(parents=True)
        for split in ("train", "test"):
            lines = (world / "data" / name / f"{split}.jsonl").read_text().splitlines()
            (other / name / f"{split}.jsonl").write_text("\n".join(lines[1:]))
    values = {"--seed": [1, 2], "--data": [world / "data", other]}[option]
    where = ["--model", world / "model", "--data", world / "data", "--encoder", encoder_folder]
    processes = start(2, "fit", "--out", tmp_path / "router", *where, *FIT.split(), option, values)
    assert finish(processes) == [2, 2]
    what = {"--seed": "seed", "--data": "rows"}[option]
    assert f"the processes were started with different {what}" in capfd.readouterr().err
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
def test_both_launchers_start_it(launcher, world, encoder_folder, tmp_path):
    how = {
        "torch.distributed.run": "--nproc_per_node 2 --master_port 29533",
        "accelerate.commands.launch": "--cpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --num_cpu_threads_per_process 1 --main_process_port 29534",
    }[launcher]
    where = ["--model", world / "model", "--data", world / "data", "--encoder", encoder_folder]
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
