"""What could routing add on tasks that nobody fitted? An oracle, fitted on each of them by itself.

    python -m benchmarks.diagnosis --model qwen2.5-coder-1.5b --data ../shared/data --out RECORDS
    python -m benchmarks.diagnosis --summary --out RECORDS

For each of the paper's seven unseen tasks the directions are extracted from a few of its own
few-shot prompts, and routers are trained on some of its labelled rows: nobody has these labels on
an unseen task, so what such a router gains is what the mechanism has to give there. Beside it stand
what the same labels give without routing: a bias on the options, and a linear probe on the state
that routing reads anyway. Every answer is scored as it is, and without its prior over the test rows
(batch calibration), of whose labels none is read.

    plain           two epochs at the usual learning rate
    longer          so many steps that each row is read EPOCHS times, at three times the rate
    taken           as plain, on log-probabilities whose running mean is taken away
    taken-longer    as longer, on those
    constant        as longer, by a router that reads the same of every prompt

`benchmarks.reach` asks the same more widely (held-back rows, a dozen variants, the few-shot
teacher, how well few-shot traces are predicted) and takes ten times as long; nothing of it was run
on 1.5B.

A line of OUT/records.jsonl is a task and a way, with the scores of its test rows; none is computed
twice.
"""

import argparse
import dataclasses
import json
import time
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV

from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import load_model
from icrouting.decoder.scoring import score
from icrouting.evaluation.runs import commit
from icrouting.fitting import queries as reading
from icrouting.fitting import stages
from icrouting.fitting.training import Trainer
from icrouting.fitting.trunk import pad_states
from icrouting.routing.features import features_of
from icrouting.routing.pids import late_third
from icrouting.routing.priors import without_prior
from icrouting.routing.router import Router
from icrouting.runtime.storage import save_json
from icrouting.tasks.load import load_task
from icrouting.tasks.prompts import balanced_demos, few_shot

TASKS = ("sst5", "mr", "copa", "creak", "cb", "mrpc", "ai2scie")
EPOCHS = 6
# A mean over as many queries as 1 / RATE says.
RATE = 0.03
BASE = FitConfig(
    encoder="pinned:minilm", n_prompts=24, queries_per_context=8, min_steps=0, patience=0, epochs=2
)
LONGER = {"epochs": EPOCHS, "lr": 3e-4}
ROUTERS = {
    "plain": {},
    "taken": {},
    "longer": LONGER,
    "taken-longer": LONGER,
    "constant": LONGER,
}
# What costs no training of a router.
BESIDE = ("zero-shot", "few-shot", "bias", "probe")
BATCH = 8
N_BOOTSTRAP = 10_000


class Taken(Trainer):
    """A training on log-probabilities over the options whose running mean is taken away."""

    def _cross_entropy(self, logits, queries):
        losses = []
        means = vars(self).setdefault("means", {})
        for row, query in enumerate(queries):
            log_probs = logits[row, query.option_ids].float().log_softmax(0)
            key = len(query.option_ids)
            last_mean = means.get(key, log_probs.detach())
            means[key] = last_mean + RATE * (log_probs.detach() - last_mean)
            losses.append(-(log_probs - means[key]).log_softmax(0)[query.label])
        return torch.stack(losses).mean()


