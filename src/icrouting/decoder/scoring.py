"""Scoring: the logit of every option at the next position (section 5), safe under padding."""

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from icrouting.decoder.batches import Batch, encoded, finite_rows
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.labels import label_log_probs
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
from icrouting.tasks.task import LabelScoring, check_label_scoring

# Once a message: an evaluation scores the same options on every prompt.
_warn_once = lru_cache(None)(logging.getLogger(__name__).warning)


def option_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str], joint: str = " "
) -> list[list[int]]:
    """Returns the tokens with which each option, after the joint, goes on from this very prompt.

    Raises:
        TypeError: `options` is no list of texts.
        ValueError: the prompt ends in a space, or an option merges with the prompt, or is the same
            tokens as another.
    """
    options = texts_of(options, "options")
    check_ending(prompt)
    continued = [f"{prompt}{joint}{option}" for option in options]
    prompt_ids, *token_lists = encoded(tokenizer, [prompt, *continued])
    n_prompt = len(prompt_ids)
    option_by_tokens: dict[tuple[int, ...], str] = {}
    for option, tokens in zip(options, token_lists, strict=True):
        if tokens[:n_prompt] != prompt_ids or len(tokens) == n_prompt:
            raise ValueError(
                f"the prompt's last token merges with the option {option!r}: "
                "end the prompt with a character such as ':' and without a space "
                f"(it ends {prompt[-20:]!r})"
            )
        answer = tuple(tokens[n_prompt:])
        if answer in option_by_tokens:
            raise ValueError(
                f"options {option_by_tokens[answer]!r} and {option!r} are the same tokens: "
                "let them differ"
            )
        option_by_tokens[answer] = option
    return [list(answer) for answer in option_by_tokens]


def option_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str], joint: str = " "
) -> list[int]:
    """Returns the first of each option's `option_tokens`, by which an option of several is known.

    Raises:
        TypeError: `options` is no list of texts.
        ValueError: what `option_tokens` says, or an option cannot be told from another by its
            first token.
    """
    options = texts_of(options, "options")
    ids: list[int] = []
    token_lists = option_tokens(tokenizer, prompt, options, joint)
    for option, tokens in zip(options, token_lists, strict=True):
        ids.append(tokens[0])
        if len(tokens) > 1:
            _warn_once(
                f"option {option!r} is several tokens, and known by its first, "
                f'{tokenizer.decode([tokens[0]])!r}: label_scoring = "sum" reads all of them'
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
                'choose another word for it, or label_scoring = "sum", which reads all its tokens'
            )
        if token in option_by_id:
            raise ValueError(
                f"options {option_by_id[token]!r} and {option!r} share their first token "
                f'{word!r}: let them differ there, or choose label_scoring = "sum", which reads '
                "all their tokens"
            )
        option_by_id[token] = option


