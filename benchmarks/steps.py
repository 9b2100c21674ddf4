"""How many steps does a fit need, and when should it stop? Accuracy at 16 to 1,000 rows.

    python -m benchmarks.steps --model pinned:smollm2-135m --ways before long all --draws 0
    python -m benchmarks.steps --model pinned:smollm2-135m --ways before after
    python -m benchmarks.steps --curves
    python -m benchmarks.steps --summary

A cell is a model, a task, a number of labelled rows and a draw of them; ICR is fitted on these rows
alone, a fifth of which is the validation slice, and asked 200 test rows, the same for all cells of
a task. The ways to fit a cell:

    before  as it was: two epochs, whatever the number of rows, and the last router
    long    LONG steps; the accuracy at every 100th says what a fit of so many steps would have had
    all     the same, with the validation rows learned from, where they are too few to validate on
    after   the defaults of `FitConfig`

All ways of a cell share its directions. Each result is a line of OUT/records.jsonl as soon as it is
there, and none is computed twice.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import load_model
from icrouting.decoder.scoring import score
from icrouting.evaluation.runs import commit
from icrouting.fitting import queries as reading
from icrouting.fitting import stages
from icrouting.fitting.rows import rows_to_learn_from
from icrouting.fitting.training import Trainer
from icrouting.fitting.validation import answered
from icrouting.routing.features import features_of
from icrouting.routing.pids import late_third
from icrouting.routing.router import Router
from icrouting.tasks.load import load_task
from icrouting.tasks.splits import make_task

TASKS = ("trec", "sst2", "emotion", "subj", "agnews")
ROWS = (16, 32, 64, 128, 256, 1000)
DRAWS = (0, 1, 2)
WAYS = ("before", "long", "all", "after")
N_TEST = 200
LONG = 400
EVERY = 100
# Contexts are shared, which makes the extraction ten times shorter and no way better than another.
BASE = FitConfig(encoder="pinned:minilm", queries_per_context=10)
N_BOOTSTRAP = 10_000


def config_of(way: str) -> FitConfig:
    """Returns the settings that a way fits with."""
    settings = {
        "before": {"min_steps": 0, "patience": 0},
        "long": {"min_steps": LONG, "patience": 0},
        # Patience asks for the validation rows, and as they are few it gets none.
        "all": {"min_steps": LONG, "patience": 1},
        "after": {},
    }
    return dataclasses.replace(BASE, **settings[way])


class Watched(Trainer):
    """A training that is asked the test rows as it goes; `curve` is what came."""

    test = ()
    asks = False

    def _judge(self, entry, attachment):
        super()._judge(entry, attachment)
        is_last = self.step == self.n_steps or self.watch.is_over
        if self.asks and (self.step % EVERY == 0 or is_last) and self.step not in self.curve:
            look = answered(self.test, self.router, self.decoder, entry, attachment, self.config)
            self.curve[self.step] = {"loss": look[0], "accuracy": look[1]}


def draw(name: str, n_rows: int, seed: int):
    """Returns a task of `n_rows` drawn labelled rows and the first test rows."""
    whole = load_task(name, "pinned:staicc")
    rows = (*whole.train, *whole.validation)
    places = np.random.default_rng(seed).permutation(len(rows))[:n_rows]
    return make_task(whole.spec, [rows[place] for place in places], whole.test[:N_TEST])


class World:
    """A model and what reads prompts for it; what it made of a task's test rows is kept."""

    def __init__(self, name: str):
        model, tokenizer = load_model(name)
        self.decoder = Decoder.of(model, tokenizer)
        self.features = features_of(BASE.encoder, self.decoder, "cpu")
        self.layers = late_third(self.decoder.dims.n_layers)
        self.tests = {}

    def read(self, task, rows):
        """Returns examples, and what the trunk and the encoder make of them."""
        examples = [(task, row) for row in rows]
        read = reading._read(self.decoder, examples, self.features, self.layers[0], BASE, None)
        return examples, read

    def test_of(self, task):
        """Returns a task's test rows as read, and the untouched model's accuracy on them."""
        if task.name not in self.tests:
            prompts = [task.prompt(row) for row in task.test]
            scores = score(self.decoder, prompts, task.spec.options)
            labels = torch.tensor([row.label for row in task.test])
            zero_shot = (scores.argmax(1) == labels).float().mean().item()
            self.tests[task.name] = self.read(task, task.test), zero_shot
        return self.tests[task.name]