class Cell:
    """One task: what all ways share is computed once."""

    def __init__(self, decoder: Decoder, features, task, n_train: int, n_test: int):
        self.decoder = decoder
        self.features = features
        self.task = task
        self.layers = late_third(decoder.dims.n_layers)
        self.config = dataclasses.replace(BASE, n_queries=n_train)
        self.test = list(task.test[:n_test])
        self.seconds: dict[str, float] = {}
        with self.timed("directions"):
            self.pids = stages.extract_pids(decoder, [task], self.layers, self.config, None)
        with self.timed("training rows"):
            self.queries, self.scale = reading.training_queries(
                decoder, [task], features, self.layers[0], self.config
            )
        with self.timed("test rows"):
            examples = [(task, row) for row in self.test]
            read = reading._read(decoder, examples, features, self.layers[0], self.config, None)
            self.asked = reading._queries(examples, read, range(len(examples)), self.scale)

    def timed(self, name: str):
        """A context that notes its seconds."""
        return _Timed(self.seconds, name)

    def scores(self, way: str) -> torch.Tensor:
        """Returns the option scores of the test rows, padded by -inf."""
        if way == "zero-shot":
            return self._scored([self.task.prompt(row) for row in self.test])
        if way == "few-shot":
            demos = balanced_demos(self.task, self.config.demos_per_class, np.random.default_rng(0))
            turns = [(self.task, demo) for demo in demos]
            return self._scored([few_shot(self.task, row, turns) for row in self.test])
        if way in ("bias", "probe"):
            return self._learned_beside(way)
        return self._routed(way)

    def _scored(self, prompts):
        options = [self.task.options(row) for row in self.test]
        return score(self.decoder, prompts, options)

    def _learned_beside(self, way: str) -> torch.Tensor:
        """What labels give without routing; a class that has no row is never answered."""
        if way == "bias":
            # The plain model's scores of training and test rows: routing of strength zero.
            trainer = self._trainer("plain")
            train, test = (self._ask(trainer, asked, 0.0) for asked in (self.queries, self.asked))
            return _with_bias(train, [query.label for query in self.queries], test)
        states = [
            torch.stack([query.state.hidden[-1].float() for query in asked]).numpy()
            for asked in (self.queries, self.asked)
        ]
        center = states[0].mean(0)
        scale = states[0].std() + 1e-6
        labels = np.array([query.label for query in self.queries])
        probe = LogisticRegressionCV(Cs=np.logspace(-5, 0, 6), cv=3, max_iter=500)
        with warnings.catch_warnings():
            # Of what later versions will call things, and of a fold without a rare class.
            warnings.simplefilter("ignore")
            probe.fit((states[0] - center) / scale, labels)
        n_options = max(len(self.task.options(row)) for row in self.test)
        log_probs = np.full((len(self.test), n_options), -30.0)
        kept = [label for label in probe.classes_ if label < n_options]
        places = [list(probe.classes_).index(label) for label in kept]
        log_probs[:, kept] = probe.predict_log_proba((states[1] - center) / scale)[:, places]
        return torch.from_numpy(log_probs).float()

    def _trainer(self, way: str) -> Trainer:
        config = dataclasses.replace(self.config, **ROUTERS[way])
        router = Router(
            self.features.n_features,
            len(self.layers),
            self.decoder.dims.n_heads,
            config.rank,
            config.hidden_width,
            torch.Generator().manual_seed(config.seed),
        )
        queries = self.queries
        if way == "constant":
            queries = [_blind(query) for query in queries]
        kind = Taken if way.startswith("taken") else Trainer
        return kind(self.decoder, self.pids, router, queries, config)

    def _routed(self, way: str) -> torch.Tensor:
        trainer = self._trainer(way)
        trainer.run()
        self.n_steps = trainer.step
        asked = self.asked
        if way == "constant":
            asked = [_blind(query) for query in asked]
        return self._ask(trainer, asked, trainer.config.final_alpha_scale)

    @torch.no_grad()
    def _ask(self, trainer: Trainer, asked, scale: float) -> torch.Tensor:
        from icrouting.decoder.partial import late_entry
        from icrouting.routing.attach import attach

        n_options = max(len(query.option_ids) for query in asked)
        scores = torch.full((len(asked), n_options), -torch.inf)
        order = sorted(range(len(asked)), key=lambda row: len(asked[row].state.tokens))
        model = self.decoder.model
        with attach(model, self.pids) as attachment, late_entry(model, self.layers[0]) as entry:
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                features = torch.stack([asked[row].features for row in rows])
                attachment.routing = trainer.router(features).scaled(scale)
                batch, hidden = pad_states([asked[row].state for row in rows], self.decoder.pad_id)
                for row, logits in zip(rows, entry(batch, hidden).float(), strict=True):
                    ids = asked[row].option_ids
                    scores[row, : len(ids)] = logits[ids]
        return scores


class _Timed:
    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds = seconds
        self.name = name

    def __enter__(self):
        self.started = time.perf_counter()

    def __exit__(self, *error):
        self.seconds[self.name] = round(time.perf_counter() - self.started, 1)


def _blind(query):
    """A query of whose prompt the router reads nothing."""
    return dataclasses.replace(query, features=torch.zeros_like(query.features))


def _with_bias(train, labels, test):
    """Returns test scores with the bias on the options that fits the training labels best."""
    bias = torch.zeros(max(train.shape[1], test.shape[1]), requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=100)
    log_probs = train.log_softmax(1)
    targets = torch.tensor(labels)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(log_probs + bias[: train.shape[1]], targets)
        # A label that no row has would be pushed down without end.
        loss = loss + 1e-3 * bias.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return test + bias.detach()[: test.shape[1]]


