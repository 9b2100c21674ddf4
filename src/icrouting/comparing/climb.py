"""Climb: a comparison under way, method after method in order of cost."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.comparing.board import Board, board_of, progress_line
from icrouting.comparing.budget import Budget, n_demos, sizes_of, timing_of, work_of
from icrouting.comparing.ladder import ICR
from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.batches import context_length
from icrouting.decoder.decoder import Decoder
from icrouting.evaluation import records, runs
from icrouting.evaluation.config import EvalConfig
from icrouting.evaluation.evaluate import Evaluation
from icrouting.evaluation.folder import RunFolder
from icrouting.evaluation.items import within
from icrouting.evaluation.outcome import complete
from icrouting.evaluation.records import BASELINE
from icrouting.evaluation.runs import RunConfig
from icrouting.fitting.plan import plan_fit
from icrouting.fitting.shelf import delete_trunks
from icrouting.icr import InContextRouter
from icrouting.methods import Method, Settings
from icrouting.methods import make as make_methods
from icrouting.methods.named_prompts import prompt_digests
from icrouting.report import page
from icrouting.tasks.task import Task, rows_digest, template_digest


class Climb:
    """A comparison under way: what it compares on, and the methods that have had their turn.

    Attributes:
        decoder: the frozen model and its tokenizer.
        folder: the run's.
        settings: the methods', with the encoder by name.
        fit: those of the router's fit.
        task: the rows, without those that are too long for the model.
        icr: the router, once it is fitted.
        methods: by name, those that were asked for an answer.
        refused: why methods do not fit the task.
        evaluation: what asks them, once the folder is claimed.
    """

    def __init__(
        self,
        task: Task,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: RunFolder,
        settings: Settings,
        fit: FitConfig | None,
        seed: int,
        data: str,
        say: Callable[[str], None],
    ):
        self.decoder = Decoder.of(model, tokenizer)
        self.folder = folder
        self.seed = seed
        self.data = data
        self.say = say
        # As a method keeps them, with the encoder by name.
        self.settings = Method(settings).settings
        encoder = self.settings.encoder
        assert encoder is not None, "a method names its encoder"
        self.fit = fit or FitConfig(encoder=encoder, seed=seed)
        self.task, note = within(task.bound_to(tokenizer), tokenizer, context_length(model))
        self.notes = [note] if note else []
        self.icr: InContextRouter | None = None
        self.methods: dict[str, Method] = {}
        self.refused: dict[str, str] = {}
        self.evaluation: Evaluation

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Inside, the folder is this run's alone, and what it holds is taken up."""
        with runs.claimed(self.folder, self._config([BASELINE])):
            folder = self.folder
            self.evaluation = Evaluation(self.decoder, [], [self.task], folder.records, folder.fits)
            yield

    def climb(self, names: Sequence[str], budget: Budget) -> dict[str, float]:
        """Runs method after method; returns those that time was lacking for.

        With each go the seconds that it was expected to take.
        """
        sizes = sizes_of(self.task, self.settings, self._router_work())
        missed = {}
        # The timing at the end, of all that are taken.
        timing = 0.0
        for name in names:
            work = work_of(name, sizes, self.settings)
            timing += timing_of(name, sizes)
            # What was begun is ended, and a method that is done takes no time.
            is_begun = name == BASELINE or name in self._answered()
            if is_begun or budget.has_room(work + timing):
                self._take(name, budget, work)
            else:
                timing -= timing_of(name, sizes)
                missed[name] = budget.expected(work) or 0.0
                self.say(f"{name}: not run, would take about {missed[name]:.0f} s")
        return missed

    def board(self, names: Sequence[str], missed: Mapping[str, float], budget: Budget) -> Board:
        """Completes the run, with its report, and returns what all methods came to."""
        self.evaluation.methods = list(self.methods.values())
        complete(self.folder, self.evaluation, [self.task], self.seed, self.icr)
        page.write(self.folder.path)
        return board_of(
            self.folder,
            self.task,
            names,
            missed=missed,
            refused=self.refused,
            fit_seconds={ICR: budget.spent.get(ICR, {}).get("fit")},
            n_demos=n_demos(self.task, self.settings),
            encoder=self.fit.encoder,
        )

    def in_force(self, name: str) -> Method:
        """Returns a method that has answered, fitted for the task: anew, or from its file."""
        method = self.methods[name]
        self.evaluation.fit(self.seed, [method])
        return method.on(self.task)

    def _take(self, name: str, budget: Budget, work: float) -> None:
        """Fits one method and lets it answer; says how that went."""
        is_done = name in self._answered()
        started = time.monotonic()
        try:
            method = self._made(name, budget)
        except ValueError as error:
            self._refuse(name, str(error))
            return
        self.methods[name] = method
        runs.claim(self.folder, self._config(list(self.methods)))
        self.evaluation.methods = [method]
        self.evaluation.run([self.task], [self.seed], len(self.task.test))
        reason = self.evaluation.refused.get((name, self.task.name))
        if reason is not None:
            self._refuse(name, reason)
            return
        if not is_done:
            budget.note(name, time.monotonic() - started, work=work)
        self.say(progress_line(self.folder, name, budget.spent.get(name, {}).get("fit")))

    def _made(self, name: str, budget: Budget) -> Method:
        """The method of a name; ICR's router is fitted first, or taken up where it was."""
        settings = self.settings
        if name == "probe-encoder" and settings.encoder == HIDDEN:
            raise ValueError(f"it reads by a sentence encoder, and {HIDDEN!r} names none")
        if name == ICR:
            self.icr = self._router(budget)
            settings = replace(settings, router=str(self.folder.path / "router"))
        (method,) = make_methods([name], settings)
        return method

    def _router(self, budget: Budget) -> InContextRouter:
        """The router of the task's rows, in the run's folder.

        Raises:
            ValueError: the folder holds another router, or none can be fitted.
        """
        place = self.folder.path / "router"
        if (place / "config.json").exists():
            icr = InContextRouter.from_pretrained(place)
            made_by = (icr.description.fit, icr.description.rows)
            if made_by != (self.fit, rows_digest([self.task])):
                raise ValueError(
                    f"{place} holds a router of other settings or data: choose another folder"
                )
            return icr
        started = time.monotonic()
        decoder = self.decoder
        try:
            icr = InContextRouter.fit(
                decoder.model, decoder.tokenizer, [self.task], self.fit, folder=place / "fit"
            )
        finally:
            # A fit that was stopped goes on, and took what all its parts took.
            seconds = time.monotonic() - started
            before = budget.spent.get(ICR, {}).get("fit", 0.0)
            budget.note(ICR, 0.0, fit=before + seconds)
        icr.save_pretrained(place)
        # As large as the tokens are many.
        delete_trunks(place / "fit")
        return InContextRouter.from_pretrained(place)

    def _refuse(self, name: str, reason: str) -> None:
        """Leaves a method out; ValueError for the baseline, which all are held against."""
        if name == BASELINE:
            raise ValueError(f"{name} cannot answer {self.task.name}: {reason}")
        self.refused[name] = reason
        self.say(f"{name}: does not fit: {reason}")

    def _answered(self) -> set[str]:
        """The methods that have answered a row."""
        return {record.method for record in records.read(self.folder.records)}

    def _router_work(self) -> float:
        """The work of a router's fit, in readings of a prompt; 0 where none can be fitted."""
        decoder = self.decoder
        try:
            plan = plan_fit(
                decoder.model, decoder.tokenizer, [self.task], self.fit, decoder.model.dtype
            )
        except ValueError:  # the fit itself will say why
            return 0.0
        n_queries = sum(texts.count for texts in plan.queries.values())
        # A query's plain pass is what zero-shot takes.
        return sum(plan.flops.values()) / (plan.flops["trunk"] / n_queries)

    def _config(self, names: Sequence[str]) -> RunConfig:
        """What the run measures once these methods are in it."""
        name = self.task.name
        decoder = self.decoder
        model = decoder.model
        measured = EvalConfig(
            data=self.data,
            tasks=(name,),
            sources=(name,),
            methods=tuple(names),
            n_test=len(self.task.test),
            seeds=[self.seed],
            # A model without a name is described by its class.
            model=Backbone(str(model.config.name_or_path) or type(model).__name__),
            settings=self.settings,
        )
        rows = rows_digest([self.task])
        return RunConfig(
            asked=measured,
            fingerprint=decoder.fingerprint,
            dtype=str(model.dtype).removeprefix("torch."),
            rows=rows,
            task_rows=rows,
            router=self.icr.digest() if self.icr else None,
            chat_template=template_digest([self.task]),
            prompts=prompt_digests(names, [self.task], decoder.tokenizer),
            tasks=runs.task_entries([self.task], [name]),
            sources=[name],
            notes=self.notes,
        )
