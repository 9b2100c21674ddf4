"""A folder with a tiny model, data and a fitted router, and the commands that tests run there."""

import json

import tiny
from icrouting.cli import main

FIT = (
    "--n-prompts 9 --demos-per-class 1 --n-queries 9 --rank 2 --epochs 1 --tasks sst2 "
    "--hidden-width 5 --min-steps 0 --patience 0 --check 0"
)
EVALUATE = "--tasks sst2 mr --sources sst2 --n-test 7 --demos-per-class 1"


def make_world(folder, encoder_folder):
    """Fills a folder with a model, two tasks and a router fitted on one of them."""
    tiny.save(folder / "model")
    for name in ("sst2", "mr"):
        task = tiny.task(name, n_test=20)
        (folder / "data" / name).mkdir(parents=True)
        for split, rows in (("train", task.train), ("test", task.test)):
            write_rows(folder / "data" / name / f"{split}.jsonl", rows)
    fit(folder, encoder_folder, folder / "router")


def write_rows(file, rows):
    """Writes examples as a file of JSON lines."""
    lines = [json.dumps({"text": row.fields["text"], "label": row.label}) for row in rows]
    file.write_text("\n".join(lines))


def on(world):
    """The options that name a world's model and data."""
    return ["--model", str(world / "model"), "--data", str(world / "data")]


def fit(world, encoder_folder, out, *more):
    """Runs `icr fit` on a world's first task."""
    where = [*on(world), "--encoder", str(encoder_folder)]
    main.main(["fit", "--out", str(out), *where, *FIT.split(), *more])


def evaluate(world, out, *more):
    """Runs `icr eval` on a world's two tasks."""
    where = [*on(world), "--router", str(world / "router")]
    main.main(["eval", "--out", str(out), *where, *EVALUATE.split(), *more])
