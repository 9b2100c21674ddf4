"""Tasks: labelled examples, and the template that turns one into a prompt."""

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib import import_module
from typing import Any, Literal, get_args

import numpy as np

from icrouting.runtime.showing import in_short
from icrouting.tasks.chat import Chat

# What a `TaskSpec` had not at first: it is hashed where it is not as usual.
_LATER = ("label_scoring", "chat", "system", "prompts")
# How an option of several tokens is scored: by its first, or by all of them.
LabelScoring = Literal["first", "sum", "mean"]


def check_label_scoring(value: object) -> None:
    """ValueError for a way to score labels that there is not."""
    ways = get_args(LabelScoring)
    if value not in ways:
        raise ValueError(f"label_scoring must be one of {', '.join(ways)}, got {value!r}")


@dataclass(frozen=True)
class Example:
    """One labelled test or training item.

    `fields` are the texts that fill the template, by name; `choices` the answers to choose from,
    where every item brings its own (else empty); `label` is an index into the task's options.

    Examples:
        >>> from icrouting import Example
        >>> example = Example(fields={"text": "a joy to watch"}, choices=(), label=1)
        >>> example.fields["text"]
        'a joy to watch'
    """

    fields: Mapping[str, str]
    choices: tuple[str, ...]
    label: int

    def __post_init__(self):
        # A word would be read as one choice a letter.
        if isinstance(self.choices, str):
            raise TypeError(f"choices must be a tuple of texts, got {self.choices!r}")

    def __repr__(self) -> str:
        texts = {name: in_short(text) for name, text in self.fields.items()}
        choices = f", choices={in_short(self.choices)}" if self.choices else ""
        return f"Example({texts}{choices}, label={self.label})"


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt of the user's own for a task, to be compared with what the library does.

    Attributes:
        name: the method `prompt:NAME` asks with it.
        template: prompt text with slots that the task's template has too, perhaps with
            demonstrations written in.
        chat: whether it is a user's turn of a chat; None for as the task is.
        system: the system turn; None for the task's.
    """

    name: str
    template: str
    chat: bool | None = None
    system: str | None = None


@dataclass(frozen=True)
class TaskSpec:
    r"""How a task reads: everything but its rows (paper, table 6).

    Attributes:
        name: unique name.
        group: "in-domain", "near" or "far", as the paper groups its tasks: under which heading a
            report's table lists it, and nothing else.
        template: prompt text with `{field}` slots; `{choices}` becomes one "A. text" line per
            choice and `{letters}` becomes "A/B/...". The label follows after one space.
        options: the answer words in label order; empty means letters, one per choice.
        words: replacements of field values, `{field: {value: text}}`, done before the template is
            filled.
        label_scoring: what is compared between options: the logit of each one's "first" token, the
            "sum" of the log-probabilities of all its tokens, or their "mean".
        chat: whether a prompt is a user's turn, in the words of the model's own chat template.
        system: the system turn of a chat; empty for none.
        prompts: prompts of the user's own, which stand beside the template as methods.

    Examples:
        >>> from icrouting import TaskSpec
        >>> spec = TaskSpec("tickets", "far", "Ticket: {text}\nTeam:", ("Access", "Hardware"))
        >>> spec.slots
        ('text',)
    """

    name: str
    group: str
    template: str
    options: tuple[str, ...] = ()
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    label_scoring: LabelScoring = "first"
    chat: bool = False
    system: str = ""
    prompts: tuple[NamedPrompt, ...] = ()

    def __post_init__(self):
        # A word would be read as one option a letter.
        if isinstance(self.options, str):
            raise TypeError(f"options must be a tuple of texts, got {self.options!r}")
        check_label_scoring(self.label_scoring)
        if self.system and not self.chat:
            raise ValueError(f"system is a turn of a chat, and this is none: {self.system!r}")

    def __repr__(self) -> str:
        parts = [repr(self.name), repr(self.group), repr(in_short(self.template))]
        if self.options:
            parts.append(f"options={in_short(self.options)}")
        if self.label_scoring != "first":
            parts.append(f"label_scoring={self.label_scoring!r}")
        if self.chat:
            parts.append("chat=True")
        return f"TaskSpec({', '.join(parts)})"

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the row fields that the template needs."""
        slots = []
        for _, name, _, _ in string.Formatter().parse(self.template):
            # Choices and letters are made of the choices, which are no field of a row.
            if name and name not in slots and name not in ("choices", "letters"):
                slots.append(name)
        return tuple(slots)

    @property
    def shows_choices(self) -> bool:
        """Whether the template shows the choices that each row brings."""
        names = {name for _, name, _, _ in string.Formatter().parse(self.template)}
        return not names.isdisjoint({"choices", "letters"})


