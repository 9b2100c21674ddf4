"""Sources: what a router knows of the tasks that it was fitted on, and of prompts unlike theirs."""

import string
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from transformers import PreTrainedTokenizerBase

from icrouting.config import FitConfig
from icrouting.decoder.batches import tokenize
from icrouting.routing.encoder import query_texts
from icrouting.runtime.showing import in_short
from icrouting.tasks.catalogue import SPECS
from icrouting.tasks.chat import Chat, Messages, conversation
from icrouting.tasks.task import LabelScoring, Task, TaskSpec

# Training rows whose prompts are looked at for their lines, and for an example that is short.
N_ROWS = 200
# Characters of a prompt's beginning and of its end that a warning shows.
N_SHOWN = 40
# Looking costs a hundredth of a short pass: after so many calls, one in RARELY is looked at, and of
# prompts of more tokens than N_TOKENS the two ends alone.
N_LOOKS = 16
RARELY = 8
N_TOKENS = 256


@dataclass(frozen=True)
class Source:
    """A task that a router was fitted on.

    Attributes:
        name: the task's.
        template: its prompt, with `{field}` slots.
        options: the answers that the example chooses from; letters, where each row of the task
            brings its own choices.
        example: the prompt of one of the training rows.
        n_lines: how many lines its prompts have; None where they differ in that.
        n_prompts: few-shot prompts that the directions were drawn from; 0 where they are those of
            another router, which this one went on from.
        n_demos: demonstrations in front of each of them, at most.
        n_queries: zero-shot prompts that the router was trained on.
        chat: whether its prompts are chats; template, example and lines are then the user's turn.
        system: the system turn of its chats; empty for none.
        words: replacements of columns' values before the template is filled (`TaskSpec.words`).
        label_scoring: how its options are scored.
        n_judged: validation rows that chose the router that was kept, if any did.
        has_unshown_choices: whether each row brings choices that the template does not show.
    """

    name: str
    template: str
    options: tuple[str, ...]
    example: str
    n_lines: PositiveInt | None
    n_prompts: NonNegativeInt
    n_demos: NonNegativeInt
    n_queries: PositiveInt
    # What an artifact leaves out where it has the default, so that an older one is saved as it was.
    chat: bool = False
    system: str = ""
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    label_scoring: LabelScoring = "first"
    n_judged: NonNegativeInt = 0
    has_unshown_choices: bool = False

    @property
    def prompt(self) -> str | Messages:
        """The example as `Routed.score` takes it."""
        return conversation(self.example, self.system) if self.chat else self.example

    @property
    def spec(self) -> TaskSpec:
        """How rows of the task become prompts."""
        spec = TaskSpec(
            self.name,
            "far",
            self.template,
            self.options,
            self._whole_words(),
            label_scoring=self.label_scoring,
            chat=self.chat,
            system=self.system,
        )
        # The letters of rows that bring their choices are made of the choices.
        if spec.shows_choices or self.has_unshown_choices:
            spec = replace(spec, options=())
        return spec

    def _whole_words(self) -> Mapping[str, Mapping[str, str]]:
        """Returns its words; those of a known task where an earlier version kept none."""
        usual = SPECS.get(self.name)
        if not self.words and usual is not None and usual.template == self.template:
            return usual.words
        return self.words

    def as_kept(self) -> dict[str, Any]:
        """Returns what an artifact's config.json holds of it."""
        kept = {}
        for each in fields(self):
            value = getattr(self, each.name)
            has_default = each.default_factory is not MISSING and value == each.default_factory()
            if not has_default and (each.default is MISSING or value != each.default):
                kept[each.name] = value
        return kept

    def differences(self, spec: TaskSpec) -> list[str]:
        """Returns a phrase for each way in which a spec reads otherwise than this task did."""
        phrases = []
        if self.template != spec.template:
            phrases.append(f"{self.template!r}, and reads {spec.template!r} here")
        # Where each row brings its choices, the source's options are those of one row.
        if spec.options and self.options != tuple(spec.options):
            phrases.append(f"the options {', '.join(self.options)}, not {', '.join(spec.options)}")
        if self.chat != spec.chat:
            phrases.append("chats, not plain prompts" if self.chat else "plain prompts, not chats")
        elif self.system != spec.system:
            phrases.append(f"the system turn {self.system!r}, not {spec.system!r}")
        words = {name: dict(texts) for name, texts in spec.words.items()}
        # An earlier version kept none, which says nothing.
        if self.words and self.words != words:
            phrases.append(f"the words {in_short(str(self.words))}, not {in_short(str(words))}")
        if self.label_scoring != spec.label_scoring:
            phrases.append(f"label_scoring {self.label_scoring!r}, not {spec.label_scoring!r}")
        return phrases

    @property
    def fixed_texts(self) -> list[str]:
        """What stands before, between and behind the slots of the template."""
        texts = [""]
        for text, slot, _, _ in string.Formatter().parse(self.template):
            texts[-1] += text
            if slot is not None:
                texts.append("")
        return texts

    @property
    def cue(self) -> str:
        """What stands behind the last slot, up to the answer."""
        return self.fixed_texts[-1]

    def has_form(self, prompt: str) -> bool:
        """Returns whether a prompt is the template with texts in its slots, and nothing else."""
        if self.n_lines is not None and prompt.count("\n") + 1 != self.n_lines:
            return False
        first, *others = self.fixed_texts
        # A template without a slot is one text alone.
        if not others:
            return prompt == first
        *middle, last = others
        start = len(first)
        end = len(prompt) - len(last)
        if not (prompt.startswith(first) and prompt.endswith(last) and start <= end):
            return False
        # The leftmost place leaves most room for the texts to come: one search each is enough.
        for text in middle:
            place = prompt.find(text, start, end)
            if place < 0:
                return False
            start = place + len(text)
        return True


