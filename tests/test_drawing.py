"""Drawing: which prompts a task gives to an extraction."""

from collections import Counter

import numpy as np
import pytest
import torch

import tiny
from fitted import small_fit
from icrouting.config import FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.fitting.capture import capture_last_tokens
from icrouting.fitting.drawing import drawn_prompts, nearest_demos, shuffled_answers
from icrouting.fitting.extraction import extract
from icrouting.routing.encoder import load_encoder
from icrouting.tasks.prompts import Prompt, balanced_demos, few_shot
from icrouting.tasks.task import Example, Task, TaskSpec

TASK = tiny.task()


def drawn(seed=0, task=TASK, **changes):
    config = small_fit(**{"n_prompts": 9, "demos_per_class": 3, **changes})
    return list(drawn_prompts(task, config, np.random.default_rng(seed), config.n_prompts))


def questions_and_answers(prompt):
    """The demonstrations of a toy prompt, a (question, answer) each."""
    pairs = []
    for text in prompt.context.removesuffix("\n").split("\nReview: "):
        question, _, answer = text.removeprefix("Review: ").rpartition(" ")
        pairs.append((question, answer))
    return pairs


@pytest.mark.parametrize("n_sharing", [1, 4])
def test_few_shot_prompts_are_drawn_as_they_always_were(n_sharing):
    rng = np.random.default_rng(3)
    expected = []
    queries = rng.permutation(len(TASK.train))[:9].tolist()
    for start in range(0, 9, n_sharing):
        sharing = queries[start : start + n_sharing]
        demos = balanced_demos(TASK, 3, rng, exclude=sharing)
        for place in sharing:
            expected.append(few_shot(TASK, TASK.train[place], [(TASK, demo) for demo in demos]))
    assert drawn(3, queries_per_context=n_sharing) == expected


def test_zero_shot_prompts_are_the_same_queries_bare():
    bare = drawn(extract_from="zero-shot")
    assert bare == [Prompt("", prompt.query) for prompt in drawn()]


def test_shuffled_prompts_have_the_same_questions_and_answers_in_another_order():
    right = {TASK.question(row): TASK.answer(row) for row in TASK.train}
    n_right = 0
    n_demos = 0
    for plain, shuffled in zip(drawn(), drawn(extract_from="shuffled"), strict=True):
        assert plain.query == shuffled.query
        shown = questions_and_answers(shuffled)
        assert [question for question, _ in shown] == [
            question for question, _ in questions_and_answers(plain)
        ]
        assert Counter(answer for _, answer in shown) == {"negative": 3, "positive": 3}
        n_demos += len(shown)
        n_right += sum(right["Review: " + question] == answer for question, answer in shown)
    # Of 54, where all of them are right in the plain ones: half, give or take.
    assert n_demos == 54
    assert 0.25 < n_right / n_demos < 0.75


def test_prompts_that_share_demonstrations_share_their_shuffled_answers():
    prompts = drawn(extract_from="shuffled", queries_per_context=3)
    assert len({prompt.context for prompt in prompts}) == 3


def test_a_shuffled_answer_is_one_that_its_row_offers():
    spec = TaskSpec("quiz", "far", "{question}\n{choices}\nAnswer ({letters}):")
    rows = []
    for number in range(40):
        choices = ("so", "not so", "who knows", "never")[: 2 + number % 3]
        rows.append(Example({"question": f"why {number}?"}, choices, number % len(choices)))
    quiz = Task(spec, tuple(rows), ())
    answers = shuffled_answers(quiz, rows, np.random.default_rng(0))
    for row, answer in zip(rows, answers, strict=True):
        assert answer in quiz.options(row)
    assert answers != [quiz.answer(row) for row in rows]
    assert Counter(answers) == Counter(quiz.answer(row) for row in rows)


def demos_of(prompt):
    """The training rows that a toy prompt shows, as questions in their order."""
    return ["Review: " + question for question, _ in questions_and_answers(prompt)]


