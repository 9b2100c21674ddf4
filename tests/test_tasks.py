import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import tiny
from icrouting.tasks.catalogue import PAPER_TASKS, SPECS
from icrouting.tasks.load import load_task
from icrouting.tasks.prompts import balanced_demos, extraction_prompts, few_shot
from icrouting.tasks.task import Task, rows_digest

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data folder is not beside the checkout"
)


def write(folder, rows, name="sst2", split="train"):
    file = folder / name / f"{split}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows),
        encoding="utf-8",
    )
    return file


GOOD, BAD = {"text": "a joy", "label": 1}, {"text": "a bore", "label": 0}


def test_a_task_reads_its_rows_and_fills_its_template(tmp_path):
    write(tmp_path, [GOOD, BAD])
    write(tmp_path, [{"text": "dull", "label": 0}], split="test")
    task = load_task("sst2", tmp_path)
    assert len(task.train) == 2
    assert task.prompt(task.test[0]) == "Review: dull\nSentiment:"
    assert task.answer(task.test[0]) == "negative"


def test_phrases_of_other_tasks_test_rows_in_the_folder_are_left_out(tmp_path):
    rows = [{"text": f"a long phrase with number {i} in it", "label": i % 2} for i in range(20)]
    write(tmp_path, rows)
    write(tmp_path, [{"text": "quite another sentence of some words", "label": 0}], split="test")
    assert load_task("sst2", tmp_path).n_dropped == 0
    write(
        tmp_path, [{"text": f"so , {row['text']} !", "label": 1} for row in rows[:6]], "mr", "test"
    )
    task = load_task("sst2", tmp_path)
    assert task.n_dropped == 6
    assert {row.fields["text"] for row in (*task.train, *task.validation)} == {
        row["text"] for row in rows[6:]
    }


def test_multiple_choice_lists_its_choices_and_letters():
    spec = SPECS["csqa"]
    example = tiny.Example({"question": "where?"}, ("here", "there", "nowhere"), 2)
    task = Task(spec, (example,), (example,))
    assert (
        task.prompt(example) == "Question: where?\nA. here\nB. there\nC. nowhere\nAnswer (A/B/C):"
    )
    assert task.options(example) == ("A", "B", "C")
    assert task.answer(example) == "C"


def test_braces_in_a_text_are_text():
    example = tiny.Example({"text": "{text} {0} {label}"}, (), 0)
    assert "{text} {0} {label}" in Task(SPECS["sst2"], (example,), (example,)).prompt(example)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"label": 1}, "missing here: ['text']"),
        ({"text": "x"}, "missing here: ['label']"),
        ({"text": "x", "label": 2}, "integer in 0..1 or one of negative, positive, got 2"),
        ({"text": "x", "label": True}, "got True"),
        ({"text": " ", "label": 1}, "not empty"),
        ({"text": 3, "label": 1}, "must be a text"),
        ([1], "expected a JSON object, got list"),
        ("{not json", "not a JSON object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, said):
    file = write(tmp_path, [GOOD, "", row])
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_task("sst2", tmp_path)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert said in str(caught.value)


def test_choices_of_the_wrong_kind_are_refused(tmp_path):
    write(tmp_path, [{"question": "q", "choices": ["a"], "label": 0}], name="piqa")
    with pytest.raises(ValueError, match=r"2 options or more.* got 1"):
        load_task("piqa", tmp_path)


def test_an_empty_file_and_a_missing_folder_are_refused(tmp_path):
    write(tmp_path, [])
    with pytest.raises(ValueError, match="holds no example"):
        load_task("sst2", tmp_path)
    with pytest.raises(ValueError, match="expected a folder"):
        load_task("mr", tmp_path)


def test_an_unknown_task_brings_near_matches():
    with pytest.raises(ValueError, match="unknown task 'sst3': did you mean sst5 or sst2"):
        load_task("sst3", "anywhere")


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("name", PAPER_TASKS)
def test_every_task_of_the_paper_reads_and_its_options_are_distinct(name):
    task = load_task(name, SHARED)
    for example in (*task.train[:200], *task.test[:200]):
        options = task.options(example)
        assert len(set(options)) == len(options) > example.label
        assert "{" not in task.spec.template.format_map(
            dict.fromkeys((*task.spec.slots, "choices", "letters"), "")
        )
        assert task.prompt(example).endswith(":")


def test_demonstrations_are_balanced_seeded_and_never_the_query():
    task = tiny.task()
    draw = [
        balanced_demos(task, 5, np.random.default_rng(seed), exclude=(7,)) for seed in (1, 1, 2)
    ]
    assert Counter(demo.label for demo in draw[0]) == {0: 5, 1: 5}
    assert draw[0] == draw[1] != draw[2]
    every = balanced_demos(task, 1000, np.random.default_rng(0), exclude=(7,))
    assert len(every) == len(task.train) - 1
    assert task.train[7] not in every


def test_few_shot_prompts_end_with_the_zero_shot_prompt():
    task = tiny.task()
    demos = balanced_demos(task, 2, np.random.default_rng(0))
    prompt = few_shot(task, task.test[0], [(task, demo) for demo in demos])
    assert prompt.query == task.prompt(task.test[0])
    assert prompt.context.count("Sentiment: ") == 4
    assert prompt.context.endswith("\n")


def test_extraction_prompts_are_seeded_and_as_many_as_asked():
    task = tiny.task()
    first, again = (
        list(extraction_prompts(task, 9, 2, np.random.default_rng(seed))) for seed in (0, 0)
    )
    assert first == again
    assert len(set(first)) == len({prompt.context for prompt in first}) == 9


def test_extraction_prompts_may_share_demonstrations_that_none_of_them_is():
    task = tiny.task()
    prompts = list(extraction_prompts(task, 9, 2, np.random.default_rng(0), per_context=4))
    contexts = [prompt.context for prompt in prompts]
    assert [contexts.count(context) for context in dict.fromkeys(contexts)] == [4, 4, 1]
    assert len({prompt.query for prompt in prompts}) == 9
    for prompt in prompts:
        assert not any(
            other.query in prompt.context for other in prompts if other.context == prompt.context
        )


def test_extraction_prompts_hold_training_rows_alone_balanced_before_an_open_query():
    task = tiny.task()
    answered = {f"{task.prompt(example)} {task.answer(example)}\n" for example in task.train}
    queries = {task.prompt(example) for example in task.train}
    for text in (
        prompt.text for prompt in extraction_prompts(task, 9, 2, np.random.default_rng(0))
    ):
        query = next(query for query in queries if text.endswith(query))
        demos = re.findall(r"Review: .*\nSentiment: .*\n", text.removesuffix(query))
        assert "".join(demos) + query == text
        assert set(demos) <= answered
        assert Counter(demo.split()[-1] for demo in demos) == {"negative": 2, "positive": 2}
        assert not any(demo.startswith(query) for demo in demos)


def test_a_text_may_hold_any_separator_that_json_allows(tmp_path):
    rows = ['\ufeff{"text": "a nice\u2028film\x85", "label": 1}', GOOD]
    write(tmp_path, [*rows, BAD])
    write(tmp_path, [{"text": "dull", "label": 0}], split="test")
    task = load_task("sst2", tmp_path)
    assert task.train[0].fields["text"] == "a nice\u2028film\x85"
    assert len(task.train) == 3


def test_other_rows_have_another_digest():
    assert rows_digest([tiny.task()]) == rows_digest([tiny.task()])
    assert rows_digest([tiny.task()]) != rows_digest([tiny.task(n_train=41)])
