"""Chats: a prompt as a user's turn, in the words of the tokenizer's own chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

# One turn has a "role" ("system", "user" or "assistant") and its "content"; a conversation many.
Message = Mapping[str, str]
Messages = Sequence[Message]

# Stand in for texts where it is looked for what a template puts around them.
_QUESTION = "QUESTION0STANDS0HERE"
_ANSWER = "ANSWER0STANDS0HERE"
# Some templates name the day. Prompts must not change overnight, so it is the day that the
# templates of Llama 3 name themselves where no clock is to be had.
_DAY = datetime(2024, 7, 26)
_CLOCK = "strftime_now"


def rendered(
    tokenizer: Any, messages: Messages, *, opens_answer: bool = True, today: bool = False
) -> str:
    """Returns a conversation as the text that a tokenizer's chat template makes of it.

    Args:
        tokenizer: has the template.
        messages: the turns, each with its "role" and its "content".
        opens_answer: whether the assistant's next turn is opened at the end.
        today: whether a template that names the day names this one, as other programs let it; else
            it names one that is always the same.

    Raises:
        TypeError: it is no list of such turns.
        ValueError: the tokenizer has no template, or the template refuses these turns.
    """
    # Here and not above: a command that only reads a task file needs none of it.
    from jinja2 import TemplateError

    _check(messages, opens_answer)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this tokenizer has no chat template: take the tokenizer of a model that was trained "
            "on chats, set `tokenizer.chat_template`, or leave `chat` out"
        )
    template = tokenizer.get_chat_template()
    if _CLOCK in template and not today:
        template = _stopped_clock() + template
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=opens_answer,
            chat_template=template,
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"this tokenizer's chat template refuses a conversation of {roles} ({error}): "
            "if it takes no system turn, leave `system` out"
        ) from error


def _stopped_clock() -> str:
    """Returns the beginning of a template for which it is always the same day."""
    # A macro of the template's own goes before the function that transformers gives it.
    spelled = "format"
    for code in ("%d", "%b", "%Y", "%B", "%m", "%y", "%A", "%a", "%H", "%M", "%S"):
        spelled += f" | replace('{code}', '{_DAY.strftime(code)}')"
    # Behind an expression, unlike a block, no line break is trimmed.
    return f"{{%- macro {_CLOCK}(format) %}}{{{{ {spelled} }}}}{{% endmacro %}}{{{{ '' }}}}"


def _check(messages: Messages, opens_answer: bool) -> None:
    """Checks that turns are what templates read, and that an answer may follow the last of them."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(
            f"expected a list of messages, got {messages!r} ({type(messages).__name__})"
        )
    for message in messages:
        is_mapping = isinstance(message, Mapping)
        if not is_mapping or not all(
            isinstance(message.get(name), str) for name in ("role", "content")
        ):
            raise TypeError(
                'expected messages such as {"role": "user", "content": "a text"}, '
                f"got {message!r}"
            )
    if not messages:
        raise ValueError("expected a conversation of one message or more, got none")
    if opens_answer and messages[-1]["role"] == "assistant":
        raise ValueError(
            "expected a conversation that ends with the user's turn, whose answer is asked for; "
            f"it ends with the assistant's: {messages[-1]['content'][-40:]!r}"
        )


def opened(tokenizer: Any, messages: Messages) -> tuple[str, str]:
    """Returns a conversation up to the assistant's answer, and what stands between the two.

    That is a space, which tokenizers join with the word behind it, or nothing.
    """
    text = rendered(tokenizer, messages)
    joint = _joint(tokenizer)
    return text.removesuffix(joint), joint


def _joint(tokenizer: Any) -> str:
    """Returns the space that a template puts before an assistant's text; "" where it puts none."""
    question = {"role": "user", "content": _QUESTION}
    text = rendered(tokenizer, [question])
    if text.endswith(" "):
        return " "
    answered = [question, {"role": "assistant", "content": _ANSWER}]
    whole = rendered(tokenizer, answered, opens_answer=False)
    return " " if whole.startswith(f"{text} {_ANSWER}") else ""


@dataclass(frozen=True, eq=False)
class Chat:
    """Makes prompts of questions: a user's turn each, behind an optional system turn.

    Attributes:
        tokenizer: has the chat template.
        system: the system turn; empty for none, where a template may have one of its own.
    """

    tokenizer: Any
    system: str = ""

    @cached_property
    def joint(self) -> str:
        """What stands between a prompt and its answer: a space or nothing, as the template has."""
        return _joint(self.tokenizer)

    def prompt(self, question: str) -> str:
        """Returns the prompt of a question."""
        text = rendered(self.tokenizer, self._messages((), question))
        return text.removesuffix(self.joint)

    def behind(self, turns: Sequence[tuple[str, str]], question: str) -> tuple[str, str]:
        """Returns the prompt of a question behind others and their answers, in two parts.

        The first holds all that does not depend on the question, so that many prompts share it; it
        is empty where there are no other turns. Together they are the template's text.

        Raises:
            ValueError: what the template makes of the earlier turns depends on the question.
        """
        whole = rendered(self.tokenizer, self._messages(turns, question)).removesuffix(self.joint)
        if not turns:
            return "", whole
        context, _ = self.frame(turns)
        if not whole.startswith(context):
            raise ValueError(
                "this tokenizer's chat template writes demonstrations otherwise for one question "
                "than for another, so that they cannot be read once for all: "
                "leave `chat` out, or set another `tokenizer.chat_template`"
            )
        return context, whole.removeprefix(context)

    def demonstration(self, question: str, answer: str) -> str:
        """Returns a question with its answer, as a conversation that ends there."""
        messages = [*self._messages((), question), {"role": "assistant", "content": answer}]
        return rendered(self.tokenizer, messages, opens_answer=False)

    def frame(
        self, turns: Sequence[tuple[str, str]] = (), *, today: bool = False
    ) -> tuple[str, str]:
        """Returns what the template puts before and behind any question.

        Args:
            turns: earlier questions, each with its answer.
            today: as of `rendered`.

        Raises:
            ValueError: the template does not show the question.
        """
        text = rendered(self.tokenizer, self._messages(turns, _QUESTION), today=today)
        before, question, after = text.rpartition(_QUESTION)
        if not question:
            raise ValueError(
                "this tokenizer's chat template does not show the user's turn as it is: "
                "set another `tokenizer.chat_template`, or leave `chat` out"
            )
        return before, after.removesuffix(self.joint)

    def _messages(self, turns: Sequence[tuple[str, str]], question: str) -> list[Message]:
        return conversation(question, self.system, turns)


def conversation(
    question: str, system: str = "", turns: Sequence[tuple[str, str]] = ()
) -> list[Message]:
    """Returns a question as a conversation.

    Args:
        question: the user's last turn.
        system: the system turn; empty for none.
        turns: earlier questions, each with its answer.
    """
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": system})
    for earlier_question, answer in turns:
        messages.append({"role": "user", "content": earlier_question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": question})
    return messages
