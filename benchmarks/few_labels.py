"""What do a few labels a class give at zero-shot length, beside calibration and few-shot prompts?

    python -m benchmarks.few_labels --states STATES --out RECORD
    python -m benchmarks.few_labels --summary --out RECORD

STATES is a folder of `benchmarks.few_labels_states`. Of each task up to 256 training rows are the
pool: all of their prompts are there without labels, and in each of DRAWS draws so many rows a class
with them.

    zero-shot    nothing
    calibrated   the prior of the pool's prompts is taken away ("guarded")
    self-taught  a probe on the states, trained on what `calibrated` says of the pool
    probe        a probe on the states, trained on the labelled rows
    residual     the method `probe-residual`: a correction of the model's own scores, sized by
                 cross-validation
    few-shot     five demonstrations a class before every prompt, one draw
    distilled    the same correction, fitted to what few-shot prompts answer to the pool's prompts:
                 five labels a class, those of the demonstrations (where there is a teacher's file)
                 "calibrated" is to what they answer without their prior
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from benchmarks.diagnosis import estimated
from icrouting.evaluation.runs import commit
from icrouting.methods.batch_calibration import N_PROMPTS
from icrouting.methods.residual_probe import GRID, Rows, cross_validated, residual_fit
from icrouting.routing.priors import fewest_prompts, log_prior
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.catalogue import SPECS

PAPERS_UNSEEN = ("ai2scie", "cb", "copa", "creak", "mr", "mrpc", "sst5")
PER_CLASS = (4, 8, 16, 32)
DRAWS = 3
BESIDE = ("zero-shot", "calibrated", "few-shot")
# Of the probes beside; the residual one chooses its own.
C = 1.0


class Cell:
    """One task's states, cut into its pool and its test rows."""

    def __init__(self, file: Path):
        content = np.load(file)
        scores = content["scores"].astype(float)
        n_options = np.isfinite(scores).sum(1)
        # Rows with another number of choices have a prior of their own, and are left out.
        usual = np.bincount(n_options).argmax()
        is_usual = n_options == usual
        is_pool = np.arange(len(scores)) < int(content["n_pool"])
        self.n_options = int(usual)
        self.labels = content["labels"]
        self.log_probs = log_softmax(scores[:, :usual], axis=1)
        self.pool = np.flatnonzero(is_pool & is_usual)
        self.test = np.flatnonzero(~is_pool & is_usual)
        self.few_shot = content["few_shot"][is_usual[~is_pool], :usual].astype(float)
        self.teacher = self._teacher(file.with_suffix(".teacher.npz"), is_usual)
        states = np.concatenate([content["entering"], content["last"]], axis=1).astype(float)
        batch = states[self.pool[:N_PROMPTS]]
        deviation = batch.std(0)
        deviation[deviation <= 1e-6 * np.abs(batch.mean(0))] = np.inf
        self.features = (states - batch.mean(0)) / deviation / np.sqrt(states.shape[1])

    def _teacher(self, file: Path, is_usual: np.ndarray) -> dict[str, np.ndarray] | None:
        """Returns the pool's "rows" that are no demonstration, and few-shot "scores" of them."""
        if not file.exists():
            return None
        content = np.load(file)
        is_taught = content["is_new"] & is_usual[: len(content["is_new"])]
        rows = np.flatnonzero(is_taught)
        return {"rows": rows, "scores": content["few_shot"][rows, : self.n_options].astype(float)}

    def calibrated(self, log_probs, batch) -> np.ndarray:
        """Returns log-probabilities without the prior of a batch of prompts."""
        return log_softmax(log_probs - log_prior(batch, "guarded"), axis=1)

    def right(self, scores) -> np.ndarray:
        """Returns which test rows are right by scores of theirs."""
        return (scores.argmax(1) == self.labels[self.test]).astype(float)

    def beside(self) -> dict[str, np.ndarray]:
        """Returns what takes no label, and few-shot prompts."""
        batch = self.log_probs[self.pool[:N_PROMPTS]]
        calibrated = self.calibrated(self.log_probs, batch)
        taught = calibrated[self.pool].argmax(1)
        nothing = np.zeros((len(self.pool), self.n_options))
        weight, bias = residual_fit(self.features[self.pool], nothing, taught, C)
        return {
            "zero-shot": self.right(self.log_probs[self.test]),
            "calibrated": self.right(calibrated[self.test]),
            "self-taught": self.right(self.features[self.test] @ weight.T + bias),
            "few-shot": self.right(self.few_shot),
            "few-shot calibrated": self.right(
                self.calibrated(log_softmax(self.few_shot, axis=1), self.few_shot)
            ),
        }

    def distilled(self) -> dict[str, np.ndarray]:
        """Returns what a correction gives that is fitted to few-shot answers; empty without any."""
        if self.teacher is None:
            return {}
        picked = self.teacher["rows"]
        raw = log_softmax(self.teacher["scores"], axis=1)
        teachers = {"distilled": raw, "distilled calibrated": self.calibrated(raw, raw)}
        right = {}
        for way, log_probs in teachers.items():
            rng = np.random.default_rng(0)
            right[way] = self.right(self._residual(picked, np.exp(log_probs), rng))
        return right

    def _residual(self, picked, targets, rng) -> np.ndarray:
        """Returns the test rows' scores by a correction that is fitted to some rows of the pool."""
        batch = self.log_probs[self.pool[:N_PROMPTS]]
        by_kind = {True: self.calibrated(self.log_probs, batch), False: self.log_probs}
        offsets = {kind: log_probs[picked] for kind, log_probs in by_kind.items()}
        rows = Rows(self.features[picked], offsets, targets)
        tried = cross_validated(rows, GRID, rng)
        best = min(tried, key=lambda setting: setting["loss"])
        kind = best["calibrated"]
        weight, bias = residual_fit(rows.features, offsets[kind], targets, best["C"])
        return by_kind[kind][self.test] + self.features[self.test] @ weight.T + bias

    def learned(self, per_class: int, draw: int) -> dict[str, np.ndarray]:
        """Returns what so many labels a class give, of one draw."""
        rng = np.random.default_rng([draw, per_class])
        picked = []
        for label in range(self.n_options):
            of_label = self.pool[self.labels[self.pool] == label]
            picked += rng.permutation(of_label)[:per_class].tolist()
        residual = self._residual(picked, self.labels[picked], rng)
        nothing = np.zeros((len(picked), self.n_options))
        weight, bias = residual_fit(self.features[picked], nothing, self.labels[picked], C)
        return {
            "probe": self.right(self.features[self.test] @ weight.T + bias),
            "residual": self.right(residual),
        }


