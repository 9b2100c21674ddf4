"""Jobs: what a request asks of the model, and how its answer comes back."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from icrouting.routing.predictions import Prediction

# Why a text ended, in the words of OpenAI's interface.
STOP = "stop"
LENGTH = "length"


class Refused(Exception):
    """A request that is not answered, with an HTTP status and a sentence for whoever sent it.

    Attributes:
        status: the HTTP status.
        message: what was expected, what came, what to do.
        code: a word for programs.
        retry_after: seconds after which to try again; None where that is no use.
    """

    def __init__(
        self, status: int, message: str, code: str = "", retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.retry_after = retry_after


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: what was generated since the part before.
        n_tokens: how many tokens that were.
        finish_reason: why the text ends here; None where it goes on.
    """

    text: str
    n_tokens: int
    finish_reason: str | None = None


Answer = Piece | list[Prediction] | list[list[float]] | BaseException


@dataclass(eq=False)
class Job(ABC):
    """What one request asks of the model.

    Attributes:
        name: of a router, or "base".
        send: is handed each part of the answer, by the thread that runs the model.
        deadline: when nobody waits any longer, by `time.monotonic`.
        gone: set once the client has left: what is not computed yet is not.
        has_begun: whether a part was sent.
        is_over: whether the last part was sent.
    """

    name: str
    send: Callable[[Answer], None]
    deadline: float
    gone: threading.Event = field(default_factory=threading.Event)
    has_begun: bool = False
    is_over: bool = False

    def tell(self, part: Answer) -> None:
        """Sends a part of the answer; nothing once it is over."""
        if self.is_over:
            return
        self.has_begun = True
        self.is_over = not isinstance(part, Piece) or part.finish_reason is not None
        self.send(part)

    @property
    @abstractmethod
    def kind(self) -> tuple[Any, ...]:
        """Jobs of one kind may be run together."""

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for the answer."""
        return not self.gone.is_set() and time.monotonic() < self.deadline


@dataclass(eq=False)
class Completion(Job):
    """A text to go on from.

    Attributes:
        tokens: of the prompt.
        max_tokens: to generate, at most.
        stop: texts that end the answer, and are no part of it.
    """

    tokens: Sequence[int] = ()
    max_tokens: int = 16
    stop: Sequence[str] = ()

    @property
    def kind(self) -> tuple[Any, ...]:
        """All texts may be generated together, whosever they are."""
        return ("completion",)


@dataclass(eq=False)
class Classification(Job):
    """Rows of a task that the router knows, to be labelled.

    Attributes:
        rows: the slots of the task's template, by name.
        task: the name of the task; None where the router knows but one.
    """

    rows: Sequence[dict[str, Any]] = ()
    task: str | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Rows of one router and task may be labelled together."""
        return ("classification", self.name, self.task)


@dataclass(eq=False)
class Scoring(Job):
    """Prompts, and the options to choose from.

    Attributes:
        prompts: texts, or conversations.
        options: the answers to choose from.
    """

    prompts: Sequence[Any] = ()
    options: Sequence[str] = ()

    @property
    def kind(self) -> tuple[Any, ...]:
        """Prompts of one list of options may be scored together."""
        return ("scoring", tuple(self.options))
