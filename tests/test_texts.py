"""What users hand in: prompts and options of the right kind, and a tokenizer of the model."""

from collections import Counter

import jaxtyping
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tiny
from icrouting.config import FitConfig
from icrouting.decoder.batches import tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import option_ids, score_options
from icrouting.icr import InContextRouter
from icrouting.routing.inspection import inspect_prompt
from icrouting.tasks.prompts import Prompt
from icrouting.tasks.task import Example, TaskSpec
from inspected import sharp_router

PROMPT = "Review: a dull film\nSentiment:"
OPTIONS = ["negative", "positive"]


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Tests check types by machine, users' programs do not."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def model():
    return tiny.model("llama")


@pytest.fixture(scope="module")
def icr(tokenizer, encoder_folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return sharp_router(tiny.model("llama"), tokenizer, encoder_folder, monkeypatch)


@pytest.fixture
def routed(icr, model, tokenizer):
    with icr.attached(model, tokenizer) as attached:
        yield attached


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPT,
        PROMPT.encode(),
        {PROMPT},
        Counter([PROMPT]),
        Prompt("", PROMPT),
        [PROMPT, 3],
        [[PROMPT]],
        None,
    ],
)
def test_what_is_no_list_of_prompts_is_refused_everywhere(prompts, routed, model, tokenizer):
    asked = [
        lambda: routed.score(prompts, OPTIONS),
        lambda: routed.routing(prompts),
        lambda: score_options(model, tokenizer, prompts, OPTIONS),
        lambda: Decoder.of(model, tokenizer).tokenize(prompts),
    ]
    # Without prompts, `effect` takes those that were routed last.
    if prompts is not None:
        asked.append(lambda: routed.effect(prompts))
    for ask in asked:
        with pytest.raises(TypeError, match="expected a list of prompts"):
            ask()


@pytest.mark.parametrize(
    "options", ["negative", {"negative", "positive"}, {"negative": 0, "positive": 1}, [1, 2], 3]
)
def test_what_is_no_list_of_options_is_refused_everywhere(options, routed, model, tokenizer):
    for ask in (
        lambda: routed.score([PROMPT], options),
        lambda: score_options(model, tokenizer, [PROMPT, PROMPT], options),
        lambda: option_ids(tokenizer, PROMPT, options),
        lambda: inspect_prompt(routed, PROMPT, options),
    ):
        with pytest.raises(TypeError, match="expected a list of options"):
            ask()


def test_one_prompt_is_inspected_not_a_list(routed):
    with pytest.raises(TypeError, match="expected a list of prompts"):
        inspect_prompt(routed, [PROMPT], OPTIONS)  # pyright: ignore[reportArgumentType]


def test_a_task_s_options_and_an_example_s_choices_are_no_single_word():
    with pytest.raises(TypeError, match="options must be a tuple of texts, got 'AB'"):
        TaskSpec("letters", "far", "{text}:", "AB")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="choices must be a tuple of texts, got 'yes'"):
        Example({"text": "a"}, "yes", 0)  # pyright: ignore[reportArgumentType]


def test_a_generator_of_prompts_is_read_once_and_remembered(routed):
    scores = routed.score((prompt for prompt in [PROMPT, f"{PROMPT} {PROMPT}"]), OPTIONS)
    assert torch.equal(scores, routed.score([PROMPT, f"{PROMPT} {PROMPT}"], OPTIONS))
    assert len(routed.last) == 2


def test_no_prompts_have_no_scores(routed, model, tokenizer):
    assert routed.score([], OPTIONS).shape == (0, 2)
    assert score_options(model, tokenizer, [], ["good", "bad", "joy"]).shape == (0, 3)
    assert score_options(model, tokenizer, [], []).shape == (0, 0)
    with pytest.raises(ValueError, match="at least two options"):
        score_options(model, tokenizer, [], ["good"])


def test_no_prompts_have_an_empty_routing_and_no_effect(routed):
    routing = routed.routing([])
    assert len(routing.routing_vector) == len(routing.head_gates) == 0
    with pytest.raises(ValueError, match="give `effect` prompts"):
        routed.effect([])


@pytest.mark.parametrize("ending", [" ", "\t", "\u00a0", "\u3000"])
def test_a_prompt_that_ends_in_a_space_is_refused_everywhere(ending, routed, model, tokenizer):
    prompt = PROMPT + ending
    for ask in (
        lambda: routed.score([PROMPT, prompt], OPTIONS),
        lambda: routed.routing([prompt]),
        lambda: routed.effect([prompt]),
        lambda: score_options(model, tokenizer, [Prompt("joy", prompt)], OPTIONS),
        lambda: inspect_prompt(routed, prompt),
    ):
        with pytest.raises(ValueError, match="no space at its end"):
            ask()


def test_a_prompt_may_end_in_a_line_break_as_chat_templates_do(model, tokenizer):
    assert score_options(model, tokenizer, ["<user>\n", "joy: \n"], OPTIONS).isfinite().all()


def words(n_words: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is larger than a tiny model's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{place}": place for place in range(n_words)}
    by_word = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=by_word)


def test_a_tokenizer_of_another_vocabulary_is_refused_before_the_model_runs(icr, model):
    other = words(tiny.VOCAB + 1)
    config = FitConfig(layers=(3, 4), rank=2, n_prompts=4, n_queries=4, encoder="hidden")

    def attach():
        with icr.attached(model, other):
            pass

    for ask in (
        attach,
        lambda: score_options(model, other, ["w1 w2"], ["w3", "w4"]),
        lambda: InContextRouter.fit(model, other, [tiny.task()], config),
    ):
        with pytest.raises(ValueError, match="has 312 tokens, the model knows 311"):
            ask()


def test_a_model_may_know_more_tokens_than_its_tokenizer(model):
    few = words(7)
    assert score_options(model, few, ["w1 w2"], ["w3", "w4"]).shape == (1, 2)


def test_a_token_that_the_model_does_not_know_is_refused_only_where_it_is_read(model):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    assert len(tokenizer) == tiny.VOCAB + 1
    assert score_options(model, tokenizer, [PROMPT], OPTIONS).shape == (1, 2)
    with pytest.raises(ValueError, match=r"token 311 \('<new>'\), the model knows 311"):
        score_options(model, tokenizer, [f"<new> {PROMPT}"], OPTIONS)
    with pytest.raises(ValueError, match=r"token 311 \('<new>'\), the model knows 311"):
        Decoder.of(model, tokenizer).tokenize(["a <new>"])


def test_a_tokenizer_is_held_against_the_vocabulary_as_it_is(model):
    tokenizer = tiny.tokenizer()
    decoder = Decoder.of(model, tokenizer)
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(tiny.VOCAB + 1)
    assert decoder.tokenize(["<new>"]) == [[tiny.VOCAB]]


def test_padding_that_another_thread_asked_for_is_no_text(tokenizer, monkeypatch):
    """A tokenizer's padding is its state: a call of another thread may set it amid one of ours."""
    texts = ["a joy", "a joy of a film and more"]
    expected = tokenize(tokenizer, texts)
    options = option_ids(tokenizer, "Review:", ["good", "bad"])
    plain_call = type(tokenizer).__call__

    def padding_call(self, *args, **kwargs):
        return plain_call(self, *args, **kwargs | {"padding": True})

    monkeypatch.setattr(type(tokenizer), "__call__", padding_call)
    assert len(set(map(len, tokenizer(texts).input_ids))) == 1
    assert tokenize(tokenizer, texts) == expected
    assert option_ids(tokenizer, "Review:", ["good", "bad"]) == options
