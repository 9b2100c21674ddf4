"""The decoder: a loaded model with its tokenizer, and what is asked of the two over and over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.decoder.batches import context_length, knows_words, pad_id_of, tokenize
from icrouting.decoder.families import base_of, device_of, dims_of, family_of, layers_of, stack_of
from icrouting.decoder.identity import base_weights, difference, fingerprint
from icrouting.decoder.sites import Dims, Family


@dataclass(frozen=True, eq=False)
class Decoder:
    """A loaded model and its tokenizer; what is costly to learn of them is learned once.

    Whoever gets a model and a tokenizer makes one of them (`Decoder.of`) and hands it on.

    Attributes:
        model: what is called: the model as the user has it, perhaps compiled or in a peft wrapper,
            whose own forward may do more than that of the model inside.
        tokenizer: its tokenizer.
        token_budget: padded tokens of a pass; None takes what each kind of pass takes by itself.
            Another budget moves numbers by rounding alone.
    """

    # A wrapper hands on what a transformers model has, without being one.
    model: Any
    tokenizer: PreTrainedTokenizerBase
    token_budget: int | None = None

    def __repr__(self) -> str:
        return f"Decoder({self.model.config.name_or_path!r}, {type(self.model).__name__})"

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        token_budget: int | None = None,
    ) -> "Decoder":
        """Returns the decoder of a model as users have it, perhaps inside a peft wrapper.

        Raises:
            TypeError: it is no transformers model.
            ValueError: its peft wrapper changes the prompt, or the tokenizer is another model's or
                none, or the budget is less than a token.
        """
        base_of(model)
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"token_budget must be a token or more, got {token_budget}")
        if not knows_words(tokenizer):
            raise ValueError(
                f"this tokenizer knows none but special tokens {tokenizer.all_special_tokens}: "
                "load it from a folder with its files, where `tokenizer.save_pretrained` puts them"
            )
        decoder = cls(model, tokenizer, token_budget)
        # Without what was added to the vocabulary, which a model need not know.
        n_tokens = tokenizer.vocab_size
        n_known = decoder.n_known_tokens
        if n_known is not None and n_tokens > n_known:
            raise ValueError(
                f"this tokenizer is another model's: it has {n_tokens} tokens, the model knows "
                f"{n_known}; load the one that was saved with the model"
            )
        return decoder

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model itself, without what is wrapped around it."""
        return base_of(self.model)

    def unwrapped(self) -> "Decoder":
        """Returns the decoder of the transformers model itself."""
        return Decoder(self.base, self.tokenizer, self.token_budget)

    @cached_property
    def family(self) -> Family:
        """The row of the family table; ValueError where the model cannot be routed."""
        return family_of(self.model)

    @cached_property
    def dims(self) -> Dims:
        """The numbers of layers and heads, and the width of a head."""
        return dims_of(self.model)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify architecture and weights, as they are at this moment.

        Not kept, since weights may be changed in place: ask once for a piece of work.
        """
        return fingerprint(self.model)

    @property
    def base_weights(self) -> dict[str, str]:
        """What each weight is like, so that the same model is known by it in another form."""
        return base_weights(self.model)

    @cached_property
    def pad_id(self) -> int:
        """The token to pad with."""
        return pad_id_of(self.tokenizer)

    @property
    def context_length(self) -> int | None:
        """The longest prompt that the model was built for, in tokens.

        None where its config names none.
        """
        return context_length(self.model)

    @property
    def n_known_tokens(self) -> int | None:
        """How many tokens the model has embeddings of, which may be more than its tokenizer has.

        None where they are in no common layer.
        """
        embedding = self.base.get_input_embeddings()
        return getattr(embedding, "num_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where the model's first parameters are."""
        return device_of(self.model)

    @property
    def stack(self) -> PreTrainedModel:
        """The stack of layers under the vocabulary head."""
        return stack_of(self.model)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, in order."""
        return layers_of(self.model)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self.stack.config.hidden_size)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token lists of texts.

        Raises:
            TypeError: it is no list of texts.
            ValueError: a text is empty, or longer than the model's context, or has a token that the
                model does not know.
        """
        token_lists = tokenize(self.tokenizer, texts, self.context_length)
        self.check_known(token_lists)
        return token_lists

    def check_known(self, token_lists: Sequence[Sequence[int]]) -> None:
        """Checks that the model knows tokens; some may be in the tokenizer alone.

        Raises:
            ValueError: it does not know one of them.
        """
        largest = max((max(tokens) for tokens in token_lists if tokens), default=0)
        n_known = self.n_known_tokens
        if n_known is not None and largest >= n_known:
            word = self.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"this tokenizer gives token {largest} ({word!r}), the model knows {n_known}: load "
                "the tokenizer that was saved with the model, or let the model know what was added "
                "to it (`resize_token_embeddings`)"
            )

    def check_room(self, tokens: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
        """Checks that the model knows a prompt's answers, and has room for the longest behind it.

        Raises:
            ValueError: it does not.
        """
        self.check_known(answers)
        # The last token of an answer is not read.
        n_tokens = len(tokens) + max(len(answer) for answer in answers) - 1
        limit = self.context_length
        if limit is not None and n_tokens > limit:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and its longest answer are more than the "
                f"model's context of {limit}: shorten one of them"
            )

    def check_fitted_on(
        self, what: str, name: str | None, expected: str, weights: Mapping[str, str]
    ) -> None:
        """Checks that this is the model on which something was fitted, perhaps rounded.

        Args:
            what: what was fitted, as the error is to name it.
            name: the name of the model that it was fitted on.
            expected: the fingerprint of that model.
            weights: its `base_weights`; empty where an earlier version did not keep them, and the
                fingerprint has to be the same.

        Raises:
            ValueError: this is another model; both are named, and what differs.
        """
        fingerprint_here = self.fingerprint
        if fingerprint_here == expected:
            return
        reason = "an earlier version kept nothing that says what differs"
        if weights:
            reason = difference(self.model, weights)
        if reason is not None:
            raise ValueError(
                f"{what} was fitted on {name!r} (fingerprint {expected}), this model is "
                f"{self.base.config.name_or_path!r} ({fingerprint_here}), another one: {reason}; "
                "load the base model it was fitted on, or fit anew"
            )
