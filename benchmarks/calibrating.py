"""What does calibration by unlabelled prompts give, by their number and by how skewed labels are?

    python -m benchmarks.calibrating --model pinned:smollm2-135m --data ../shared/data \\
        --more ../shared/data-diverse --scores scores/smollm2-135m \\
        --out benchmarks/results/calibrating/smollm2-135m.json
    python -m benchmarks.calibrating --summary --out FILE

The model answers up to ROWS rows of each task zero-shot, once; a task's scores are a file of
--scores, so that a kill costs one task. All else is arithmetic on these. In each draw a task's rows
are cut in halves: of one so many prompts are the unlabelled ones, on the other the accuracy is
taken. "natural" leaves the labels as they come, "even" draws all alike often, and a share makes one
label, drawn at random, so frequent in both halves. Rows are then drawn with repetition.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import load_model
from icrouting.decoder.scoring import score
from icrouting.evaluation import runs
from icrouting.routing.priors import WAYS, fewest_prompts, log_prior, log_probabilities
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.catalogue import SPECS
from icrouting.tasks.load import load_task

ROWS = 600
# Few rows say little of a half.
FEWEST_ROWS = 60
N_PROMPTS = (4, 8, 16, 32, 64, 128, 300)
LABELS = ("natural", "even", "0.6", "0.8")
DRAWS = 20
N_TEST = 300
N_BOOTSTRAP = 2000


def tasks_in(data: Path, more: Path | None):
    """Yields the name of each task that is there, and what loads it."""
    for name in SPECS:
        if (data / name).is_dir():
            yield name, lambda name=name: load_task(name, data)
    if more is not None:
        for file in sorted(more.glob("*/*.toml")):
            yield file.stem, lambda file=file: load_task(str(file), "")


def collect(arguments: argparse.Namespace) -> None:
    """Writes the zero-shot scores and labels of every task that has no file yet."""
    folder = arguments.scores
    folder.mkdir(parents=True, exist_ok=True)
    known = tasks_in(arguments.data, arguments.more)
    missing = [each for each in known if not (folder / f"{each[0]}.npz").exists()]
    if not missing:
        return
    decoder = Decoder.of(*load_model(arguments.model))
    for name, loaded in missing:
        task = loaded().bound_to(decoder.tokenizer)
        n_rows = arguments.rows if name in SPECS else arguments.more_rows
        rows = [*task.train, *task.validation, *task.test][:n_rows]
        prompts = [task.prompt(row) for row in rows]
        options = [task.options(row) for row in rows]
        try:
            scores = score(decoder, prompts, options, label_scoring=task.spec.label_scoring)
        except ValueError as error:
            print(f"{name}: left out, {error}")
            continue
        labels = [row.label for row in rows]
        n_options = [len(row_options) for row_options in options]
        scratch = folder / f"{name}.part.npz"
        np.savez(scratch, scores=scores.double().numpy(), labels=labels, n=n_options)
        scratch.replace(folder / f"{name}.npz")
        print(f"{name}: {len(rows)} rows", flush=True)


def scores_of(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns log-probabilities and labels by task, of rows with the usual number of options."""
    scores_by_task = {}
    for file in sorted(folder.glob("*.npz")):
        content = np.load(file)
        usual = np.bincount(content["n"]).argmax()
        chosen = content["n"] == usual
        scores, labels = content["scores"][chosen, :usual], content["labels"][chosen]
        if len(labels) >= FEWEST_ROWS and len(np.unique(labels)) == usual:
            scores_by_task[file.stem] = log_probabilities(scores), labels
    return scores_by_task


def drawn(labels: np.ndarray, half: np.ndarray, kind: str, top: int, size: int, rng) -> np.ndarray:
    """Returns places within a half whose labels are as frequent as `kind` says."""
    if kind == "natural":
        return half[:size]
    n_labels = labels.max() + 1
    share = 1 / n_labels if kind == "even" else float(kind)
    shares = np.full(n_labels, (1 - share) / (n_labels - 1))
    shares[top] = share
    places = []
    for label, n_rows in enumerate(rng.multinomial(size, shares)):
        pool = half[labels[half] == label]
        if len(pool):
            places.append(rng.choice(pool, n_rows))
    return np.concatenate(places)


