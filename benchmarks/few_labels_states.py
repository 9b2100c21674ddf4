"""What a frozen model makes of a task's prompts: its scores, and the states that heads may read.

    python -m benchmarks.few_labels_states --model MODEL --data ../shared/data --out STATES

A task is a file of STATES, so that a kill costs one task: of up to POOL training rows and ITEMS
test rows the labels, the options' logits, the state that the vocabulary head reads at the prompt's
last token, and the state that enters the routed layers there; of the test rows the options' logits
behind few-shot demonstrations as well (SHOTS a class, drawn once). `benchmarks.few_labels` does the
rest, which is arithmetic. With `--teacher` what is read is the pool's logits behind the same
demonstrations, into NAME.teacher.npz, for heads that are to answer as few-shot prompts do.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.calibrating import tasks_in
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hooks import edited_inputs
from icrouting.decoder.loading import load_model
from icrouting.decoder.scoring import option_ids, score
from icrouting.decoder.states import last_outputs
from icrouting.evaluation.runs import commit
from icrouting.routing.pids import late_third
from icrouting.tasks.prompts import balanced_demos, few_shot

POOL = 256
ITEMS = 200
SHOTS = 5


def read(decoder: Decoder, task, rows) -> dict[str, np.ndarray]:
    """Returns labels, scores and states of rows; rows with fewer options end in -inf."""
    base = decoder.base
    head = base.get_output_embeddings()
    prompts = [task.prompt(row) for row in rows]
    options = [task.options(row) for row in rows]
    middle = decoder.layers[late_third(decoder.dims.n_layers)[0]]
    # Scores are read off the last state, and not asked a second time.
    (entering, last), _ = last_outputs(decoder, [middle, head], prompts, edited_inputs)
    most = max(len(row_options) for row_options in options)
    scores = torch.full((len(rows), most), -torch.inf)
    weight = head.weight.detach().float()
    for place, (prompt, row_options) in enumerate(zip(prompts, options, strict=True)):
        ids = option_ids(decoder.tokenizer, prompt, row_options)
        scores[place, : len(ids)] = weight[ids] @ last[place]
    return {
        "labels": np.array([row.label for row in rows]),
        "scores": scores.numpy(),
        "entering": entering.numpy(),
        "last": last.numpy(),
    }


def demonstrations(task) -> list:
    """Returns the rows that stand before every few-shot prompt of a task."""
    return list(balanced_demos(task, SHOTS, np.random.default_rng(0)))


def few_shot_scores(decoder: Decoder, task, rows) -> np.ndarray:
    """Returns the rows' option scores behind demonstrations, the same for all."""
    turns = [(task, demo) for demo in demonstrations(task)]
    prompts = [few_shot(task, row, turns) for row in rows]
    options = [task.options(row) for row in rows]
    return score(decoder, prompts, options).float().numpy()


def zero_shot_file(decoder: Decoder, task) -> dict[str, np.ndarray]:
    """Returns what a task's file holds."""
    pool = list(task.train[:POOL])
    items = list(task.test[:ITEMS])
    rows = read(decoder, task, [*pool, *items])
    few_shot_logits = few_shot_scores(decoder, task, items)
    return {**rows, "n_pool": np.array(len(pool)), "few_shot": few_shot_logits}


def teacher_file(decoder: Decoder, task) -> dict[str, np.ndarray]:
    """Returns the pool's logits behind demonstrations, and which rows are none of these."""
    pool = list(task.train[:POOL])
    shown = demonstrations(task)
    # Behind itself, a prompt has its answer before it.
    is_new = [row not in shown for row in pool]
    return {"few_shot": few_shot_scores(decoder, task, pool), "is_new": np.array(is_new)}


def main() -> None:
    """Reads every task that has no file yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pinned:smollm2-135m", help="name or folder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--more", type=Path, help="a folder of further tasks' TOML files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", help="all, unless named")
    parser.add_argument("--teacher", action="store_true", help="read the pool behind few-shot")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    ending = ".teacher.npz" if arguments.teacher else ".npz"
    read_file = teacher_file if arguments.teacher else zero_shot_file
    loaders = dict(tasks_in(arguments.data, arguments.more))
    names = arguments.tasks or list(loaders)
    missing = [name for name in names if not (arguments.out / f"{name}{ending}").exists()]
    if not missing:
        return
    decoder = Decoder.of(*load_model(arguments.model))
    for name in missing:
        started = time.perf_counter()
        task = loaders[name]().bound_to(decoder.tokenizer)
        try:
            content = read_file(decoder, task)
        except ValueError as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        scratch = arguments.out / f"{name}.part.npz"
        np.savez_compressed(scratch, **content, commit=commit())
        scratch.replace(arguments.out / f"{name}{ending}")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
