"""Scoring: the logit of every option at the next position, batched and safe under padding (section 5)."""

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icrouting.decoder.decoder import Decoder
from icrouting.decoder.passes import (
    TOKEN_BUDGET,
    KeptContext,
    after_prefix,
    by_context,
    next_token_logits,
)
from icrouting.tasks.prompts import Prompt

_say_once = lru_cache(None)(logging.getLogger(__name__).warning)


def option_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str]
) -> list[int]:
    """Returns the token with which each option, after a space, goes on from this very prompt.

    An option of several tokens is known by its first.
    """
    prompt_ids, *option_lists = tokenizer(
        [prompt, *(f"{prompt} {option}" for option in options)]
    ).input_ids
    ids = []
    for option, tokens in zip(options, option_lists, strict=True):
        if tokens[: len(prompt_ids)] != prompt_ids or len(tokens) == len(prompt_ids):
            raise ValueError(
                f"the prompt's last token merges with the option {option!r}: end the prompt with a character "
                f"such as ':' and without a space (it ends {prompt[-20:]!r})"
            )
        ids.append(tokens[len(prompt_ids)])
        if len(tokens) > len(prompt_ids) + 1:
            _say_once(
                f"option {option!r} is several tokens, and known by its first, {tokenizer.decode(ids[-1:])!r}"
            )
    for position, (option, token) in enumerate(zip(options, ids, strict=True)):
        word, twin = str(tokenizer.decode([token])), options[ids.index(token)]
        if not word.strip():
            raise ValueError(
                f"option {option!r} begins with a token that is a bare space: choose another word for it"
            )
        if token in ids[:position]:
            raise ValueError(
                f"options {twin!r} and {option!r} share their first token {word!r}: let them differ there"
            )
    return ids


def score_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Prompt],
    options: Sequence[str] | Sequence[Sequence[str]],
    *,
    token_budget: int = TOKEN_BUDGET,
    kept: dict[str, KeptContext] | None = None,
) -> Float[Tensor, "n_prompts n_options"]:
    """Returns each option's logit at the position after each prompt.

    Rows with fewer options than others end in -inf. Prompts that share a non-empty `Prompt.context` have it
    computed once; the scores are the same.

    Args:
        model: the decoder; routed only where no context is shared, since a routed cache cannot be copied.
        tokenizer: its tokenizer.
        prompts: texts, or `Prompt`s, each ending right before the space and the answer.
        options: the answers to choose from, for all prompts or one list per prompt.
        token_budget: padded tokens per forward pass, and as many cached ones.
        kept: contexts that earlier calls computed with this very model; those computed now join them.

    Raises:
        ValueError: a prompt is empty or too long, or its options cannot be told apart by their first tokens.
    """
    decoder = Decoder.of(model, tokenizer)
    return score(decoder, prompts, options, token_budget=token_budget, kept=kept)


@torch.no_grad()
def score(
    decoder: Decoder,
    prompts: Sequence[str | Prompt],
    options: Sequence[str] | Sequence[Sequence[str]],
    *,
    token_budget: int = TOKEN_BUDGET,
    kept: dict[str, KeptContext] | None = None,
) -> Float[Tensor, "n_prompts n_options"]:
    """Returns what `score_options` does, for whoever holds a decoder."""
    whole_prompts = []
    for prompt in prompts:
        whole_prompts.append(Prompt("", prompt) if isinstance(prompt, str) else prompt)
    options_by_prompt = _options_by_prompt(options, len(whole_prompts))
    token_lists = decoder.tokenize([prompt.text for prompt in whole_prompts])
    ids_by_prompt = [
        option_ids(decoder.tokenizer, prompt.query, prompt_options)
        for prompt, prompt_options in zip(whole_prompts, options_by_prompt, strict=True)
    ]
    most_options = max(map(len, ids_by_prompt), default=0)
    scores = torch.full((len(whole_prompts), most_options), -torch.inf)
    for cache, batch in by_context(decoder, whole_prompts, token_lists, token_budget, kept):
        if cache is None:
            logits = next_token_logits(decoder.model, batch)
        else:
            logits = after_prefix(decoder.model, cache, batch)
        for row, row_logits in zip(batch.rows, logits.cpu(), strict=True):
            ids = ids_by_prompt[row]
            scores[row, : len(ids)] = row_logits[ids]
    return scores


def _options_by_prompt(
    options: Sequence[str] | Sequence[Sequence[str]], n: int
) -> list[Sequence[str]]:
    shared = [option for option in options if isinstance(option, str)]
    per_prompt: list[Sequence[str]] = (
        [shared] * n if shared else [list(chosen) for chosen in options]
    )
    if len(per_prompt) != n or (shared and len(shared) != len(options)):
        raise ValueError(
            f"expected one list of options, or one per prompt ({n}), got {len(options)} entries"
        )
    if any(len(chosen) < 2 for chosen in per_prompt):
        raise ValueError("expected at least two options for every prompt")
    return per_prompt
