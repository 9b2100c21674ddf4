"""The engine: one thread that runs the model, and the queue of jobs before it."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from icrouting.serving.jobs import Classification, Completion, Job, Refused, Scoring
from icrouting.serving.limits import Limits
from icrouting.serving.metrics import Metrics
from icrouting.serving.texts import EachEnds, Growing
from icrouting.several import Several, left_padded


class Engine:
    """Runs jobs in batches of one kind, in the order in which they came.

    A batch that fails is run again job by job, so that a failing request fails alone.

    Args:
        several: the model with its routers.
        limits: how jobs are gathered.
        metrics: counts what is done.
    """

    def __init__(self, several: Several, limits: Limits, metrics: Metrics):
        self._several = several
        self._limits = limits
        self._metrics = metrics
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="icr-engine", daemon=True)
        tokenizer = several.reader.decoder.tokenizer
        self._end_ids = _end_ids(several.reader.decoder.model, tokenizer)
        metrics.watch_queue(lambda: len(self._jobs))

    def start(self) -> None:
        """Begins to run jobs."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are run."""
        return self._thread.is_alive() and not self._is_closing

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts the jobs of one request into the queue, all of them or none.

        Raises:
            Refused: the queue is full, or the server ends.
        """
        with self._changed:
            if self._is_closing:
                raise Refused(503, "the server is shutting down", "shutting_down")
            if len(self._jobs) + len(jobs) > self._limits.max_queue:
                raise Refused(
                    429,
                    f"{len(self._jobs)} requests wait, {self._limits.max_queue} at most: try again "
                    "in a second",
                    "queue_full",
                    retry_after=1,
                )
            self._jobs.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Finishes what is in the queue, and ends."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            batch = self._next_batch()
            if not batch:
                return
            try:
                self._answer(batch)
            except BaseException as error:
                # Whatever it was, the others' answers must not wait for it.
                if len(batch) == 1:
                    batch[0].tell(error)
                    continue
                for job in batch:
                    self._answer_alone(job, error)

    def _answer_alone(self, job: Job, error: BaseException) -> None:
        """Answers a job of a batch that failed with an error."""
        if job.is_over or not job.is_wanted:
            return
        # What was sent cannot be taken back, and must not be sent twice.
        if job.has_begun:
            job.tell(error)
            return
        try:
            self._answer([job])
        except BaseException as error:
            job.tell(error)

    def _next_batch(self) -> list[Job]:
        """Waits for a job, and a moment for others of its kind; empty when the server ends."""
        with self._changed:
            while True:
                while self._jobs and not self._jobs[0].is_wanted:
                    self._give_up(self._jobs.popleft())
                if self._jobs:
                    break
                if self._is_closing:
                    return []
                self._changed.wait()
            until = time.monotonic() + self._limits.window_ms / 1000
            while len(self._jobs) < self._limits.max_batch and not self._is_closing:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self._taken()

    def _taken(self) -> list[Job]:
        """Takes the first job and further ones of its kind out of the queue."""
        kind = self._jobs[0].kind
        batch: list[Job] = []
        others: deque[Job] = deque()
        while self._jobs:
            job = self._jobs.popleft()
            if not job.is_wanted:
                self._give_up(job)
            elif job.kind == kind and len(batch) < self._limits.max_batch:
                batch.append(job)
            else:
                others.append(job)
        self._jobs = others
        return batch

    @staticmethod
    def _give_up(job: Job) -> None:
        job.tell(Refused(504, "the request waited too long in the queue", "timeout"))

    def _answer(self, batch: list[Job]) -> None:
        """Runs jobs of one kind together; an exception leaves those unanswered that it met."""
        if not batch:
            return
        first = batch[0]
        with self._metrics.batch(first.kind[0], len(batch)):
            if isinstance(first, Completion):
                self._complete([job for job in batch if isinstance(job, Completion)])
            elif isinstance(first, Classification):
                self._classify(first, [job for job in batch if isinstance(job, Classification)])
            elif isinstance(first, Scoring):
                self._score(first, [job for job in batch if isinstance(job, Scoring)])

    def _complete(self, batch: list[Completion]) -> None:
        decoder = self._several.reader.decoder
        texts = [Growing(job, decoder.tokenizer, self._end_ids) for job in batch]
        token_lists = [job.tokens for job in batch]
        input_ids, attention_mask = left_padded(token_lists, decoder.pad_id, decoder.device)
        with self._several.rows([job.name for job in batch]), torch.no_grad():
            decoder.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max(job.max_tokens for job in batch),
                do_sample=False,
                num_beams=1,
                pad_token_id=decoder.pad_id,
                stopping_criteria=[EachEnds(texts)],
            )

    def _classify(self, first: Classification, batch: list[Classification]) -> None:
        rows = [row for job in batch for row in job.rows]
        predictions = self._several.predict(rows, first.name, first.task)
        start = 0
        for job in batch:
            job.tell(predictions[start : start + len(job.rows)])
            start += len(job.rows)

    def _score(self, first: Scoring, batch: list[Scoring]) -> None:
        prompts = [prompt for job in batch for prompt in job.prompts]
        names = [job.name for job in batch for _ in job.prompts]
        scores = self._several.score(prompts, list(first.options), names)
        log_probs = scores.double().log_softmax(1)
        start = 0
        for job in batch:
            job.tell(log_probs[start : start + len(job.prompts)].tolist())
            start += len(job.prompts)


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Returns the tokens that end a text, by the model's own settings and its tokenizer."""
    ids: set[int] = set()
    settings = getattr(model, "generation_config", None)
    for ending in (getattr(settings, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(ending, int):
            ids.add(ending)
        elif ending is not None:
            ids.update(ending)
    return ids