def records_of(file: Path) -> list[dict]:
    """Returns what has been measured."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def measure(arguments: argparse.Namespace) -> None:
    """Computes the ways of every task that are not there yet."""
    file = arguments.out / "records.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    name = Path(arguments.model.removeprefix("pinned:")).name
    there = {(each["model"], each["task"], each["way"]) for each in records_of(file)}
    decoder = Decoder.of(*load_model(arguments.model))
    features = features_of(BASE.encoder, decoder, "cpu")
    for task_name in arguments.tasks:
        ways = [way for way in arguments.ways if (name, task_name, way) not in there]
        if not ways:
            continue
        task = load_task(task_name, arguments.data).bound_to(decoder.tokenizer)
        cell = Cell(decoder, features, task, arguments.rows, arguments.items)
        for way in ways:
            with cell.timed(way):
                scores = cell.scores(way)
            record = {
                "model": name,
                "task": task_name,
                "way": way,
                "rows": len(cell.queries),
                "labels": [row.label for row in cell.test],
                "scores": [[round(x, 4) for x in row if x > -1e9] for row in scores.tolist()],
                "seconds": cell.seconds[way],
                "commit": commit(),
            }
            with file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
            raw = right_of(record, "raw").mean()
            calibrated = right_of(record, "batch").mean()
            print(
                f"{task_name} {way}: {raw:.3f}, calibrated {calibrated:.3f}",
                cell.seconds,
                flush=True,
            )


def right_of(record: dict, form: str) -> np.ndarray:
    """Returns which test rows are right: as they are ("raw"), or without their prior."""
    rows_by_count = defaultdict(list)
    for place, row in enumerate(record["scores"]):
        rows_by_count[len(row)].append(place)
    right = np.zeros(len(record["scores"]))
    for n_options, places in rows_by_count.items():
        scores = np.array([record["scores"][place] for place in places])
        if form != "raw" and len(places) >= max(2, n_options):
            scores = without_prior(scores, form)
        labels = np.array([record["labels"][place] for place in places])
        right[places] = scores.argmax(1) == labels
    return right


def summarise(file: Path) -> None:
    """Prints the table: every way raw and calibrated, and its gain beyond calibration.

    The gains go into summary.json beside the records, with those over "plain" on the same tasks.
    """
    lines = records_of(file)
    summary = {}
    for model in dict.fromkeys(each["model"] for each in lines):
        by_place = {(each["task"], each["way"]): each for each in lines if each["model"] == model}
        tasks = [task for task in TASKS if (task, "zero-shot") in by_place]
        print(f"\n{model}: {len(tasks)} of {len(TASKS)} tasks")
        print(f"| way | {' | '.join(tasks)} | mean raw | mean calibrated | guarded | beyond |")
        print("|---|" + "---|" * (len(tasks) + 4))
        for way in (*BESIDE, *ROUTERS):
            done = [task for task in tasks if (task, way) in by_place]
            if not done:
                continue
            right = {
                form: {task: right_of(by_place[task, way], form) for task in done}
                for form in ("raw", "batch", "guarded")
            }
            cells = []
            for task in tasks:
                pair = (
                    [f"{100 * right[form][task].mean():.0f}" for form in ("raw", "batch")]
                    if task in done
                    else ["-"]
                )
                cells.append(" / ".join(pair))
            means = [
                f"{100 * np.mean([right[form][task].mean() for task in done]):.1f}"
                for form in ("raw", "batch", "guarded")
            ]
            gaps = [
                right["batch"][task] - right_of(by_place[task, "zero-shot"], "batch")
                for task in done
            ]
            over_plain = [
                right["batch"][task] - right_of(by_place[task, "plain"], "batch")
                for task in done
                if (task, "plain") in by_place
            ]
            summary.setdefault(model, {})[way] = {
                "tasks": len(done),
                "beyond": estimated(gaps),
                "over plain": estimated(over_plain) if over_plain else None,
            }
            note = "" if len(done) == len(tasks) else f" ({len(done)} tasks)"
            print(f"| {way}{note} | {' | '.join([*cells, *means, interval(gaps)])} |")
    save_json(file.parent / "summary.json", summary)


def estimated(gaps: list[np.ndarray]) -> dict[str, float]:
    """Returns a mean over tasks in points, with a bootstrap interval over their items."""
    rng = np.random.default_rng(0)
    means = np.zeros(N_BOOTSTRAP)
    for task_gaps in gaps:
        draws = rng.integers(len(task_gaps), size=(N_BOOTSTRAP, len(task_gaps)))
        means += task_gaps[draws].mean(1) / len(gaps)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = np.mean([task_gaps.mean() for task_gaps in gaps])
    return {"value": 100 * float(mean), "low": 100 * float(low), "high": 100 * float(high)}


def interval(gaps: list[np.ndarray]) -> str:
    """Returns `estimated` as a text."""
    gap = estimated(gaps)
    return f"{gap['value']:+.1f} ({gap['low']:.1f} to {gap['high']:.1f})"


def main() -> None:
    """Measures, or prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pinned:smollm2-135m", help="name or folder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/diagnosis"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--ways", nargs="+", default=[*BESIDE, *ROUTERS])
    parser.add_argument("--rows", type=int, default=100, help="training rows a task")
    parser.add_argument("--items", type=int, default=60, help="test rows a task")
    parser.add_argument("--summary", action="store_true", help="print the table, fit nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.summary:
        summarise(arguments.out / "records.jsonl")
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