class Cell:
    """One task's rows on one model: the directions are computed once, and every way fits."""

    def __init__(self, world: World, task):
        self.decoder = world.decoder
        self.features = world.features
        self.layers = world.layers
        self.world = world
        self.task = task
        self.test, self.zero_shot = world.test_of(task)
        self.pids = stages.extract_pids(self.decoder, [task], self.layers, BASE, None)
        self.learned = {}

    def _queries(self, read, scale):
        examples, parts = read
        return reading._queries(examples, parts, range(len(examples)), scale)

    def _learned(self, config):
        n_rows = len(rows_to_learn_from(self.task, [self.task], config))
        if n_rows not in self.learned:
            place = (self.decoder, [self.task], self.features)
            self.learned[n_rows] = reading.training_queries(*place, self.layers[0], config)
        return self.learned[n_rows]

    def fit(self, way: str) -> dict:
        """Returns what a way's router answers on the test rows, and what its fit took."""
        config = config_of(way)
        start = time.perf_counter()
        queries, scale = self._learned(config)
        held = []
        # However few they are, a long training is looked at.
        is_validated = config.watches(len(queries)) and len(queries) == len(self.task.train)
        if way == "long" or is_validated:
            held = self._queries(self.world.read(self.task, self.task.validation), scale)
        test = self._queries(self.test, scale)

        def untrained():
            return Router(
                self.features.n_features,
                len(self.layers),
                self.decoder.dims.n_heads,
                config.rank,
                config.hidden_width,
                torch.Generator().manual_seed(config.seed),
            )

        if way in ("long", "all"):
            trainer = Watched(self.decoder, self.pids, untrained(), queries, config, None, held)
            trainer.curve = {}
            trainer.asks = True
            trainer.test = test
            trainer.run()
        else:
            trainer = stages.train(self.decoder, self.pids, untrained, queries, held, config)
        router = trainer.router
        seconds = time.perf_counter() - start
        # The router that was kept, by another way: a training of no step.
        asked = Watched(
            self.decoder, self.pids, router, queries, dataclasses.replace(config, min_steps=0)
        )
        asked.n_steps = asked.step = 0
        asked.curve = {}
        asked.asks = True
        asked.test = test
        asked.run()
        best = trainer.watch.best_look
        return {
            "accuracy": asked.curve[0]["accuracy"],
            "loss": asked.curve[0]["loss"],
            "n_learned": len(queries),
            "n_held": len(held),
            "n_steps": trainer.step,
            "n_kept": best.step if best and trainer.watch.best else trainer.step,
            "looks": [dataclasses.asdict(look) for look in trainer.watch.looks],
            "curve": getattr(trainer, "curve", {}),
            "chosen": dataclasses.asdict(trainer.chosen) if trainer.chosen else None,
            "min_steps": config.min_steps,
            "patience": config.patience,
            "seconds": round(seconds, 1),
        }


KEYS = ["model", "task", "rows", "draw", "way"]