def measure(states: Path, out: Path) -> None:
    """Writes which test rows are right, by task and way; those of several draws as their mean."""
    tasks = {}
    left_out = []
    for file in sorted(states.glob("*.npz")):
        if file.name.endswith((".part.npz", ".teacher.npz")):
            continue
        cell = Cell(file)
        if len(cell.pool) < fewest_prompts(cell.n_options):
            left_out.append(file.stem)
            continue
        right = {**cell.beside(), **cell.distilled()}
        for per_class in PER_CLASS:
            draws = [cell.learned(per_class, draw) for draw in range(DRAWS)]
            for way in draws[0]:
                right[f"{way} {per_class}"] = np.mean([draw[way] for draw in draws], axis=0)
        rounded = {way: [round(float(x), 2) for x in each] for way, each in right.items()}
        tasks[file.stem] = {"pool": len(cell.pool), "right": rounded}
        print(file.stem, {way: round(float(each.mean()), 3) for way, each in right.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    save_json(out, {"model": states.name, "commit": commit(), "draws": DRAWS, "tasks": tasks})
    if left_out:
        print(f"left out, as their rows are too few: {', '.join(left_out)}")


def groups_of(tasks) -> dict[str, list[str]]:
    """Returns the names of tasks by kind: the paper's sources, its unseen ones, the varied ones."""
    kinds = {"the paper's sources": [], "the paper's unseen ones": [], "further tasks": []}
    for name in tasks:
        if name in SPECS and SPECS[name].group == "in-domain":
            kinds["the paper's sources"].append(name)
        elif name in PAPERS_UNSEEN:
            kinds["the paper's unseen ones"].append(name)
        else:
            kinds["further tasks"].append(name)
    return {kind: names for kind, names in kinds.items() if names}


def summary_of(tasks) -> dict[str, dict[str, dict[str, object]]]:
    """Returns by kind of task and way the accuracy, and what it is over the three BESIDE."""
    groups = {**groups_of(tasks), "all": list(tasks)}
    summary = {}
    for kind, names in groups.items():
        right = {}
        for name in names:
            ways = tasks[name]["right"].items()
            right[name] = {way: np.array(rights) for way, rights in ways}
        # Without a teacher's file a task has no "distilled".
        ways = [way for way in right[names[0]] if all(way in right[name] for name in names)]
        summary[kind] = {}
        for way in ways:
            accuracy = float(np.mean([right[name][way].mean() for name in names]))
            line: dict[str, object] = {"tasks": len(names), "accuracy": 100 * accuracy}
            for other in BESIDE:
                gaps = [right[name][way] - right[name][other] for name in names]
                line[f"over {other}"] = estimated(gaps)
            summary[kind][way] = line
    return summary


def summarise(out: Path) -> None:
    """Prints a table for each kind of task, and keeps its figures with the record."""
    record = load_json(out)
    record["summary"] = summary_of(record["tasks"])
    save_json(out, record)
    for kind, lines in record["summary"].items():
        n_tasks = next(iter(lines.values()))["tasks"]
        print(f"\n{record['model']}, {kind}: {n_tasks} tasks")
        print(f"| way | accuracy | {' | '.join(f'over {other}' for other in BESIDE)} |")
        print("|---|---|---|---|---|")
        for way, line in lines.items():
            cells = [f"{line['accuracy']:.1f}"]
            for other in BESIDE:
                gap = line[f"over {other}"]
                text = f"{gap['value']:+.1f} ({gap['low']:.1f} to {gap['high']:.1f})"
                cells.append("" if way == other else text)
            print(f"| {way} | {' | '.join(cells)} |")


def main() -> None:
    """Measures, or prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=Path, help="of `benchmarks.few_labels_states`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", action="store_true", help="print the tables, fit nothing")
    arguments = parser.parse_args()
    if arguments.summary:
        summarise(arguments.out)
    elif arguments.states is None:
        parser.error("--states is missing")
    else:
        measure(arguments.states, arguments.out)


if __name__ == "__main__":
    main()