def sources_of(
    tasks: Sequence[Task],
    fit: FitConfig,
    n_learned: Mapping[str, int] | None = None,
    n_judged: Mapping[str, int] | None = None,
) -> tuple[Source, ...]:
    """Returns what a router is to know of the tasks that it is fitted on.

    Args:
        tasks: the tasks.
        fit: the settings.
        n_learned: rows that the router was trained on, by task; None for training rows alone.
        n_judged: validation rows that chose it, by task; None for none.
    """
    if n_learned is None:
        n_learned = {task.name: min(fit.n_queries, len(task.train)) for task in tasks}
    sources = []
    for task in tasks:
        rows = task.train[:N_ROWS]
        prompts = [task.question(row) for row in rows]
        # An example is to be read: of these, the shortest.
        shortest = min(range(len(rows)), key=lambda place: len(prompts[place]))
        line_counts = {prompt.count("\n") + 1 for prompt in prompts}
        _, class_sizes = np.unique(task.train_labels, return_counts=True)
        source = Source(
            name=task.name,
            template=task.spec.template,
            options=task.options(rows[shortest]),
            example=prompts[shortest],
            n_lines=line_counts.pop() if len(line_counts) == 1 else None,
            n_prompts=min(fit.n_prompts, len(task.train)),
            n_demos=int(np.minimum(class_sizes, fit.shown_per_class).sum()),
            n_queries=n_learned[task.name],
            chat=task.spec.chat,
            system=task.spec.system,
            words={name: dict(texts) for name, texts in task.spec.words.items()},
            label_scoring=task.spec.label_scoring,
            n_judged=n_judged[task.name] if n_judged else 0,
            has_unshown_choices=not task.spec.options and not task.spec.shows_choices,
        )
        sources.append(source)
    return tuple(sources)


def as_learned(task: Task, sources: Sequence[Source]) -> Task:
    """Returns a task as a chat or not, as the source of its name was; other tasks as they are."""
    for source in sources:
        form = (source.chat, source.system)
        if source.name == task.name and form != (task.spec.chat, task.spec.system):
            spec = replace(task.spec, chat=source.chat, system=source.system)
            return replace(task, spec=spec, rendering=None)
    return task


def read_otherwise(sources: Sequence[Source], tasks: Sequence[Task]) -> list[str]:
    """Returns a line for each task that reads otherwise than the source of its name did.

    To route a task by another prompt than it was fitted on is a loss that no score shows.
    """
    source_by_name = {source.name: source for source in sources}
    lines = []
    for task in tasks:
        source = source_by_name.get(task.name)
        if source is None:
            continue
        differences = source.differences(task.spec)
        if differences:
            lines.append(f"{task.name} was fitted on {'; on '.join(differences)}")
    return lines