def score_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Prompt | Messages],
    options: Sequence[str] | Sequence[Sequence[str]],
    *,
    label_scoring: LabelScoring = "first",
    token_budget: int = TOKEN_BUDGET,
    kept: dict[str, KeptContext] | None = None,
) -> Float[Tensor, "n_prompts n_options"]:
    """Returns each option's score behind each prompt: the logit of its first token.

    With `label_scoring` all of an option's tokens count, by the sum or the mean of their
    log-probabilities. Where every option is one token, these differ from the logits by a constant
    for each prompt. An option that another one begins with has the larger sum of the two.

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
        label_scoring: "first" for the first token's logit, "sum" for the summed log-probability of
            all tokens, in nats, or "mean" for that by their number.
        token_budget: padded tokens per forward pass, and as many cached ones.
        kept: contexts that earlier calls computed with this very model; those computed now join
            them.

    Raises:
        TypeError: `prompts` or `options` are no lists of texts.
        ValueError: a prompt is empty, too long or ends in a space, or its options cannot be told
            apart by the tokens that count, or the tokenizer is another model's, or a score is not
            finite.

    Examples:
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
    return score(
        decoder,
        prompts,
        options,
        label_scoring=label_scoring,
        token_budget=token_budget,
        kept=kept,
    )


@usual_defaults()
@torch.no_grad()
def score(
    decoder: Decoder,
    prompts: Sequence[str | Prompt | Messages],
    options: Sequence[str] | Sequence[Sequence[str]],
    *,
    label_scoring: LabelScoring = "first",
    token_budget: int | None = None,
    kept: dict[str, KeptContext] | None = None,
    finite_only: bool = True,
) -> Float[Tensor, "n_prompts n_options"]:
    """Returns what `score_options` does, for whoever holds a decoder.

    Without `finite_only` scores may be NaN or infinite, which the caller has to look for. The
    budget of tokens is the decoder's, where none is given.
    """
    check_label_scoring(label_scoring)
    whole_prompts = whole_prompts_of(prompts, decoder.tokenizer)
    options_by_prompt, most_options = _options_by_prompt(options, len(whole_prompts))
    token_lists = decoder.tokenize([prompt.text for prompt in whole_prompts])
    answers: list[list[list[int]]] = []
    for prompt, prompt_options in zip(whole_prompts, options_by_prompt, strict=True):
        # The query is enough: it ends as the whole text does, and is shorter.
        prompt_answers = counted_tokens(
            decoder.tokenizer, prompt.query, prompt_options, label_scoring, prompt.joint
        )
        answers.append(prompt_answers)
    for tokens, prompt_answers in zip(token_lists, answers, strict=True):
        decoder.check_room(tokens, prompt_answers)
    reads_whole = label_scoring != "first"
    scores = torch.full((len(whole_prompts), most_options), -torch.inf)
    budget = token_budget or decoder.token_budget or TOKEN_BUDGET
    for cache, batch in by_context(decoder, whole_prompts, token_lists, budget, kept):
        _fill(scores, decoder, cache, batch, answers, reads_whole, budget)
        is_finite = have_finite_scores(
            scores[batch.rows], scores[batch.rows], [options_by_prompt[row] for row in batch.rows]
        )
        # Some kernels carry one row's NaN into others: which rows are not finite, each says alone.
        if len(batch.rows) > 1 and not is_finite.all():
            for place in (~is_finite).nonzero()[:, 0].tolist():
                alone = batch.alone(place)
                _fill(scores, decoder, cache, alone, answers, reads_whole, budget)
    if finite_only:
        texts = [prompt.text for prompt in whole_prompts]
        is_finite = have_finite_scores(scores, scores, options_by_prompt)
        finite_rows(is_finite, texts, "option scores", skip=None)
    if label_scoring == "mean":
        for row, prompt_answers in enumerate(answers):
            n_tokens = torch.tensor([len(tokens) for tokens in prompt_answers])
            scores[row, : len(n_tokens)] /= n_tokens
    return scores


def counted_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: Sequence[str],
    label_scoring: LabelScoring,
    joint: str = " ",
) -> list[list[int]]:
    """Returns those tokens of each option that count: the first alone, or all."""
    if label_scoring == "first":
        return [[token] for token in option_ids(tokenizer, prompt, options, joint)]
    return option_tokens(tokenizer, prompt, options, joint)


def _fill(
    scores: Float[Tensor, "n_prompts n_options"],
    decoder: Decoder,
    cache: Cache | None,
    batch: Batch,
    answers: Sequence[list[list[int]]],
    reads_whole: bool,
    token_budget: int,
) -> None:
    """Fills in the scores of a batch, from what is read behind the cache."""
    batch_answers = [answers[row] for row in batch.rows]
    if reads_whole:
        sums = label_log_probs(decoder.model, cache, batch, batch_answers, token_budget)
        scores[batch.rows, : sums.shape[1]] = sums
        return
    if cache is None:
        logits = next_token_logits(decoder.model, batch)
    else:
        logits = after_prefix(decoder.model, cache, batch)
    # One copy a batch: each row's options differ, and picking them there would cost one each.
    for row, row_answers, row_logits in zip(batch.rows, batch_answers, logits.cpu(), strict=True):
        ids = [tokens[0] for tokens in row_answers]
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
