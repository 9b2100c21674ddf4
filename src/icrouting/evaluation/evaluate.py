"""Evaluation: every method on every task and seed, as records that are never computed twice."""

import dataclasses
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from icrouting.decoder.decoder import Decoder
from icrouting.evaluation import records
from icrouting.evaluation.items import draw_items
from icrouting.evaluation.predictor import Predictor
from icrouting.evaluation.records import Record
from icrouting.methods import Method
from icrouting.runtime.processes import here, joined, mine, wait
from icrouting.runtime.progress import track
from icrouting.tasks.task import Task, check_names

CHUNK = 50

Job = tuple[Task, list[int]]


class Evaluation:
    """One run: methods on a model, and the records that they leave in `file`.

    What the file holds already is not computed again. `fits` is a folder that keeps what methods
    learn, for a resumed run and for other processes; None keeps nothing. `skip_nan` leaves items
    out whose scores are not finite, instead of the method's task. Several processes share tasks to
    learn and items to answer, and each appends to a file of its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        methods: Sequence[Method],
        sources: Sequence[Task],
        file: Path,
        fits: Path | None = None,
        *,
        skip_nan: bool = False,
    ):
        self.decoder = decoder
        self.methods = list(methods)
        self.sources = list(sources)
        self.file = records.part(file, here().process_index)
        self.fits = fits
        # Why a method does not fit a task, by their names; and why one cannot learn at all.
        self.refused: dict[tuple[str, str], str] = {}
        self._unfit: dict[str, str] = {}
        # The items that were left out as their scores are not finite, by method and task.
        self.skipped: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
        self._predictor = Predictor(decoder, skip_nan=skip_nan)
        # The seed of the fit that each method has in force, by its name.
        self._fitted_seeds: dict[str, int] = {}
        self._done: set[tuple[str, str, int, int]] = set()
        self._answers: defaultdict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
        # What was asked for answers, which records know by the name alone.
        self._task_by_name: dict[str, Task] = {}
        check_names(sources)
        self._note(records.read(file))

    def run(self, tasks: Sequence[Task], seeds: Sequence[int], n_test: int) -> None:
        """Appends a record for every method, task, seed and test item that has none yet.

        Methods take turns on each chunk of items, so that a slow spell of the machine meets all of
        them. A method that refuses a task (ValueError) is left out there, and `refused` says why.
        So is one that has a finite score on no item; `skipped` has the items that lack one.

        Raises:
            ValueError: two tasks have one name, or one has the name of another that was run before.
        """
        self._check_names(tasks)
        tasks = [task.bound_to(self.decoder.tokenizer) for task in tasks]
        jobs: list[Job] = []
        for task in tasks:
            items = draw_items(task, n_test)
            for start in range(0, len(items), CHUNK):
                jobs.append((task, items[start : start + CHUNK]))
        for seed in seeds:
            self._run_seed(jobs, tasks, seed)
        # Each process has met refusals of its own; the report is to name them all.
        self.refused = dict(joined(list(self.refused.items())))
        self._join_skipped()

    def _check_names(self, tasks: Sequence[Task]) -> None:
        """Checks that no record of one task stands for another one's."""
        check_names(tasks)
        for task in tasks:
            before = self._task_by_name.setdefault(task.name, task)
            if (before.spec, before.test) != (task.spec, task.test):
                raise ValueError(
                    f"another task that was evaluated here is called {task.name!r} too: give each "
                    "a name of its own"
                )

    def _run_seed(self, jobs: Sequence[Job], tasks: Sequence[Task], seed: int) -> None:
        """Fits if any process lacks an answer, then answers what is missing of this one's share."""
        sizes = [self._n_missing(job, seed) for job in jobs]
        if any(joined(sizes)):
            self._fit_together(seed, tasks)
        my_jobs = []
        for job, size in zip(mine(jobs), mine(sizes), strict=True):
            if size:
                my_jobs.append(job)
        # Counted anew: a method that could not learn has refused its tasks by now.
        my_sizes = [self._n_missing(job, seed) for job in my_jobs]
        for task, items in track(my_jobs, f"evaluation, seed {seed}", my_sizes, "predictions"):
            for method in self.methods:
                self._answer(method, task, self._missing(method, task, items, seed), seed)

    def _join_skipped(self) -> None:
        """Takes up what all processes skipped, and refuses tasks on which nothing was left."""
        answered_cells = set(joined([cell for cell, answers in self._answers.items() if answers]))
        for cell, items in joined(list(self.skipped.items())):
            self.skipped[cell] |= items
        for cell in self.skipped.keys() - answered_cells:
            self.refused.setdefault(cell, "its scores are finite on no test item")

    def _fit_together(self, seed: int, tasks: Sequence[Task]) -> None:
        """Fits once for all processes.

        Each learns its share of methods and of tasks, and takes up what the others learned.
        """
        if here().num_processes == 1:
            self.fit(seed)
            return
        # First its share, so that two processes do not learn the same; then, from their files, all.
        self.fit(seed, mine(self.methods))
        self._unfit = dict(joined(list(self._unfit.items())))
        self.fit(seed)
        for task in mine(tasks):
            for method in self.methods:
                # It is refused, with its reason, where it is asked for an answer.
                with suppress(ValueError):
                    method.on(task)
        wait()

    def fit(self, seed: int, methods: Sequence[Method] | None = None) -> None:
        """Lets methods (None: all) learn what they learn.

        Each has a draw of its own that no other method moves. One that cannot learn (ValueError)
        is left out of the run, which says why.
        """
        for method in self.methods if methods is None else methods:
            if self._fitted_seeds.get(method.name) == seed or method.name in self._unfit:
                continue
            self._fitted_seeds[method.name] = seed
            # From its name: a method's draw is the same whatever others the run has.
            rng = np.random.default_rng([seed, zlib.crc32(method.name.encode())])
            file = self._fit_file(method, seed)
            try:
                method.fit_on(self.decoder, self.sources, rng, file)
            except ValueError as error:  # the others need not wait for what this one lacks
                self._unfit[method.name] = str(error)
            self._predictor.forget(method)

    def _fit_file(self, method: Method, seed: int) -> Path | None:
        """Where a method's fit is kept: one file for all seeds where it draws nothing."""
        if self.fits is None:
            return None
        drawn = f"-seed{seed}" if method.draws else ""
        return self.fits / f"{method.name}{drawn}.safetensors"

    def predict(
        self, method: Method, task: Task, indices: Sequence[int], seed: int
    ) -> list[Record]:
        """Returns the records of one method on some test items of one task."""
        bound_task = task.bound_to(self.decoder.tokenizer)
        return self._predictor.predict(method, bound_task, indices, seed)

    def _n_missing(self, job: Job, seed: int) -> int:
        """How many answers a job lacks, over all methods."""
        return sum(len(self._missing(method, *job, seed)) for method in self.methods)

    def _missing(self, method: Method, task: Task, items: Sequence[int], seed: int) -> list[int]:
        """The items that a method has yet to answer: none of a task that it refuses."""
        cell = method.name, task.name
        missing = [index for index in items if (*cell, seed, index) not in self._done]
        if missing and method.name in self._unfit:
            self.refused[cell] = self._unfit[method.name]
        return [] if cell in self.refused else missing

    def _answer(self, method: Method, task: Task, items: list[int], seed: int) -> None:
        """Appends a method's records on items; one that draws nothing has another seed's."""
        # Without a draw every seed has the same answers, so the first seed's are copied.
        answers = {} if method.draws else self._answers[method.name, task.name]
        new_records = []
        unknown_items = []
        for index in items:
            if index in answers:
                new_records.append(dataclasses.replace(answers[index], seed=seed))
            else:
                unknown_items.append(index)
        try:
            if unknown_items:
                predicted = self.predict(method, task, unknown_items, seed)
                missed_items = set(unknown_items) - {record.index for record in predicted}
                if missed_items:
                    self.skipped[method.name, task.name] |= missed_items
                new_records += predicted
        except ValueError as error:
            self.refused[method.name, task.name] = str(error)
            return
        records.append(self.file, new_records)
        self._note(new_records)

    def _note(self, new_records: Sequence[Record]) -> None:
        """Remembers what need not be computed again."""
        for record in new_records:
            self._done.add(record.key)
            self._answers[record.method, record.task][record.index] = record
