"""Scoring: the logit of every option at the next position (section 5), safe under padding."""

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from icrouting.decoder.batches import Batch, finite_rows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.passes import (
    TOKEN_BUDGET,
    KeptContext,
    after_prefix,
    by_context,
    next_token_logits,
)
from icrouting.decoder.texts import check_ending, listed, texts_of, whole_prompts_of
from icrouting.runtime.defaults import usual_defaults
from icrouting.tasks.chat import Messages
from icrouting.tasks.prompts import Prompt

# Once a message: an evaluation scores the same options on every prompt.
_warn_once = lru_cache(None)(logging.getLogger(__name__).warning)


def option_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str], joint: str = " "
) -> list[int]:
    """Returns the token with which each option, after the joint, goes on from this very prompt.

    An option of several tokens is known by its first.

    Raises:
        TypeError: `options` is no list of texts.
        ValueError: the prompt ends in a space, or an option merges with the prompt, or cannot be
            told from another by its token.
    """
    options = texts_of(options, "options")
    check_ending(prompt)
    continued = [f"{prompt}{joint}{option}" for option in options]
    prompt_ids, *token_lists = tokenizer([prompt, *continued]).input_ids
    n_prompt = len(prompt_ids)
    ids: list[int] = []
    for option, tokens in zip(options, token_lists, strict=True):
        if tokens[:n_prompt] != prompt_ids or len(tokens) == n_prompt:
            raise ValueError(
                f"the prompt's last token merges with the option {option!r}: "
                "end the prompt with a character such as ':' and without a space "
                f"(it ends {prompt[-20:]!r})"
            )
        first = tokens[n_prompt]
        ids.append(first)
        if len(tokens) > n_prompt + 1:
            _warn_once(
                f"option {option!r} is several tokens, and known by its first, "
                f"{tokenizer.decode([first])!r}"
            )
    _check_told_apart(tokenizer, options, ids)
    return ids


def _check_told_apart(
    tokenizer: PreTrainedTokenizerBase, options: Sequence[str], ids: list[int]
) -> None:
    option_by_id: dict[int, str] = {}
    for option, token in zip(options, ids, strict=True):
        word = str(tokenizer.decode([token]))
        if not word.strip():
            raise ValueError(
                f"option {option!r} begins with a token that is a bare space: "
                "choose another word for it"
            )
        if token in option_by_id:
            raise ValueError(
                f"options {option_by_id[token]!r} and {option!r} share their first token "
                f"{word!r}: let them differ there"
            )
        option_by_id[token] = option


def score_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Prompt | Messages],
    options: Sequence[str] | Sequence[Sequence[str]],
    *,
    token_budget: int = TOKEN_BUDGET,
    kept: dict[str, KeptContext] | None = None,
) -> Float[Tensor, "n_prompts n_options"]:
    """Returns each option's logit at the position after each prompt.

    Rows with fewer options than others end in -inf. Prompts that share a non-empty `Prompt.context`
    have it computed once; the scores are the same.

    Args:
        model: the decoder; routed only where no context is shared, since a routed cache cannot be
            copied.
        tokenizer: its tokenizer.
        prompts: texts, or `Prompt`s, each ending right before the space and the answer; or
            conversations, lists of {"role": "user", "content": "..."}, which the tokenizer's chat
            template renders, and which options answer without a space.
        options: the answers to choose from, for all prompts or one list per prompt.
        token_budget: padded tokens per forward pass, and as many cached ones.
        kept: contexts that earlier calls computed with this very model; those computed now join
            them.

    Raises:
        TypeError: `prompts` or `options` are no lists of texts.
        ValueError: a prompt is empty, too long or ends in a space, or its options cannot be told
            apart by their first tokens, or the tokenizer is another model's, or a score is not
            finite.

    Example:
        Which word is likelier behind each prompt, on a small model with random weights:

        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from icrouting import score_options
        >>> vocabulary = {word: place for place, word in enumerate("? a film : good bad".split())}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> config = LlamaConfig(
        ...     vocab_size=6, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> scores = score_options(model, tokenizer, ["a film:", "film:"], ["good", "bad"])
        >>> scores.shape  # `scores.argmax(1)` is each prompt's answer
        torch.Size([2, 2])
    """
    decoder = Decoder.of(model, tokenizer)
    return score(decoder, prompts, options, token_budget=token_budget, kept=kept)