def records_of(file: Path) -> list[dict]:
    """Returns what has been measured."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def measure(arguments: argparse.Namespace) -> None:
    """Fits whatever cells are not there yet, small ones first."""
    file = arguments.out / "records.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    there = {tuple(record[key] for key in KEYS) for record in records_of(file)}
    world = World(arguments.model)
    name = Path(arguments.model.removeprefix("pinned:")).name
    for seed in arguments.draws:
        for n_rows in arguments.rows:
            for task_name in arguments.tasks:
                place = (name, task_name, n_rows, seed)
                ways = [way for way in arguments.ways if (*place, way) not in there]
                # As many rows hold a slice that can be validated on.
                if "all" in ways and n_rows // 5 >= reading.FEWEST_HELD:
                    ways.remove("all")
                if not ways:
                    continue
                start = time.perf_counter()
                cell = Cell(world, draw(task_name, n_rows, seed))
                zero_shot = cell.zero_shot
                extracted = time.perf_counter() - start
                for way in ways:
                    record = dict(zip(KEYS, (*place, way), strict=True))
                    record |= {"zero_shot": zero_shot, **cell.fit(way), "commit": commit()}
                    with file.open("a") as stream:
                        stream.write(json.dumps(record) + "\n")
                    print(
                        *place,
                        way,
                        f"zero-shot {zero_shot:.3f} accuracy {record['accuracy']:.3f}",
                        f"steps {record['n_steps']} kept {record['n_kept']}",
                        f"seconds {extracted:.0f} + {record['seconds']:.0f}",
                        flush=True,
                    )


def interval(values: np.ndarray) -> str:
    """Returns a mean in points, with a bootstrap interval over the cells."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (N_BOOTSTRAP, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{100 * values.mean():+.1f} ({100 * low:.1f} to {100 * high:.1f})"


def summarise(file: Path) -> None:
    """Prints, for each model and number of rows, the accuracy before and after."""
    lines = pd.DataFrame(records_of(file)).drop_duplicates(KEYS, keep="last")
    print("| model | rows | cells | zero-shot | before | after | after - before | not run |")
    print("|---|---|---|---|---|---|---|---|")
    wanted = len(TASKS) * len(DRAWS)
    for model in dict.fromkeys(lines.model):
        for n_rows in ROWS:
            chosen = lines[(lines.model == model) & (lines.rows == n_rows)]
            pairs = chosen.pivot_table(index=["task", "draw"], columns="way", values="accuracy")
            pairs = pairs.reindex(columns=["before", "after"]).dropna()
            if pairs.empty:
                print(f"| {model} | {n_rows} | 0 | | | | | all {wanted} |")
                continue
            zero_shot = chosen.groupby(["task", "draw"]).zero_shot.first()[pairs.index]
            gain = (pairs.after - pairs.before).to_numpy()
            figures = [f"{100 * column.mean():.1f}" for column in (zero_shot, pairs.before)]
            figures += [f"{100 * pairs.after.mean():.1f}", interval(gain)]
            missing = wanted - len(pairs)
            print(f"| {model} | {n_rows} | {len(pairs)} | {' | '.join(figures)} | {missing} |")


def show_curves(file: Path) -> None:
    """Prints the mean accuracy on the test rows at steps of the long trainings."""
    lines = pd.DataFrame(records_of(file)).drop_duplicates(KEYS, keep="last")
    for (model, n_rows, way), cells in lines[lines.way.isin(["long", "all"])].groupby(
        ["model", "rows", "way"]
    ):
        curves = pd.DataFrame(
            [{int(step): look["accuracy"] for step, look in curve.items()} for curve in cells.curve]
        )
        means = (100 * curves.mean()).sort_index()
        text = "  ".join(f"{step}: {value:.1f}" for step, value in means.items())
        print(f"{model}, {n_rows} rows, {way}, {len(cells)} cells: {text}")


def main() -> None:
    """Measures, or prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pinned:smollm2-135m", help="name or folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/steps"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--draws", nargs="+", type=int, default=DRAWS)
    parser.add_argument("--ways", nargs="+", default=["before", "after"], choices=WAYS)
    parser.add_argument("--summary", action="store_true", help="print the table, fit nothing")
    parser.add_argument("--curves", action="store_true", help="print the long trainings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.summary:
        summarise(arguments.out / "records.jsonl")
    elif arguments.curves:
        show_curves(arguments.out / "records.jsonl")
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