@pytest.mark.parametrize("selection", ["random", "nearest"])
def test_other_demonstrations_are_as_many_before_the_same_queries(selection, encoder_folder):
    encoder = str(encoder_folder)
    prompts = drawn(demo_selection=selection, encoder=encoder)
    plain = drawn()
    assert [prompt.query for prompt in prompts] == [prompt.query for prompt in plain]
    right = {TASK.question(row): TASK.answer(row) for row in TASK.train}
    for prompt in prompts:
        shown = demos_of(prompt)
        assert len(set(shown)) == 6
        assert prompt.query not in shown
        for question, answer in questions_and_answers(prompt):
            assert right["Review: " + question] == answer
    assert prompts != plain


def test_random_demonstrations_are_drawn_from_all_rows_whatever_their_class():
    prompts = drawn(demo_selection="random", n_prompts=40)
    shown = Counter(question for prompt in prompts for question in demos_of(prompt))
    assert len(shown) == len(TASK.train)
    counts = [
        sum(answer == "positive" for _, answer in questions_and_answers(prompt))
        for prompt in prompts
    ]
    assert len(set(counts)) > 2, "not balanced"
    assert 2 < sum(counts) / len(counts) < 4


def test_prompts_that_share_random_demonstrations_are_none_of_them():
    prompts = drawn(demo_selection="random", queries_per_context=4, demos_per_class=9)
    assert len({prompt.context for prompt in prompts}) == 3
    for prompt in prompts:
        sharing = {other.query for other in prompts if other.context == prompt.context}
        assert not sharing & set(demos_of(prompt))


def test_nearest_demonstrations_are_those_of_the_largest_cosine_the_nearest_last(encoder_folder):
    """Against a sort of all rows, one by one."""
    encode = load_encoder(str(encoder_folder), "cpu")
    prompts = drawn(demo_selection="nearest", encoder=str(encoder_folder))
    questions = [TASK.question(row) for row in TASK.train]
    vectors = {question: encode([question])[0] for question in questions}
    for prompt in prompts:
        query = vectors[prompt.query]
        cosines = {}
        for question in questions:
            if question != prompt.query:
                cosines[question] = float(torch.cosine_similarity(query, vectors[question], dim=0))
        shown = [cosines[question] for question in demos_of(prompt)]
        largest = sorted(cosines.values())[-6:]
        assert shown == pytest.approx(largest, abs=1e-5)


def test_of_a_row_that_stands_twice_the_other_one_is_nearest():
    vectors = torch.eye(4)[[0, 1, 0, 2]]
    rows = TASK.train[:4]
    task = Task(TASK.spec, rows, ())
    assert nearest_demos(task, 1, vectors, 2) == [rows[0]]
    assert nearest_demos(task, 2, vectors, 2) == [rows[1], rows[0]]


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"extract_from": "zero-shot", "demo_selection": "random"}, "have no demonstrations"),
        ({"demo_selection": "nearest", "queries_per_context": 2}, "each query's own"),
        ({"demo_selection": "nearest", "encoder": "hidden"}, "found by a sentence encoder"),
        ({"demo_selection": "nearest", "encoder": "random:hidden"}, "found by a sentence encoder"),
    ],
)
def test_demonstrations_that_do_not_go_with_the_prompts_are_refused(changes, refusal):
    with pytest.raises(ValueError, match=refusal):
        FitConfig(**changes)


@pytest.mark.parametrize("extract_from", ["zero-shot", "shuffled"])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_an_extraction_is_of_the_prompts_that_were_asked_for(family, extract_from, tokenizer):
    """Against the prompts of both tasks, run one by one."""
    decoder = Decoder.of(tiny.model(family), tokenizer)
    tasks = [TASK, tiny.task("other")]
    config = small_fit(n_prompts=5, demos_per_class=2, extract_from=extract_from)
    moments = extract(decoder, tasks, (2, 4), config, None)
    rng = np.random.default_rng(config.seed)
    keys = []
    for task in tasks:
        for prompt in drawn_prompts(task, config, rng, 5):
            keys += [key for _, key in capture_last_tokens(decoder, [prompt], (2, 4))]
    slow = torch.cat(keys, dim=1).double()
    assert moments.count == 10
    torch.testing.assert_close(moments.mean("key"), slow.mean(1), rtol=1e-4, atol=1e-5)
    few_shot_moments = extract(decoder, tasks, (2, 4), small_fit(n_prompts=5), None)
    assert (moments.mean("key") - few_shot_moments.mean("key")).abs().max() > 0.01