@dataclass(frozen=True)
class Task:
    r"""A task's spec, how it reads, and its rows.

    Methods learn and draw demonstrations from `train`, choose on `validation` and are measured on
    `test`. `n_dropped` counts training rows left out because they repeat one another or a held-back
    row; `dropped_example` is one of them and the row that it repeats.

    Examples:
        >>> from icrouting import Example, Task, TaskSpec
        >>> spec = TaskSpec("tickets", "far", "Ticket: {text}\nTeam:", ("Access", "Hardware"))
        >>> lost = Example({"text": "I lost my password"}, choices=(), label=0)
        >>> dark = Example({"text": "The screen is dark"}, choices=(), label=1)
        >>> task = Task(spec, train=(lost, dark), test=(dark,))
        >>> task.prompt(dark)
        'Ticket: The screen is dark\nTeam:'
        >>> task.answer(dark)
        'Hardware'
    """

    spec: TaskSpec
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    validation: tuple[Example, ...] = ()
    n_dropped: int = 0
    dropped_example: tuple[Example, Example] | None = None
    # What renders the prompts of a chat, from `bound_to` on.
    rendering: Chat | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_rows(
        cls,
        rows: Any,
        template: str,
        options: Sequence[str] = (),
        *,
        label: str = "label",
        name: str = "my task",
        group: str = "far",
        test: Any = None,
        split: float = 0.3,
        seed: int = 0,
        labels: Literal["index", "text"] | None = None,
        words: Mapping[str, Mapping[str, str]] | None = None,
        label_scoring: LabelScoring = "first",
        chat: bool = False,
        system: str = "",
        prompts: Mapping[str, str] | None = None,
    ) -> "Task":
        r"""Returns a task made of rows as they are: a table in memory, or a file of one.

        The rows to test on are drawn from `rows`, or are those of `test`. Of the others, those that
        repeat one another or a row to test on are left out, and a fifth becomes the validation
        slice, as in every task.

        Args:
            rows: a list of dicts, a pandas data frame, a `datasets.Dataset`, or the path of a file,
                which is read as CSV, TSV or parquet if it is called so, else as JSONL.
            template: prompt text with `{column}` slots; the label follows after one space. A brace
                that is no slot's is written twice.
            options: the answer words; empty where each row brings its `choices`.
            label: the column that holds the labels, each one of the options or its index.
            name: of the task.
            group: "in-domain", "near" or "far": under which heading a report's table lists the
                task. It changes nothing of what is computed, but is a part of the rows' digest.
            test: rows to test on, of any kind that `rows` may be; None to draw them from `rows`.
            split: the share of each label's rows to test on, where `test` is None; a label of two
                rows or more has one on either side.
            seed: of that draw.
            labels: what a label that is a number stands for, an option's "index" or its "text";
                None where the numbers say so themselves.
            words: replacements of columns' values, `{column: {value: text}}`.
            label_scoring: what is compared between options, see `TaskSpec`; "sum" where labels
                share their beginnings.
            chat: whether a prompt is a user's turn, in the words of the model's chat template; the
                label then follows as the assistant's turn.
            system: the system turn of a chat.
            prompts: templates of your own by name, such as the prompt that is in production; the
                method `prompt:NAME` asks with it.

        Raises:
            ValueError: a column is missing, a row does not fit (its place is named), or there are
                too few rows or labels to learn from.

        Examples:
            >>> from icrouting import Task
            >>> tickets = [
            ...     {"text": "I lost my password", "team": "Access"},
            ...     {"text": "The screen is dark", "team": "Hardware"},
            ...     {"text": "Please unlock my account", "team": "Access"},
            ...     {"text": "The mouse is gone", "team": "Hardware"},
            ... ]
            >>> teams = ["Access", "Hardware"]
            >>> task = Task.from_rows(tickets, "Ticket: {text}\nTeam:", teams, label="team")
            >>> len(task.train), len(task.test)
            (2, 2)
            >>> task.prompt(task.test[0])
            'Ticket: I lost my password\nTeam:'
        """
        # By its name, since the room that reads rows makes tasks of them: it imports this one.
        load = import_module("icrouting.tasks.load")
        return load.task_from_rows(
            rows,
            template,
            options,
            label=label,
            name=name,
            group=group,
            test=test,
            split=split,
            seed=seed,
            labels=labels,
            words=words or {},
            label_scoring=label_scoring,
            chat=chat,
            system=system,
            prompts=prompts or {},
        )

    def __repr__(self) -> str:
        counts = f"{len(self.train)} train, {len(self.validation)} validation"
        dropped = f", {self.n_dropped} left out" if self.n_dropped else ""
        return f"Task({self.spec!r}, rows: {counts}, {len(self.test)} test{dropped})"

    @property
    def name(self) -> str:
        """The spec's name."""
        return self.spec.name

    @cached_property
    def train_labels(self) -> np.ndarray:
        """The labels of the training rows."""
        return np.array([example.label for example in self.train])

    def options(self, example: Example) -> tuple[str, ...]:
        """The answers an example chooses from, in label order."""
        return self.spec.options or tuple(string.ascii_uppercase[: len(example.choices)])

    def bound_to(self, tokenizer: Any) -> "Task":
        """Returns this task for one model's tokenizer, whose chat template its prompts are made by.

        A task without chats is returned as it is.

        Raises:
            ValueError: the tokenizer has no chat template, or it refuses the system turn.
        """
        if not self.spec.chat:
            return self
        if self.rendering is not None and self.rendering.tokenizer is tokenizer:
            return self
        rendering = Chat(tokenizer, self.spec.system)
        # What does not fit is said here, before anything is computed.
        _ = rendering.frame()
        return replace(self, rendering=rendering)

    def teaches_like(self, other: "Task") -> bool:
        """Returns whether a method learns the same from both: they may be tested on other rows."""
        if self is other:
            return True
        taught = (self.spec, self.train, self.validation)
        return taught == (other.spec, other.train, other.validation)

    def in_chat(self) -> "Task":
        """Returns this task with its prompts as chats."""
        return replace(self, spec=replace(self.spec, chat=True))

    def asked_by(self, prompt: NamedPrompt) -> "Task":
        """Returns this task with another prompt in its template's place."""
        chat = self.spec.chat if prompt.chat is None else prompt.chat
        system = ""
        if chat:
            system = self.spec.system if prompt.system is None else prompt.system
        spec = replace(self.spec, template=prompt.template, chat=chat, system=system)
        rendering = self.rendering
        # Another system turn, other renderings.
        if spec.system != self.spec.system:
            rendering = None
        return replace(self, spec=spec, rendering=rendering)

    def question(self, example: Example) -> str:
        """The filled template of an example: its prompt, or in a chat the user's turn."""
        values = {}
        for name, text in example.fields.items():
            words = self.spec.words.get(name, {})
            values[name] = words.get(text, text)
        # Only an example with choices of its own has letters.
        letters = string.ascii_uppercase[: len(example.choices)]
        lines = []
        for letter, choice in zip(letters, example.choices, strict=True):
            lines.append(f"{letter}. {choice}")
        return self.spec.template.format(
            **values, choices="\n".join(lines), letters="/".join(letters)
        )

    def prompt(self, example: Example) -> str:
        """The zero-shot prompt of an example, ending right before the `joint` and the answer."""
        question = self.question(example)
        return self.chat.prompt(question) if self.spec.chat else question

    @property
    def joint(self) -> str:
        """What stands between a prompt and its answer: a space, or nothing in most chats."""
        return self.chat.joint if self.spec.chat else " "

    @property
    def chat(self) -> Chat:
        """What renders the prompts of a chat.

        Raises:
            ValueError: the task is not bound to a tokenizer, or has no chats.
        """
        if self.rendering is None:
            raise ValueError(
                f"the prompts of task {self.name!r} are chats, which a tokenizer's chat template "
                "words: ask `task.bound_to(tokenizer)` for them"
            )
        return self.rendering

    def answer(self, example: Example) -> str:
        """The right option of an example."""
        return self.options(example)[example.label]


