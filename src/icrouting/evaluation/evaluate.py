"""Evaluation: every method on every task and seed, as records that are never computed twice."""

import dataclasses
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from icrouting.decoder.batches import tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.passes import KeptContext
from icrouting.decoder.scoring import score
from icrouting.evaluation import records
from icrouting.evaluation.items import draw_items
from icrouting.evaluation.records import BASELINE, Record
from icrouting.methods import Method
from icrouting.runtime.processes import here, joined, mine, wait
from icrouting.runtime.progress import track
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import Task

CHUNK = 50


class Evaluation:
    """One run: methods on a model, and the records that they leave in `file`; what it holds is not computed again.

    `fits` is a folder that keeps what methods learn, for a resumed run and for other processes; None keeps nothing.
    Several processes share tasks to learn and items to answer, and each appends to a file of its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        methods: Sequence[Method],
        sources: Sequence[Task],
        file: Path,
        fits: Path | None = None,
    ):
        self.decoder, self.fits = decoder, fits
        self.methods, self.sources = list(methods), list(sources)
        self.refused: dict[tuple[str, str], str] = {}
        self._unfit: dict[str, str] = {}
        # The seed of the fit that each method has in force, by its name.
        self._fitted_seeds: dict[str, int] = {}
        self._done: set[tuple[str, str, int, int]] = set()
        self._answers: defaultdict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
        self._note(records.read(file))
        self.file = records.part(file, here().process_index)
        self._kept: dict[str, tuple[str, dict[str, KeptContext]]] = {}
        self._plain: tuple[object, Tensor, float] | None = None

    def run(self, tasks: Sequence[Task], seeds: Sequence[int], n_test: int) -> None:
        """Appends a record for every method, task, seed and test item that has none yet.

        Methods take turns on each chunk of items, so that a slow spell of the machine meets all of them. A
        method that refuses a task (ValueError) is left out there, and `refused` says why.
        """
        chosen = [(task, draw_items(task, n_test)) for task in tasks]
        jobs = [
            (task, items[at : at + CHUNK])
            for task, items in chosen
            for at in range(0, len(items), CHUNK)
        ]
        for seed in seeds:
            missing = [
                any(self._missing(method, *job, seed) for method in self.methods) for job in jobs
            ]
            if any(joined(missing)):
                self._fit_together(seed, tasks)
            mine_missing = [
                job for job, is_missing in zip(mine(jobs), mine(missing), strict=True) if is_missing
            ]
            sizes = [
                sum(len(self._missing(method, *job, seed)) for method in self.methods)
                for job in mine_missing
            ]
            for task, items in track(
                mine_missing, f"evaluation, seed {seed}", sizes, "predictions"
            ):
                for method in self.methods:
                    self._answer(method, task, self._missing(method, task, items, seed), seed)
        self.refused = dict(joined(list(self.refused.items())))

    def _fit_together(self, seed: int, tasks: Sequence[Task]) -> None:
        """Fits once for all processes: each learns its share of methods and of tasks, and takes up the others'."""
        if here().num_processes > 1:
            self.fit(seed, mine(self.methods))
            self._unfit = dict(joined(list(self._unfit.items())))
        self.fit(seed)
        if here().num_processes > 1:
            for task in mine(tasks):
                for method in self.methods:
                    with suppress(
                        ValueError
                    ):  # it is refused, with its reason, where it is asked for an answer
                        method.on(task)
            wait()

    def fit(self, seed: int, methods: Sequence[Method] | None = None) -> None:
        """Lets methods (None: all) learn what they learn, each with a draw of its own that no other method moves.

        One that cannot (ValueError) is left out of the run, which says why.
        """
        for method in self.methods if methods is None else methods:
            if self._fitted_seeds.get(method.name) == seed or method.name in self._unfit:
                continue
            self._fitted_seeds[method.name] = seed
            drawn = f"-seed{seed}" if method.draws else ""
            file = self.fits / f"{method.name}{drawn}.safetensors" if self.fits else None
            rng = np.random.default_rng([seed, zlib.crc32(method.name.encode())])
            try:
                method.fit_on(self.decoder, self.sources, rng, file)
            except ValueError as error:  # the others need not wait for what this one lacks
                self._unfit[method.name] = str(error)
            self._kept.pop(method.name, None)

    def _missing(self, method: Method, task: Task, items: Sequence[int], seed: int) -> list[int]:
        missing = [
            index for index in items if (method.name, task.name, seed, index) not in self._done
        ]
        if missing and method.name in self._unfit:
            self.refused[method.name, task.name] = self._unfit[method.name]
        return [] if (method.name, task.name) in self.refused else missing

    def _answer(self, method: Method, task: Task, items: list[int], seed: int) -> None:
        known = {} if method.draws else self._answers[method.name, task.name]
        found = [dataclasses.replace(known[index], seed=seed) for index in items if index in known]
        asked = [index for index in items if index not in known]
        try:
            found += self.predict(method, task, asked, seed) if asked else []
        except ValueError as error:
            self.refused[method.name, task.name] = str(error)
            return
        records.append(self.file, found)
        self._note(found)

    def _note(self, found: Sequence[Record]) -> None:
        for record in found:
            self._done.add(record.key)
            self._answers[record.method, record.task][record.index] = record

    def predict(
        self, method: Method, task: Task, indices: Sequence[int], seed: int
    ) -> list[Record]:
        """Returns the records of one method on some test items of one task."""
        method = method.on(task)
        examples = [task.test[index] for index in indices]
        prompts = [method.prompt(task, example) for example in examples]
        options = [task.options(example) for example in examples]
        n_tokens = [
            len(tokens)
            for tokens in tokenize(self.decoder.tokenizer, [prompt.text for prompt in prompts])
        ]
        scores, seconds = self._scores(method, task, prompts, options)
        started = time.monotonic()
        scores = method.adjusted(task, examples, scores)
        seconds += (time.monotonic() - started) / len(prompts)
        logits = [
            tuple(row[: len(chosen)].tolist()) for row, chosen in zip(scores, options, strict=True)
        ]
        found = zip(
            indices,
            [row.label for row in examples],
            scores.argmax(1).tolist(),
            logits,
            n_tokens,
            strict=True,
        )
        return [Record(method.name, task.name, seed, *one, seconds) for one in found]

    def _scores(
        self, method: Method, task: Task, prompts: list[Prompt], options: list[tuple[str, ...]]
    ) -> tuple[Tensor, float]:
        """Returns option scores and seconds per prompt; the untouched model reads equal prompts only once."""
        if not method.edits_model and self._plain and self._plain[0] == (prompts, options):
            return self._plain[1:]
        of, kept = self._kept.get(method.name, ("", {}))
        if prompts[0].context not in kept or (method.edits_model and of != task.name):
            kept = {}  # the contexts of a large model are large
        self._kept[method.name] = task.name, kept
        with method.applied(task):  # entered once for many prompts, so not in their time
            started = time.monotonic()
            scores = score(self.decoder, prompts, options, kept=kept)
            seconds = (time.monotonic() - started) / len(prompts)
        if not method.edits_model:
            self._plain = (prompts, options), scores, seconds
        return scores, seconds

    def time_ratios(
        self, task: Task, *, n_items: int = 4, n_rounds: int = 5
    ) -> list[dict[str, object]]:
        """Returns each method's time over zero-shot's, measured in turns on the same items.

        Prompts run as they would arrive at a server, alone in their context. Where a method's prompts have a
        context in common, it is timed once more with that context kept from before.
        """
        examples = [task.test[index] for index in draw_items(task, n_items)]
        options = [task.options(example) for example in examples]
        baseline = Method(self.methods[0].settings)
        baseline.name = BASELINE
        methods = [
            baseline,
            *(method.on(task) for method in self.methods if method.name != BASELINE),
        ]
        prompts = {
            method.name: [method.prompt(task, example) for example in examples]
            for method in methods
        }
        ways: list[tuple[str, Method, dict[str, KeptContext] | None]] = []
        for method in methods:
            ways.append((method.name, method, None))
            if prompts[method.name][0].context:
                ways.append((f"{method.name}, context kept", method, {}))
        seconds: dict[str, list[float]] = {name: [] for name, _, _ in ways}
        for _ in track(range(n_rounds + 1), "timing, in turns", [1] * (n_rounds + 1), "turns"):
            for name, method, kept in ways:
                asked = (
                    prompts[method.name]
                    if kept is not None
                    else [p.text for p in prompts[method.name]]
                )
                with method.applied(task):
                    started = time.monotonic()
                    scores = score(self.decoder, asked, options, kept=kept)
                    method.adjusted(task, examples, scores)
                    seconds[name].append(time.monotonic() - started)
        note = f"median of {n_rounds} turns on {len(examples)} prompts of {task.name}"
        rows = []
        for name, method, kept in ways[1:]:
            ratios = np.array(seconds[name][1:]) / np.array(seconds[BASELINE][1:])
            low, middle, high = (float(end) for end in np.percentile(ratios, [0, 50, 100]))
            n_cached = method.n_cached(task) + sum(
                context.n_numbers for context in (kept or {}).values()
            )
            rows.append(
                {
                    "method": name,
                    "ratio": middle,
                    "low": low,
                    "high": high,
                    "n_cached": n_cached,
                    "note": note,
                }
            )
        return rows
