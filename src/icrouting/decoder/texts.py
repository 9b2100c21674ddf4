"""Texts as users hand them in: lists of prompts and of options, checked before anything runs."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from icrouting.tasks.chat import Messages, opened
from icrouting.tasks.prompts import Prompt

T = TypeVar("T")

# A text is a sequence of letters, and sets and mappings have no order to be read in.
_NO_LISTS = (str, bytes, Prompt, set, frozenset, Mapping)


def listed(values: Iterable[T], what: str) -> list[T]:
    """Returns values as a list.

    Args:
        values: a sequence, or what is read once.
        what: what they are, as the error is to name them.

    Raises:
        TypeError: it is a single text, or has no order.
    """
    if isinstance(values, _NO_LISTS) or not isinstance(values, Iterable):
        raise TypeError(f"expected a list of {what}, got {values!r} ({type(values).__name__})")
    return list(values)


def texts_of(values: Iterable[str], what: str = "prompts") -> list[str]:
    """Returns texts as a list.

    Raises:
        TypeError: it is no list, or holds something else than texts.
    """
    texts = listed(values, what)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(
                f"expected a list of {what} as texts, got {text!r} ({type(text).__name__}) in it"
            )
    return texts


def prompts_of(
    values: Iterable[str | Messages], tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Returns zero-shot prompts, texts or conversations, as a list.

    Raises:
        TypeError: it is no list of them.
        ValueError: a prompt ends in a space, or the tokenizer cannot render a conversation.
    """
    prompts = []
    for value in listed(values, "prompts"):
        prompt = _prompt_of(value, tokenizer)
        check_ending(prompt.text)
        prompts.append(prompt)
    return prompts


def whole_prompts_of(
    values: Iterable[str | Prompt | Messages], tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Returns texts, conversations and prompts as a list of prompts.

    Raises:
        TypeError: it is no list of them.
        ValueError: the tokenizer cannot render a conversation.
    """
    whole_prompts = []
    for value in listed(values, "prompts"):
        is_whole = isinstance(value, Prompt)
        whole_prompts.append(value if is_whole else _prompt_of(value, tokenizer))
    return whole_prompts


def _prompt_of(value: Any, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Returns a text or a conversation as a prompt."""
    # Narrowed below, a value would be no text any more to who checks types.
    unchecked: Any = value
    if isinstance(value, Mapping) and "role" in value:
        raise TypeError(
            "expected a list of prompts, got one conversation: put it into a list, [messages]"
        )
    is_list = isinstance(value, list | tuple) and bool(value)
    if is_list and all(isinstance(message, Mapping) for message in value):
        return Prompt("", *opened(tokenizer, unchecked))
    (text,) = texts_of([unchecked])
    return Prompt("", text)


def check_ending(prompt: str) -> None:
    """Checks that no space ends a prompt, for which tokenizers join it with the word behind it.

    A line break, in which chat templates end, does no harm.

    Raises:
        ValueError: a space or the like ends it.
    """
    last = prompt[-1:]
    if last.isspace() and last not in "\r\n":
        raise ValueError(
            f"a prompt needs no space at its end, since the answer follows after one: "
            f"remove it (it ends {prompt[-20:]!r})"
        )
