"""The measure of prose counts what it says, and the pages keep within it."""

import json

import pytest

from benchmarks import prose


def test_code_tables_headings_and_addresses_are_no_prose():
    text = "# A head of 3 words\n\nTwo [words](http://a.b/c/1).\n\n| 1 | 2 |\n\n```\nx = 1\n```\n"
    assert prose.measured(text).words == 2
    assert prose.measured(text).numbers_per_100_words == 0


def test_a_sentence_ends_with_its_stop_or_its_item():
    text = "One is here. Two has 5 words in it.\n\n- Three\n- Four goes\n  on\n"
    sentences = [prose.WORD.findall(sentence) for sentence in prose.sentences(text)]
    assert [len(sentence) for sentence in sentences] == [3, 6, 1, 3]
    assert prose.measured(text).longest == 6


def test_a_number_in_a_name_or_in_backticks_is_none():
    text = "SmolLM2-135M and Qwen2.5-Coder-1.5B gain 16.3 and 2.4 with `rank=8`."
    assert prose.measured(text).numbers_per_100_words == round(100 * 2 / 9, 1)


@pytest.mark.parametrize("page", prose.held(), ids=prose.name_of)
def test_a_page_keeps_sentences_short_and_numbers_few(page):
    figures = prose.measured(page.read_text(encoding="utf-8"))
    assert figures.words_a_sentence <= prose.MOST_WORDS_A_SENTENCE
    assert figures.numbers_per_100_words <= prose.MOST_NUMBERS


def test_the_pages_as_they_were_are_on_record():
    before = json.loads((prose.ROOT / "benchmarks/results/prose/before.json").read_text())
    assert before["pages"]["docs/who-wins.md"]["words_a_sentence"] > prose.MOST_WORDS_A_SENTENCE
