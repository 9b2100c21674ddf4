"""Texts: the answers of a batch as they grow, each with an end of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from icrouting.serving.jobs import LENGTH, STOP, Completion, Piece

# What a tokenizer decodes half a character to.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Growing:
    """One answer as it grows: what may be told of it, and whether it has ended.

    A text is told up to where a stop text might begin, and without half a character.

    Args:
        job: what is asked.
        tokenizer: decodes tokens.
        end_ids: tokens that end an answer.
    """

    def __init__(self, job: Completion, tokenizer: PreTrainedTokenizerBase, end_ids: set[int]):
        self.job = job
        self.has_ended = False
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._tokens: list[int] = []
        self._n_told_tokens = 0
        self._told = ""

    def add(self, token: int) -> None:
        """Takes the next token, and tells what it makes certain."""
        if self.has_ended:
            return
        if not self.job.is_wanted:
            # Nobody is told: the row is free for others to end.
            self.has_ended = True
            return
        if token in self._end_ids:
            self._end(self._text(), STOP)
            return
        self._tokens.append(token)
        text = self._text()
        places = [text.find(stop) for stop in self.job.stop if stop in text]
        if places:
            self._end(text[: min(places)], STOP)
        elif len(self._tokens) >= self.job.max_tokens:
            self._end(text, LENGTH)
        else:
            self._tell(text[: self._certain(text)])

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _certain(self, text: str) -> int:
        """Returns how many characters of a text no later token can change."""
        end = len(text)
        while end and text[end - 1] == UNFINISHED:
            end -= 1
        # A stop text may have begun.
        for stop in self.job.stop:
            for length in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:length]):
                    end -= length
                    break
        return end

    def _tell(self, text: str, reason: str | None = None) -> None:
        if not text.startswith(self._told):
            # Some tokenizers change what stands before: it waits for the end.
            if reason is None:
                return
            new = text
        else:
            new = text[len(self._told) :]
        if not new and reason is None:
            return
        n_new = len(self._tokens) - self._n_told_tokens
        self._n_told_tokens = len(self._tokens)
        self._told = text
        self.job.tell(Piece(new, n_new, reason))

    def _end(self, text: str, reason: str) -> None:
        self.has_ended = True
        self._tell(text, reason)


class EachEnds(StoppingCriteria):
    """Hands each row of a batch its next token, and ends it with its own answer."""

    def __init__(self, texts: Sequence[Growing]):
        self._texts = texts

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Returns which rows have ended, [batch]; `generate` asks after every step."""
        for text, token in zip(self._texts, input_ids[:, -1].tolist(), strict=True):
            text.add(token)
        ended = [text.has_ended for text in self._texts]
        return torch.tensor(ended, device=input_ids.device)