@usual_defaults()
@torch.no_grad()
def score(
    decoder: Decoder,
    prompts: Sequence[str | Prompt | Messages],
    options: Sequence[str] | Sequence[Sequence[str]],
    *,
    token_budget: int = TOKEN_BUDGET,
    kept: dict[str, KeptContext] | None = None,
    finite_only: bool = True,
) -> Float[Tensor, "n_prompts n_options"]:
    """Returns what `score_options` does, for whoever holds a decoder.

    Without `finite_only` scores may be NaN or infinite, which the caller has to look for.
    """
    whole_prompts = whole_prompts_of(prompts, decoder.tokenizer)
    options_by_prompt, most_options = _options_by_prompt(options, len(whole_prompts))
    token_lists = decoder.tokenize([prompt.text for prompt in whole_prompts])
    ids_by_prompt: list[list[int]] = []
    for prompt, prompt_options in zip(whole_prompts, options_by_prompt, strict=True):
        # The query is enough: it ends as the whole text does, and is shorter.
        ids = option_ids(decoder.tokenizer, prompt.query, prompt_options, prompt.joint)
        ids_by_prompt.append(ids)
    decoder.check_known(ids_by_prompt)
    scores = torch.full((len(whole_prompts), most_options), -torch.inf)
    for cache, batch in by_context(decoder, whole_prompts, token_lists, token_budget, kept):
        _fill(scores, decoder, cache, batch, ids_by_prompt)
        is_finite = have_finite_scores(
            scores[batch.rows], scores[batch.rows], [options_by_prompt[row] for row in batch.rows]
        )
        # Some kernels carry one row's NaN into others: which rows are not finite, each says alone.
        if len(batch.rows) > 1 and not is_finite.all():
            for place in (~is_finite).nonzero()[:, 0].tolist():
                _fill(scores, decoder, cache, batch.alone(place), ids_by_prompt)
    if finite_only:
        texts = [prompt.text for prompt in whole_prompts]
        is_finite = have_finite_scores(scores, scores, options_by_prompt)
        finite_rows(is_finite, texts, "option scores", skip=None)
    return scores


def _fill(
    scores: Float[Tensor, "n_prompts n_options"],
    decoder: Decoder,
    cache: Cache | None,
    batch: Batch,
    ids_by_prompt: Sequence[list[int]],
) -> None:
    """Fills in the scores of a batch, from one pass behind what the cache holds."""
    if cache is None:
        logits = next_token_logits(decoder.model, batch)
    else:
        logits = after_prefix(decoder.model, cache, batch)
    # One copy a batch: each row's options differ, and picking them there would cost one each.
    for row, row_logits in zip(batch.rows, logits.cpu(), strict=True):
        ids = ids_by_prompt[row]
        scores[row, : len(ids)] = row_logits[ids]


def have_finite_scores(
    scores: Float[Tensor, "n_prompts n_options"],
    plain_scores: Float[Tensor, "n_prompts n_options"],
    options: Sequence[Sequence[str]],
) -> Bool[Tensor, "n_prompts"]:
    """Returns which prompts have a finite score for each of their options.

    Args:
        scores: what a method made of the model's, which may rule an option out by -inf.
        plain_scores: the model's, which may not.
        options: those of each prompt; beyond them the scores are filled up.
    """
    n_options = torch.tensor([len(prompt_options) for prompt_options in options])
    is_filling = torch.arange(scores.shape[1]) >= n_options[:, None]
    is_ruled_out = scores.isneginf() & plain_scores.isfinite()
    return (scores.isfinite() | is_ruled_out | is_filling).all(1)


def _options_by_prompt(
    options: Sequence[str] | Sequence[Sequence[str]], n_prompts: int
) -> tuple[list[list[str]], int]:
    """Returns each prompt's options, and the most that a prompt has."""
    entries = listed(options, "options")
    shared = [entry for entry in entries if isinstance(entry, str)]
    lists = [texts_of(entry, "options") for entry in entries if not isinstance(entry, str)]
    # Words and lists of words cannot be mixed.
    is_mixed = bool(shared) and len(shared) != len(entries)
    if is_mixed or not (shared or len(entries) == n_prompts):
        raise ValueError(
            f"expected one list of options, or one per prompt ({n_prompts}), "
            f"got {len(entries)} entries"
        )
    if shared:
        lists = [shared]
    if any(len(prompt_options) < 2 for prompt_options in lists):
        raise ValueError("expected at least two options for every prompt")
    most_options = max((len(prompt_options) for prompt_options in lists), default=0)
    return (lists * n_prompts if shared else lists), most_options