def accuracies(scores_by_task, kind: str, n_prompts: int) -> dict[str, np.ndarray]:
    """Returns the accuracy of each way, one a task and draw."""
    columns = {way: [] for way in ("raw", *WAYS)}
    for log_probs, labels in scores_by_task.values():
        n_options = log_probs.shape[1]
        for draw in range(DRAWS):
            rng = np.random.default_rng([draw, n_prompts])
            first, second = np.array_split(rng.permutation(len(labels)), 2)
            top = rng.integers(n_options)
            batch = log_probs[drawn(labels, first, kind, top, n_prompts, rng)]
            test = drawn(labels, second, kind, top, N_TEST, rng)
            for way, column in columns.items():
                prior = 0.0
                # With fewer prompts than options, calibration is refused.
                if way != "raw" and len(batch) >= fewest_prompts(n_options):
                    prior = log_prior(batch, way)
                predictions = (log_probs[test] - prior).argmax(1)
                column.append((predictions == labels[test]).mean())
    n_tasks = len(scores_by_task)
    return {way: np.array(column).reshape(n_tasks, DRAWS) for way, column in columns.items()}


def measured(scores_by_task) -> list[dict]:
    """Returns a record for each kind of labels, number of prompts and way."""
    records = []
    for kind in LABELS:
        for n_prompts in N_PROMPTS:
            by_way = accuracies(scores_by_task, kind, n_prompts)
            for way, column in by_way.items():
                gains = (column - by_way["raw"]).mean(1)
                means = np.random.default_rng(0).choice(gains, (N_BOOTSTRAP, len(gains))).mean(1)
                low, high = np.quantile(means, [0.025, 0.975])
                records.append(
                    {
                        "labels": kind,
                        "prompts": n_prompts,
                        "way": way,
                        "accuracy": column.mean(),
                        "gain": gains.mean(),
                        "low": low,
                        "high": high,
                        "tasks_below": int((gains < -0.01).sum()),
                    }
                )
    return records


def summarise(content: dict) -> None:
    """Prints the table of a record."""
    print(
        f"{content['model']}, {len(content['tasks'])} tasks; gains with 95 % intervals over tasks"
    )
    print(f"| labels | prompts | raw | {' | '.join(WAYS)} |")
    print("|---|---|---|" + "---|" * len(WAYS))
    cells = {(each["labels"], each["prompts"], each["way"]): each for each in content["records"]}
    for kind in LABELS:
        for n_prompts in N_PROMPTS:
            raw = cells[kind, n_prompts, "raw"]
            texts = []
            for way in WAYS:
                each = cells[kind, n_prompts, way]
                ends = f"{100 * each['low']:+.1f} to {100 * each['high']:+.1f}"
                texts.append(f"{100 * each['accuracy']:.1f} ({ends})")
            print(f"| {kind} | {n_prompts} | {100 * raw['accuracy']:.1f} | {' | '.join(texts)} |")


def main() -> None:
    """Measures, or prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pinned:smollm2-135m", help="name or folder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--more", type=Path, default=None, help="folder of task files")
    parser.add_argument("--scores", type=Path, default=Path("scores"), help="what is kept")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a task, at most")
    parser.add_argument("--more-rows", type=int, default=ROWS, help="of a task of --more, at most")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", action="store_true", help="print the table, measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.summary:
        collect(arguments)
        scores_by_task = scores_of(arguments.scores)
        content = {
            "command": f"python -m benchmarks.{runs.command().replace('.py', '', 1)}",
            "commit": runs.commit(),
            "model": Path(arguments.model.removeprefix("pinned:")).name,
            "rows": f"{arguments.rows} of a task; {arguments.more_rows} of those of --more",
            "draws": DRAWS,
            "tasks": {name: len(labels) for name, (_, labels) in scores_by_task.items()},
            "records": measured(scores_by_task),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        save_json(arguments.out, content)
    summarise(load_json(arguments.out))


if __name__ == "__main__":
    main()
