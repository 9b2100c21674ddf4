"""Filling: the prompt that `icr generate` and `icr inspect` look at, typed or made of fields."""

from collections.abc import Sequence
from dataclasses import dataclass

from icrouting.routing.sources import Source
from icrouting.runtime.checks import known
from icrouting.tasks.chat import Messages, conversation
from icrouting.tasks.rows import parse_choices
from icrouting.tasks.task import Example, LabelScoring, Task, TaskSpec


@dataclass(frozen=True)
class Filled:
    """A prompt, and the answers that its task chooses from: none where the prompt was typed.

    `label_scoring` is how the task scores them.
    """

    prompt: str | Messages
    options: tuple[str, ...]
    label_scoring: LabelScoring = "first"


def filled(
    prompt: str | None,
    task: str | None,
    fields: Sequence[str],
    sources: Sequence[Source] | None,
    *,
    chat: bool = False,
    system: str = "",
) -> Filled:
    """Returns the prompt that was typed, or that of a router's task with fields in its slots.

    Args:
        prompt: what was typed; None where fields are given.
        task: the name of the task; None where the router was fitted on one alone.
        fields: "name=text" for each slot of the task's template, and "choices=A|B" where each row
            brings its own; a template of one slot takes the bare text.
        sources: what the router knows of its tasks; None in routers of version 0.1.
        chat: whether what was typed is a user's turn; a router's task says so itself.
        system: the system turn of that chat, in which a backslash and an n are a new line.

    Raises:
        ValueError: the router does not know the task, or the fields are not those of its template,
            or there is a system turn and no chat.
    """
    if system and not chat:
        raise ValueError("--system is a turn of a chat: give --chat with it")
    if prompt is not None:
        whole_prompt = conversation(prompt, system.replace("\\n", "\n")) if chat else prompt
        return Filled(whole_prompt, ())
    source = _source_of(task, sources)
    if chat and not source.chat:
        raise ValueError(
            f"{source.name} was fitted on plain prompts: leave --chat out, or type the prompt"
        )
    spec = source.spec
    needs_choices = not spec.options
    texts = _texts_by_slot(fields, spec, needs_choices)
    choices = parse_choices(texts.pop("choices")) if needs_choices else ()
    # Any label will do, since nobody asks for the answer.
    example = Example(texts, choices, 0)
    whole = Task(spec, (), ())
    question = whole.question(example)
    asked = conversation(question, source.system) if source.chat else question
    return Filled(asked, whole.options(example), source.label_scoring)


def _source_of(name: str | None, sources: Sequence[Source] | None) -> Source:
    if not sources:
        raise ValueError(
            "this router keeps no template of its tasks: type the prompt with --prompt"
        )
    source_by_name = {source.name: source for source in sources}
    if name is not None:
        return known("task of this router", name, source_by_name)
    if len(sources) > 1:
        raise ValueError(
            f"the router was fitted on {', '.join(source_by_name)}: name one of them with --task"
        )
    return sources[0]


def _texts_by_slot(fields: Sequence[str], spec: TaskSpec, needs_choices: bool) -> dict[str, str]:
    """Returns the text of each slot; ValueError where they are not those of the template."""
    slots = [*spec.slots, *(["choices"] if needs_choices else [])]
    texts: dict[str, str] = {}
    for field in fields:
        name, sign, text = field.partition("=")
        if sign and name in slots and name not in texts:
            texts[name] = text
        # A text may hold the sign itself.
        elif len(slots) == 1 and not texts:
            texts[slots[0]] = field
        else:
            raise ValueError(
                f"--fields {field!r}: expected one NAME=TEXT for each of {', '.join(slots)}, "
                f"the slots of {spec.name}'s template {spec.template!r}"
            )
    missing = [slot for slot in slots if not texts.get(slot, "").strip()]
    if missing:
        raise ValueError(
            f"--fields lacks {', '.join(missing)}: {spec.name}'s template is {spec.template!r}"
        )
    return texts
