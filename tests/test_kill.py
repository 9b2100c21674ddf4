"""A run that is killed five times at any point ends with the records and the table of one that was not."""

import multiprocessing
import os
import signal
import time

import numpy as np
import torch

from icrouting.cli import main
from icrouting.evaluation import evaluate, records
from test_cli import world  # noqa: F401

METHODS = "zero-shot calibration few-shot task-vectors task-vectors-once i2cl icr"


def run(arguments):
    """What the child does; a forked one would inherit torch's thread pool without its threads."""
    torch.set_num_threads(1)
    evaluate.CHUNK = 3
    main.main(arguments)


def start(world, out):
    where = [
        "--model",
        str(world / "model"),
        "--data",
        str(world / "data"),
        "--router",
        str(world / "router"),
    ]
    small = (
        "--tasks sst2 mr --sources sst2 --n-test 14 --demos-per-class 1 --i2cl-epochs 2 --seeds 0 1"
    )
    arguments = ["eval", "--out", str(out), *where, *small.split(), "--methods", *METHODS.split()]
    process = multiprocessing.get_context("spawn").Process(target=run, args=(arguments,))
    process.start()
    return process


def n_lines(out):
    file = out / "records.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def table(out):
    """The Markdown report without what time and command line have a say in."""
    scores, _, costs = (out / "report.md").read_text().partition("\n\nTime per example")
    assert "| method | times zero-shot |" in costs
    lines = [
        line.split(" | ")
        for line in scores.splitlines()
        if not line.startswith(("| ms per", "- Model"))
    ]
    timed = next(
        (line.index("ms per example") for line in lines if "ms per example" in line), None
    )  # many methods
    scores = [[cell for place, cell in enumerate(line) if place != timed] for line in lines]
    fits = costs.partition("What a fit costs")[2].splitlines()
    return [*scores, *(line.rpartition(" | ")[0] for line in fits)]  # whose last column is seconds


def test_five_kills_change_nothing(world, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(world, whole)
    process.join()
    assert process.exitcode == 0
    total, rng, n_killed = n_lines(whole), np.random.default_rng(4), 0
    for share in sorted(rng.uniform(0.05, 0.9, 5)):
        process = start(world, cut)
        while process.is_alive() and n_lines(cut) < share * total:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        n_killed += process.exitcode == -signal.SIGKILL
        with open(cut / "records.jsonl", "ab") as file:
            file.write(b'{"method": "zero-shot", "task"')  # a line that the kill cut short
    assert n_killed == 5
    assert 0 < n_lines(cut) < total
    process = start(world, cut)
    process.join()
    assert process.exitcode == 0
    key = lambda record: record.key  # noqa: E731
    found, expected = (sorted(records.read(out / "records.jsonl"), key=key) for out in (cut, whole))
    assert [(r.key, r.prediction, r.n_tokens) for r in found] == [
        (r.key, r.prediction, r.n_tokens) for r in expected
    ]
    assert all(
        np.allclose(a.option_logits, b.option_logits, atol=1e-4)
        for a, b in zip(found, expected, strict=True)
    )
    assert table(cut) == table(whole)
