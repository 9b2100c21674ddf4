"""The user's own prompts of a task, each a method beside the others."""

import hashlib
from collections.abc import Sequence
from string import Formatter

from transformers import PreTrainedTokenizerBase

from icrouting.methods.base import Method
from icrouting.methods.settings import Settings
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import Example, NamedPrompt, Task, digest_of_template

PREFIX = "prompt:"
# Stands for all of them where methods are named.
ALL = "prompts"


class UserPrompt(Method):
    """The untouched model on a prompt that a task names (`TaskSpec.prompts`).

    What stands before its first slot, such as demonstrations, is read once for all examples.
    """

    draws = False
    reads_sources = False

    def __init__(self, settings: Settings, name: str):
        super().__init__(settings)
        self.name = name

    def on(self, task: Task) -> Method:
        """Returns this method; ValueError where the task has no prompt of its name."""
        self._prompt_of(task)
        return self

    def prompt(self, task: Task, example: Example) -> Prompt:
        """Returns the task's own prompt of this name."""
        asked = self.asked(task).bound_to(self.tokenizer)
        text = asked.prompt(example)
        context = _before_slots(asked)
        # A chat template may trim the beginning of a turn.
        if not text.startswith(context):
            context = ""
        return Prompt(context, text.removeprefix(context), asked.joint)

    def asked(self, task: Task) -> Task:
        """Returns a task with its own prompt of this name in its template's place."""
        return task.asked_by(self._prompt_of(task))

    def _prompt_of(self, task: Task) -> NamedPrompt:
        name = self.name.removeprefix(PREFIX)
        for prompt in task.spec.prompts:
            if prompt.name == name:
                return prompt
        names = ", ".join(prompt.name for prompt in task.spec.prompts) or "none"
        raise ValueError(
            f"task {task.name!r} has no prompt {name!r}: it has {names}; "
            "write it under [[prompts]] in the task file, or in `Task.from_rows(prompts=...)`"
        )


def _before_slots(task: Task) -> str:
    """Returns what every prompt of a task begins with."""
    beginning = ""
    if task.spec.chat:
        beginning, _ = task.chat.frame()
    # A brace that is no slot's ends a part too.
    for literal, slot, _, _ in Formatter().parse(task.spec.template):
        beginning += literal
        if slot is not None:
            break
    return beginning


def named_prompts(names: Sequence[str], tasks: Sequence[Task]) -> list[str]:
    """Returns names of methods with every prompt of the tasks in the place of "prompts"."""
    methods = []
    for name in names:
        if name != ALL:
            methods.append(name)
            continue
        for task in tasks:
            methods += [PREFIX + prompt.name for prompt in task.spec.prompts]
    return list(dict.fromkeys(methods))


def prompt_digests(
    methods: Sequence[str], tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Returns 8 hex digits for what each of the named methods asks each task, by "task/method".

    Where a prompt is a chat and its task is none, so that no task names the chat template, that
    has digits of its own.
    """
    digests = {}
    for task in tasks:
        for prompt in task.spec.prompts:
            method = PREFIX + prompt.name
            if method not in methods:
                continue
            digest = hashlib.sha256(repr(prompt).encode()).hexdigest()
            digests[f"{task.name}/{method}"] = digest[:8]
            is_chat = task.asked_by(prompt).spec.chat and not task.spec.chat
            # Without a template the method is refused, and answers nothing.
            if is_chat and tokenizer.chat_template:
                template = digest_of_template(tokenizer)
                digests[f"the chat template of {task.name}/{method}"] = template[:8]
    return digests