def spec_among(task: "str | Task | TaskSpec | None", specs: Sequence[TaskSpec]) -> TaskSpec:
    """Returns how a task reads, which may be named as one of some that are known.

    Args:
        task: a name, or the task itself; None takes the only one that is known.
        specs: those that are known.

    Raises:
        ValueError: there is none of that name, or none is named and there are several.
    """
    if isinstance(task, Task):
        return task.spec
    if isinstance(task, TaskSpec):
        return task
    specs_by_name = {spec.name: spec for spec in specs}
    names = ", ".join(specs_by_name)
    n_alike = sum(spec.name == task for spec in specs)
    if not specs:
        raise ValueError(
            "it is not known here how rows become prompts, as an earlier version saved this: give "
            "the task or its spec, and to `icr predict` a task file: --task my-task.toml"
        )
    if task is None and len(specs) > 1:
        raise ValueError(f"say which task's template makes prompts of the rows: one of {names}")
    if task is None:
        return specs[0]
    if task not in specs_by_name:
        raise ValueError(f"no task {task!r} is known here: expected one of {names}")
    if n_alike > 1:
        raise ValueError(
            f"{n_alike} templates are known here as {task!r}: give the task or its spec, and to "
            f"`icr predict` the task file (--task {task}.toml)"
        )
    return specs_by_name[task]