@dataclass(frozen=True)
class Form:
    """How a source's prompts read when they are decoded from tokens, as encoders read them.

    Attributes:
        source: the source.
        before: what a chat template puts before the user's turn; empty where there is no chat.
        after: what it puts behind it.
    """

    source: Source
    before: str = ""
    after: str = ""

    def has_form(self, prompt: str) -> bool:
        """Returns whether a prompt is of this form."""
        start = len(self.before)
        end = len(prompt) - len(self.after)
        if not (prompt.startswith(self.before) and prompt.endswith(self.after) and start <= end):
            return False
        return self.source.has_form(prompt[start:end])

    def has_ends(self, beginning: str, end: str) -> bool:
        """Returns whether a prompt may have this form, of which the two ends are known."""
        # So few characters are in any N_TOKENS / 2 tokens.
        head = (self.before + self.source.fixed_texts[0])[:N_SHOWN]
        cue = (self.source.cue + self.after)[-N_SHOWN:]
        return beginning.startswith(head) and end.endswith(cue)


def forms_of(source: Source, tokenizer: PreTrainedTokenizerBase) -> list[Form]:
    """Returns the forms of a source's prompts; none where this tokenizer cannot render its chats.

    A chat template that names the day makes two: as the library renders it, and as others do.
    """
    if not source.chat:
        return [Form(source)]
    chat = Chat(tokenizer, source.system)
    # Some templates trim turns.
    question = source.example.strip()
    forms = []
    for today in (False, True):
        try:
            before, after = chat.frame(today=today)
        except ValueError:
            return []
        token_lists = tokenize(tokenizer, [before + question + after])
        (text,) = query_texts(tokenizer, token_lists)
        before, _, after = text.rpartition(question)
        form = Form(source, before, after)
        if form not in forms:
            forms.append(form)
    return forms


def _changes_texts(tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]) -> bool:
    """Returns whether the texts of tokens are others than those that they were made of."""
    examples = [source.example for source in sources]
    return query_texts(tokenizer, tokenizer(examples).input_ids) != examples


class FormWatch:
    """Warns, once, of a prompt that has the form of none of a router's sources.

    One line above the template is enough for a router to do harm where it had helped.

    Args:
        sources: the tasks that the router was fitted on.
        tokenizer: gives the texts of tokens.
    """

    def __init__(self, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase):
        self._sources = sources
        self._tokenizer = tokenizer
        self._forms: list[Form] = []
        for source in sources:
            self._forms += forms_of(source, tokenizer)
        # A tokenizer that changes texts says nothing of their form.
        self._is_over = _changes_texts(tokenizer, sources)
        self._n_calls = 0

    def look_at(self, token_lists: Sequence[Sequence[int]]) -> None:
        """Looks at the first of the prompts of a call; after a warning, at none."""
        if self._is_over or not token_lists:
            return
        self._n_calls += 1
        if self._n_calls > N_LOOKS and self._n_calls % RARELY:
            return
        beginning, end, is_known = self._read(token_lists[0])
        if not is_known:
            self._is_over = True
            warnings.warn(_unlike(beginning, end, self._sources), stacklevel=2)

    def _read(self, tokens: Sequence[int]) -> tuple[str, str, bool]:
        """Returns a prompt's beginning and its end, and whether any source has its form."""
        if len(tokens) > N_TOKENS:
            half = N_TOKENS // 2
            parts = [tokens[:half], tokens[-half:]]
            beginning, end = query_texts(self._tokenizer, parts)
            is_known = any(form.has_ends(beginning, end) for form in self._forms)
            return beginning[:N_SHOWN], end[-N_SHOWN:], is_known
        (prompt,) = query_texts(self._tokenizer, [tokens])
        is_known = any(form.has_form(prompt) for form in self._forms)
        if len(prompt) <= 2 * N_SHOWN:
            return prompt, "", is_known
        return prompt[:N_SHOWN], prompt[-N_SHOWN:], is_known


def _unlike(beginning: str, end: str, sources: Sequence[Source]) -> str:
    """What is said of a prompt that has the form of no source; a short one has no end apart."""
    names = ", ".join(source.name for source in sources)
    closing = end or beginning
    # What is likeliest meant is the task whose cue it ends with.
    nearest = next((source for source in sources if closing.endswith(source.cue)), sources[0])
    shown = f"{beginning!r} ... {end!r}" if end else repr(beginning)
    kind = " as a user's turn of a chat" if nearest.chat else ""
    if nearest.system:
        kind += f" behind the system turn {nearest.system!r}"
    return (
        "this prompt has the form of none of the tasks that the router was fitted on "
        f"({names}): it reads {shown}, where {nearest.name} reads {nearest.template!r}{kind}. "
        "What routing does to it was not learned and may do harm: for one of these tasks, give "
        "the template's own text and nothing around it; for another task, measure with `icr eval`"
    )
