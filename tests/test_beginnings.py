"""A text's beginning is read once, by tokenizers that add one, none, or more than one token."""

from dataclasses import replace

import pytest
import torch
from tokenizers import processors

import tiny
from icrouting.decoder.batches import tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.evaluation.items import SPARE, within
from icrouting.routing.encoder import query_texts

PROMPT = "Review: a dull film\nSentiment:"
CLOSE = 1e-4  # fp32 round-off of a batch
OPTIONS = ["negative", "positive"]
BOS = "<eos>"  # a model may use one token for both ends
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def beginning(single, *special):
    """The tiny tokenizer with a template of what it adds to a text, and a chat template."""
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = BOS
    tokenizer.chat_template = CHAT
    names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (BOS, *special)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=names
    )
    return tokenizer


def chat(tokenizer, text=PROMPT):
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)


def test_a_chat_template_s_beginning_is_read_once_in_scoring():
    tokenizer = beginning(f"{BOS} $A")
    model = tiny.model("llama")
    chatted = chat(tokenizer)
    assert chatted == BOS + PROMPT
    scores = score_options(model, tokenizer, [chatted, PROMPT], OPTIONS)
    assert (scores[0] - scores[1]).abs().max() < CLOSE
    input_ids = torch.tensor([tokenizer(PROMPT).input_ids])
    logits = model(input_ids).logits[0, -1]
    ids = option_ids(tokenizer, chatted, OPTIONS)
    assert (scores[0] - logits[ids]).abs().max() < CLOSE


@pytest.mark.parametrize(
    "texts", [[PROMPT], [BOS + PROMPT], [PROMPT, BOS + PROMPT], [BOS + PROMPT, "a"], ["", PROMPT]]
)
def test_a_beginning_that_is_added_is_read_once(texts):
    tokenizer = beginning(f"{BOS} $A")
    bare = beginning("$A")
    token_lists = tokenize(tokenizer, texts)
    for text, tokens in zip(texts, token_lists, strict=True):
        assert tokens == [0, *bare(text.removeprefix(BOS)).input_ids]


def test_a_beginning_of_two_tokens_is_read_once():
    tokenizer = beginning(f"<pad> {BOS} $A", "<pad>")
    (plain, written) = tokenize(tokenizer, [PROMPT, f"<pad>{BOS}{PROMPT}"])
    assert plain == written
    assert plain[:2] == [1, 0]


def test_a_tokenizer_that_adds_no_beginning_reads_what_is_written():
    tokenizer = beginning("$A")
    written, plain = tokenize(tokenizer, [BOS + PROMPT, PROMPT])
    assert written == [0, *plain]


def test_what_is_written_twice_by_the_user_is_their_own():
    tokenizer = beginning("$A")
    (tokens,) = tokenize(tokenizer, [BOS + BOS + PROMPT])
    assert tokens[:3] == [0, 0, *tokens[2:3]]


@pytest.mark.parametrize("single", ["$A <eos>", "<eos> $A <eos>"])
@pytest.mark.parametrize("texts", [[PROMPT], ["", PROMPT], [f"{PROMPT}{BOS}"]])
def test_a_tokenizer_that_closes_texts_is_refused(single, texts):
    with pytest.raises(ValueError, match="closes every text"):
        tokenize(beginning(single), texts)


def test_a_text_that_ends_in_a_special_token_closes_itself_and_is_read():
    tokenizer = beginning(f"{BOS} $A")
    (tokens,) = tokenize(tokenizer, [f"{PROMPT}{BOS}"])
    assert tokens[-1] == 0


def test_letters_that_a_vocabulary_lacks_are_no_touchstone():
    from test_texts import words

    assert tokenize(words(9), ["w1 w2"]) == [[1, 2]]
    digits = words(9)
    digits.add_special_tokens({"unk_token": "w0"})
    assert tokenize(digits, ["w1 w2"]) == [[1, 2]]


def test_a_row_is_as_long_as_it_is_read():
    tokenizer = beginning(f"{BOS} $A")
    plain = tiny.task()
    template = BOS + plain.spec.template
    written = replace(plain, spec=replace(plain.spec, template=template))
    longest = max(
        len(tokenizer(plain.prompt(row)).input_ids) for row in (*plain.train, *plain.test)
    )
    for limit in (longest + SPARE, longest + SPARE - 1):
        kept_plain, _ = within(plain, tokenizer, limit)
        kept_written, _ = within(written, tokenizer, limit)
        assert kept_written.train == kept_plain.train
        assert kept_written.test == kept_plain.test


def test_the_encoder_reads_a_chat_as_it_reads_the_bare_text():
    tokenizer = beginning(f"{BOS} $A")
    decoder = Decoder.of(tiny.model("llama"), tokenizer)
    texts = query_texts(tokenizer, decoder.tokenize([chat(tokenizer), PROMPT]))
    assert texts == [PROMPT, PROMPT]