def check_names(tasks: Sequence[Task]) -> None:
    """Checks that tasks have different names, by which alone records and routers know them.

    Raises:
        ValueError: two have one name.
    """
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two of the tasks are called {name!r}: give each a name of its own "
                "(`name=` of `Task.from_rows`, `name` in a task file)"
            )


def rows_digest(tasks: Sequence[Task]) -> str:
    """Returns 16 hex digits that identify the rows and templates of tasks."""
    # Run folders and routers keep these digits: what is hashed, and its order, must stay.
    digest = hashlib.sha256()
    for task in tasks:
        # The user's other prompts change nothing of what was computed without them.
        spec = replace(task.spec, prompts=())
        content = (spec, task.train, task.validation, task.test)
        digest.update(_hashed_text(content).encode())
    return digest.hexdigest()[:16]


def _hashed_text(value: object) -> str:
    """Returns a value as a dataclass without a `__repr__` of its own would show it."""
    if isinstance(value, Example | TaskSpec):
        parts = []
        for each in fields(value):
            if each.name not in _LATER or getattr(value, each.name) != each.default:
                parts.append(f"{each.name}={_hashed_text(getattr(value, each.name))}")
        return f"{type(value).__qualname__}({', '.join(parts)})"
    if type(value) is tuple:
        parts = [_hashed_text(each) for each in value]
        ending = "," if len(parts) == 1 else ""
        return f"({', '.join(parts)}{ending})"
    return repr(value)


def template_digest(tasks: Sequence[Task]) -> str | None:
    """Returns 16 hex digits that identify the chat template of tasks; None where none is a chat.

    The tasks are bound to one tokenizer.
    """
    for task in tasks:
        if task.spec.chat:
            return digest_of_template(task.chat.tokenizer)
    return None


def digest_of_template(tokenizer: Any) -> str:
    """Returns 16 hex digits that identify a tokenizer's chat template."""
    template = repr(tokenizer.chat_template)
    return hashlib.sha256(template.encode()).hexdigest()[:16]
