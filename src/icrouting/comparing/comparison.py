"""Comparison: one task's methods, fitted and measured on the same rows in order of cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.comparing import winner, wording
from icrouting.comparing.board import Board
from icrouting.comparing.budget import Budget
from icrouting.comparing.climb import Climb
from icrouting.comparing.ladder import ICR, ladder
from icrouting.config import FitConfig
from icrouting.evaluation.folder import RunFolder
from icrouting.methods import Method, Settings
from icrouting.methods import make as make_methods
from icrouting.methods.settings import COMPARED
from icrouting.routing.predictions import Prediction
from icrouting.runtime.processes import here
from icrouting.tasks.task import Task


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        folder: the run's, with compare.md, compare.json and the winner's folder in it.
        board: the table's lines, in order of cost, and the recommendation.
        answer: the recommendation, in two sentences.
        method: the recommended method, ready to answer on the model that was compared on.
        task: the task.
    """

    folder: Path
    board: Board
    answer: str
    method: Method
    task: Task

    def predict(self, rows: Any) -> list[Prediction]:
        """Returns the recommended method's prediction for each row, as `Method.predict` does.

        Args:
            rows: a list of dicts, a data frame, a `datasets.Dataset` or the path of a file; a row
                that does not fit says so in its status.
        """
        method = self.method
        with method.attached(method.model, method.tokenizer, self.task) as attached:
            return attached.predict(rows)


def compare(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    minutes: float = 10.0,
    methods: Sequence[str] = (),
    settings: Settings = COMPARED,
    fit: FitConfig | None = None,
    seed: int = 0,
    data: str = "memory",
    say: Callable[[str], None] = print,
) -> Comparison:
    """Returns which method to use on a task's rows, having measured all in order of cost.

    Each learns from the training rows, chooses on the validation rows, and answers every held-back
    row. The folder is a run's, whose report `icr report` remakes; called again with the same
    arguments, it goes on where it was.

    Args:
        task: the rows, from `Task.from_rows` or `load_task`.
        model: the frozen model.
        tokenizer: its tokenizer.
        out: the run's folder. The router that is fitted goes to its subfolder "router", what is
            recommended to "winner".
        minutes: no method is begun that is expected to end later than this [minutes]; one that was
            begun is ended. Each call has its own.
        methods: names to compare in place of the usual ones, zero-shot always among them.
        settings: of the methods; `router` is left out, since one is fitted.
        fit: settings of the router's fit; None takes the defaults, with the encoder of `settings`.
        seed: of every draw.
        data: where the rows are from, for the run's configuration.
        say: is given a line of progress a method.

    Raises:
        ValueError: the model, the settings, the names or the folder do not fit, or zero-shot
            cannot answer the task.

    Examples:
        A model of two layers and a vocabulary of six words stands for a real one (`load_model`).

        >>> from tempfile import TemporaryDirectory
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from icrouting import Example, Task, TaskSpec, compare
        >>> vocabulary = dict(a=0, dull=1, nice=2, film=3, bad=4, good=5)
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=6, num_hidden_layers=2, **sizes))
        >>> rows = (Example({"text": "dull"}, (), 0), Example({"text": "nice"}, (), 1)) * 20
        >>> task = Task(TaskSpec("mood", "near", "a {text} film", ("bad", "good")), rows, rows)
        >>> with TemporaryDirectory() as folder:
        ...     found = compare(task, model, tokenizer, folder, methods=["probe-hidden"], say=str)
        >>> [line.method for line in found.board.lines]
        ['zero-shot', 'probe-hidden']
        >>> found.board.line("probe-hidden").accuracy.value
        1.0
    """
    names = asked(task, minutes, methods, settings)
    folder = RunFolder(Path(out))
    climb = Climb(task, model, tokenizer, folder, settings, fit, seed, data, say)
    with climb.claimed():
        budget = Budget(minutes, folder.path / "spent.json")
        missed = climb.climb(names, budget)
        board = climb.board(names, missed, budget)
        method = climb.in_force(board.recommendation.method)
        place = folder.path / "winner"
        winner.save(place, method, climb.task, climb.icr)
        answer = wording.answer(board)
        wording.write(folder, board, answer, place)
    return Comparison(folder.path, board, answer, method, climb.task)


def asked(task: Task, minutes: float, methods: Sequence[str], settings: Settings) -> list[str]:
    """Returns the names of the methods that are asked for, in order of cost.

    Needs no model, so that a mistake stops a comparison before any work.

    Raises:
        ValueError: an argument of `compare` does not fit, or a name is unknown.
    """
    if here().num_processes > 1:
        raise ValueError("a comparison stops by the clock, so it runs in one process: start one")
    if settings.router is not None:
        raise ValueError("a comparison fits a router on its own rows: leave router out")
    if not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes:g}")
    names = ladder(task, methods)
    make_methods([name for name in names if name != ICR], settings)
    return names
