"""Calls: what a decoder, or its `generate`, was given."""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from icrouting.decoder.batches import attended
from icrouting.decoder.families import CACHE


def called_with(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a module's call by name."""
    return named(inspect.signature(module.forward), args, kwargs)


def named(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name, given the signature of what was called."""
    arguments = signature.bind_partial(*args, **kwargs).arguments
    # What a signature gathers in **kwargs counts like the rest.
    gathered = arguments.pop("kwargs", {})
    return arguments | gathered


def read_by(arguments: dict[str, Any]) -> Tensor:
    """Returns the token ids, or else the embeddings, among a decoder's arguments."""
    input_ids = arguments.get("input_ids")
    return arguments["inputs_embeds"] if input_ids is None else input_ids


def cache_of(arguments: dict[str, Any]) -> Any:
    """Returns the cache among the arguments of a decoder or of `generate`, under either name."""
    return arguments.get(CACHE, arguments.get("past_key_values"))


def n_seen(arguments: dict[str, Any]) -> int:
    """Returns the tokens in that cache."""
    cache = cache_of(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


def generate_ids(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the token ids among the arguments of `generate`, which takes them in three places."""
    for value in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")):
        if isinstance(value, Tensor):
            return value
    return None


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of a batch of prompts, and which of them are real."""

    input_ids: Int[Tensor, "batch q_len"]
    is_real: Bool[Tensor, "batch q_len"]

    @property
    def q_len(self) -> int:
        """The width of the rows, padding included."""
        return self.input_ids.shape[1]

    def ends(self) -> Int[Tensor, "batch"]:
        """Returns the column of each row's last real token, on the processor."""
        is_real = self.is_real.cpu()
        return (is_real * torch.arange(self.q_len, device="cpu")).argmax(1)

    def first(self, n_columns: int) -> "PromptTokens":
        """Returns the first columns of all rows."""
        return PromptTokens(self.input_ids[:, :n_columns], self.is_real[:, :n_columns])

    def real(self, states: Tensor) -> list[Tensor]:
        """Returns each row's states, [q_len, ...] each, at its real tokens."""
        is_real = self.is_real.to(states.device)
        return [row[keep] for row, keep in zip(states, is_real, strict=True)]

    def token_lists(self) -> list[list[int]]:
        """Returns each row's real tokens."""
        return [tokens.tolist() for tokens in self.real(self.input_ids)]


@dataclass
class Generation:
    """One `generate` that runs.

    Attributes:
        input_ids: the prompts that it was given, [batch, q_len]; None where embeddings stand for
            them.
        mask: the attention mask that it was given.
        n_seen: tokens that were in its cache before.
        n_prompt: tokens of the whole prompt, with those of it that were in the cache before.
        cache: the cache that its own forwards fill; None until the first of them that has one.
    """

    input_ids: Tensor | None
    mask: Tensor | None
    n_seen: int
    n_prompt: int
    cache: Any

    def prompts(self) -> PromptTokens | None:
        """Returns the prompts that it was given; None where embeddings stand for them."""
        if self.input_ids is None:
            return None
        # The mask may begin with tokens that are in the cache, and were not given again.
        n_before = self.n_prompt - self.input_ids.shape[1]
        return PromptTokens(self.input_ids, attended(self.input_ids, self.mask, n_before))

    def begins(self, input_ids: Tensor | None) -> bool:
        """Returns whether rows begin with its prompts, each one's side by side (beams, samples)."""
        if input_ids is None or self.input_ids is None:
            return False
        n_rows_each, n_over = divmod(len(input_ids), len(self.input_ids))
        if n_over:
            return False
        prompts = self.input_ids.repeat_interleave(n_rows_each, 0).to(input_ids.device)
        return torch.equal(input_ids[:, : prompts.shape[1]], prompts)

    def note(self, arguments: dict[str, Any]) -> None:
        """Takes up the cache of the first forward inside, which is its own."""
        if self.cache is None:
            self.cache = cache_of(arguments)

    def reads(self, arguments: dict[str, Any]) -> bool:
        """Returns whether a forward inside is one of its own.

        Others may have another cache, or another prompt without one.
        """
        cache = cache_of(arguments)
        if cache is not None:
            return cache is self.cache
        # Without a cache each forward reads the prompt anew.
        input_ids = arguments.get("input_ids")
        # Embeddings cannot be held against the prompt, so they are taken for its own.
        has_ids = input_ids is not None and self.input_ids is not None
        return self.begins(input_ids) if has_ids else True


@dataclass(frozen=True, eq=False)
class Call:
    """One forward pass, and the `generate` that it is part of.

    Attributes:
        arguments: what the module was given, by name.
        innermost: the innermost `generate` that runs, whatever this forward reads; None in a plain
            call.
        outermost: the outermost one.
    """

    arguments: dict[str, Any]
    innermost: Generation | None
    outermost: Generation | None

    # Found out when first asked for: on an accelerator both may wait for the device.
    @cached_property
    def n_seen(self) -> int:
        """Tokens that are in its cache before it runs, if asked for before it does."""
        return n_seen(self.arguments)

    @cached_property
    def generation(self) -> Generation | None:
        """The innermost `generate`, where this forward reads its prompt.

        None in a plain call, and for another prompt that runs meanwhile.
        """
        if self.innermost is not None and self.innermost.reads(self.arguments):
            return self.innermost
        return None

    @property
    def cache(self) -> Any:
        """The cache that this forward reads and fills."""
        return cache_of(self.arguments)

    @property
    def n_rows(self) -> int:
        """Rows of this forward, several for a prompt where it has beams."""
        return len(read_by(self.arguments))

    @property
    def q_len(self) -> int:
        """Tokens that each row of this forward reads."""
        return read_by(self.arguments).shape[1]

    @cached_property
    def is_real(self) -> Bool[Tensor, "batch q_len"]:
        """Which tokens of this forward are real."""
        mask = self.arguments.get("attention_mask")
        return attended(read_by(self.arguments), mask, self.n_seen)

    @property
    def tokens(self) -> PromptTokens | None:
        """The tokens of this forward; None where embeddings stand for them."""
        input_ids = self.arguments.get("input_ids")
        return None if input_ids is None else PromptTokens(input_ids, self.is_real)

    @property
    def n_prompt(self) -> int:
        """Tokens of the whole prompt, with those of it that are in the cache.

        In a plain call all tokens are one prompt, but for a single token behind a cache, which was
        generated.
        """
        if self.generation is not None:
            return self.generation.n_prompt
        is_step = self.q_len == 1 and self.n_seen > 0
        return self.n_seen if is_step else self.n_seen + self.q_len

    def prompts(self) -> PromptTokens | None:
        """Returns the whole prompts, without those tokens that an earlier call put into the cache.

        None where embeddings stand for them; beams of a prompt share its row inside `generate`.
        """
        return self.tokens if self.generation is None else self.generation.prompts()
