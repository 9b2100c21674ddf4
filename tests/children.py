"""Processes that run a command of ours, forked from a server that has imported what all need.

Importing torch and transformers takes seconds, and tests start dozens of processes: the server
does it once. It only imports, so a child inherits no pool of threads that was started elsewhere.
"""

import multiprocessing
import os
import signal
import socket

import torch

from commands import on
from icrouting.cli import main
from icrouting.decoder import loading
from icrouting.evaluation import evaluate
from icrouting.fitting import extraction

PATIENCE_SECONDS = 240
FIT = (
    "--n-prompts 23 --demos-per-class 1 --n-queries 13 --rank 2 --epochs 2 --batch-size 4 "
    "--lr 0.01 --tasks sst2 mr --hidden-width 5 --min-steps 0 --patience 0 --check 0"
)
EVALUATE = (
    "--tasks sst2 mr --sources sst2 --n-test 14 --demos-per-class 1 --i2cl-epochs 1 --seeds 0 1 "
    "--methods zero-shot calibration few-shot task-vectors task-vectors-once i2cl icr icr-constant "
    "icr-uniform-gates-once"
)
# What a fit and an evaluation of a tiny model import, often inside functions.
PRELOADED = [
    "icrouting.cli.evaluate",
    "icrouting.cli.fit",
    "icrouting.cli.main",
    "icrouting.report.page",
    "sentence_transformers",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)


def child(rank, n_processes, port, arguments, dtype, log):
    """One of some processes, placed as `torchrun` would place it."""
    if log is not None:
        # The server's own standard error is that of the test which started it.
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if n_processes > 1:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": n_processes,
            "LOCAL_WORLD_SIZE": n_processes,
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    # Small pieces, so that a kill falls between them as it does in a long run.
    extraction.BLOCK = 5
    extraction.SAVE_EVERY_SECONDS = 0.0
    evaluate.CHUNK = 3
    loading.default_dtype = lambda: dtype
    main.main(arguments)


def start(n_processes, *arguments, dtype=torch.float32, log=None):
    """Starts processes with the same arguments, or each with its own where an argument is a list.

    What they write to standard error goes to the file `log`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(n_processes):
        mine = [
            str(argument[rank]) if isinstance(argument, list) else str(argument)
            for argument in arguments
        ]
        process = SERVER.Process(target=child, args=(rank, n_processes, port, mine, dtype, log))
        process.start()
        started.append(process)
    return started


def start_fit(world, encoder_folder, out, n_processes, dtype=torch.float32):
    """Starts a fit on a world's two tasks."""
    where = [*on(world), "--encoder", encoder_folder]
    return start(n_processes, "fit", "--out", out, *where, *FIT.split(), dtype=dtype)


def start_evaluation(world, out, n_processes):
    """Starts an evaluation of nine methods on a world's two tasks."""
    where = [*on(world), "--router", world / "router"]
    return start(n_processes, "eval", "--out", out, *where, *EVALUATE.split())


def finish(processes):
    """Exit codes of processes, once all have ended."""
    for process in processes:
        process.join(PATIENCE_SECONDS)
    return [process.exitcode for process in processes]


def kill(process):
    """Kills a process at once, as a lost machine would; whether it was alive to be killed."""
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL
