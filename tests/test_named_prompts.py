"""Prompts of the user's own, as methods of a task."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import tiny
from icrouting.cli import main
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.scoring import score_options
from icrouting.evaluation.predictor import Predictor
from icrouting.methods import Settings, make
from icrouting.methods.named_prompts import named_prompts, prompt_digests
from icrouting.tasks.load import load_task
from icrouting.tasks.prompts import zero_shot
from icrouting.tasks.task import NamedPrompt, Task, rows_digest
from test_chat import CHATML, speaking

OTHER_CHATML = CHATML.replace("Be good", "Be brief")
OPTIONS = ["negative", "positive"]
SHOWN = "Text: dull plot\nMood: negative\nText: {text}\nMood:"
ROWS = [
    {"text": f"{word} film number {number}", "label": label}
    for number in range(12)
    for label, word in enumerate(("dull", "joyful"))
]
TEMPLATE = "Review: {text}\nSentiment:"


def of_rows(**changes):
    return Task.from_rows(ROWS, TEMPLATE, OPTIONS, **{"prompts": {"production": SHOWN}, **changes})


def toy(*prompts):
    task = tiny.task()
    return dataclasses.replace(task, spec=dataclasses.replace(task.spec, prompts=prompts))


def fitted(name, model, tokenizer):
    (method,) = make([name], Settings())
    method.fit(model, tokenizer, [], np.random.default_rng(0))
    return method


@pytest.fixture(scope="module")
def llama():
    return tiny.model("llama")


def test_a_named_prompt_asks_with_its_own_template(llama, tokenizer):
    task = of_rows()
    method = fitted("prompt:production", llama, tokenizer)
    row = task.test[0]
    prompt = method.on(task).prompt(task, row)
    assert prompt.text == SHOWN.format(text=row.fields["text"])
    assert prompt.context == "Text: dull plot\nMood: negative\nText: "
    records = Predictor(Decoder.of(llama, tokenizer)).predict(method, task, [0, 1, 2], 0)
    texts = [SHOWN.format(text=task.test[index].fields["text"]) for index in range(3)]
    scores = score_options(llama, tokenizer, texts, OPTIONS)
    asked = torch.tensor([record.option_logits for record in records])
    assert (asked - scores).abs().max() < 1e-4


def test_a_brace_in_a_demonstration_is_part_of_the_context(llama, tokenizer):
    task = toy(NamedPrompt("json", 'Say {{"mood": "good"}} for {text}\nMood:'))
    prompt = fitted("prompt:json", llama, tokenizer).prompt(task, task.test[0])
    assert prompt.context == 'Say {"mood": "good"} for '
    assert prompt.text.startswith('Say {"mood": "good"} for dull')


def test_a_task_without_the_prompt_refuses_the_method_and_names_those_it_has(llama, tokenizer):
    method = fitted("prompt:other", llama, tokenizer)
    with pytest.raises(ValueError, match=r"no prompt 'other': it has production; write it under"):
        method.on(of_rows())
    with pytest.raises(ValueError, match=r"no prompt 'other': it has none"):
        method.on(tiny.task())


def test_a_prompt_is_a_chat_where_its_task_is_one(llama):
    tokenizer = speaking()
    task = of_rows(chat=True, system="Judge.").bound_to(tokenizer)
    prompt = fitted("prompt:production", llama, tokenizer).prompt(task, task.test[0])
    assert prompt.text.startswith("<|system|>\nJudge.<|end|>\n<|user|>\nText: dull plot")
    assert prompt.context.endswith("negative\nText: ")
    assert prompt.joint == ""


def test_a_prompt_may_be_a_chat_of_its_own_or_none(llama):
    tokenizer = speaking()
    method = fitted("prompt:p", llama, tokenizer)
    chatted = toy(NamedPrompt("p", SHOWN, chat=True, system="Judge."))
    text = method.prompt(chatted, chatted.test[0]).text
    assert text.startswith("<|system|>\nJudge.<|end|>\n<|user|>\nText: dull plot")
    plain = toy(NamedPrompt("p", SHOWN, chat=False)).in_chat().bound_to(tokenizer)
    prompt = method.prompt(plain, plain.test[0])
    assert prompt.text.startswith("Text: dull plot")
    assert prompt.joint == " "


def test_a_prompt_that_says_what_the_template_says_gives_its_scores_bit_for_bit(llama, tokenizer):
    task = toy(NamedPrompt("same", tiny.task().spec.template))
    predictor = Predictor(Decoder.of(llama, tokenizer))
    row = task.test[0]
    assert fitted("prompt:same", llama, tokenizer).prompt(task, row).text == (
        zero_shot(task, row).text
    )
    plain, same = (
        predictor.predict(fitted(name, llama, tokenizer), task, [0], 0)[0]
        for name in ("zero-shot", "prompt:same")
    )
    assert same.option_logits == pytest.approx(plain.option_logits, abs=1e-4)


def test_prompts_change_nothing_of_the_rows_digest():
    assert rows_digest([toy(NamedPrompt("p", SHOWN))]) == rows_digest([tiny.task()])


def test_all_prompts_of_the_tasks_stand_for_prompts():
    tasks = [toy(NamedPrompt("a", SHOWN), NamedPrompt("b", SHOWN)), toy(NamedPrompt("b", SHOWN))]
    names = ["zero-shot", "prompts", "icr"]
    assert named_prompts(names, tasks) == ["zero-shot", "prompt:a", "prompt:b", "icr"]


def test_a_prompt_is_told_apart_by_its_text(tokenizer):
    one, other = toy(NamedPrompt("p", SHOWN)), toy(NamedPrompt("p", f"Read.\n{SHOWN}"))
    digests = [prompt_digests(["prompt:p"], [task], tokenizer) for task in (one, other)]
    assert digests[0].keys() == digests[1].keys() == {"toy/prompt:p"}
    assert digests[0] != digests[1]
    assert prompt_digests(["zero-shot"], [one], tokenizer) == {}


def test_a_chat_prompt_of_a_plain_task_is_told_apart_by_the_chat_template():
    plain, chat = NamedPrompt("plain", SHOWN), NamedPrompt("chat", SHOWN, chat=True)
    digests = []
    for template in (CHATML, OTHER_CHATML):
        methods = ["prompt:plain", "prompt:chat"]
        digests.append(prompt_digests(methods, [toy(plain, chat)], speaking(template)))
    assert digests[0].keys() == digests[1].keys()
    changed = {name for name in digests[0] if digests[0][name] != digests[1][name]}
    assert changed == {"the chat template of toy/prompt:chat"}
    # A task of chats binds its run to the template by itself.
    of_chats = toy(chat).in_chat()
    assert prompt_digests(["prompt:chat"], [of_chats], speaking(CHATML)).keys() == {
        "toy/prompt:chat"
    }


FILE = """
name = "moods"
template = "Review: {text}\\nSentiment:"
options = ["negative", "positive"]
splits = {rows = "rows.jsonl"}
"""
PROMPT = """
[[prompts]]
name = "production"
template = "Text: dull plot\\nMood: negative\\nText: {text}\\nMood:"
"""


def written(folder, *parts):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    file = folder / "moods.toml"
    file.write_text(FILE + "".join(parts))
    return file


def test_a_task_file_gives_prompts_and_chats(tmp_path):
    more = '\n[[prompts]]\nname = "b"\ntemplate = "{text}:"\nchat = false\n'
    chat = 'chat = true\nsystem = "Judge."\n'
    spec = load_task(str(written(tmp_path, chat, PROMPT, more)), "").spec
    assert (spec.chat, spec.system) == (True, "Judge.")
    assert spec.prompts == (NamedPrompt("production", SHOWN), NamedPrompt("b", "{text}:", False))


@pytest.mark.parametrize(
    ("part", "line", "message"),
    [
        ('chat = "yes"', 6, "key 'chat' must be a bool, got 'yes'"),
        ('system = "Judge."', 6, "key 'system' is a turn of a chat: write chat = true"),
        ('[[prompts]]\nname = "a"', 6, "key 'prompts' must have name = .* and template"),
        ('[[prompts]]\nname = "a b"\ntemplate = "{text}:"', 6, "needs names of letters"),
        ('[[prompts]]\nname = "a"\ntemplate = "{title}:"', 6, "lacks: title; it has text"),
        ('[[prompts]]\nname = "a"\ntemplate = "{text} "', 6, "'a': template needs slots"),
        ('[[prompts]]\nname = "a"\ntemplate = "{text}:"\nsystem = "J"', 6, "turn of a chat"),
        ('[[prompts]]\nname = "a"\ntemplate = "{text}:"\nmodel = "J"', 6, "must have name"),
        ('[[prompts]]\nname = "a"\ntemplate = "{text}:"\n' * 2, 6, "a name of its own for each"),
    ],
)
def test_a_mistake_in_a_prompt_or_a_chat_is_named_with_its_line(part, line, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_task(str(written(tmp_path, part)), "")
    assert f"moods.toml:{line}: " in str(caught.value)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


def evaluate(model_folder, file, out, *methods):
    where = ["--model", str(model_folder), "--tasks", str(file), "--sources", "--seeds", "0"]
    main.main(["eval", "--out", str(out), *where, "--n-test", "3", "--methods", *methods])
    return json.loads((out / "config.json").read_text())


@pytest.mark.slow
def test_prompts_are_methods_of_a_run_and_one_may_join_but_not_change(
    model_folder, tmp_path, capsys
):
    file, out = written(tmp_path, PROMPT), tmp_path / "run"
    config = evaluate(model_folder, file, out, "zero-shot", "prompts")
    assert config["methods"] == ["zero-shot", "prompt:production"]
    lines = (out / "records.jsonl").read_text().splitlines()
    assert {json.loads(line)["method"] for line in lines} == {"zero-shot", "prompt:production"}
    assert "prompt:production" in (out / "report.md").read_text()
    # Another prompt beside it leaves the answers that are there.
    written(tmp_path, PROMPT, PROMPT.replace("production", "second"))
    config = evaluate(model_folder, file, out, "zero-shot", "prompts")
    assert config["prompts"].keys() == {"moods/prompt:production", "moods/prompt:second"}
    written(tmp_path, PROMPT.replace("Mood", "Feel"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate(model_folder, file, out, "zero-shot", "prompts")
    assert "the text of moods/prompt:production was another" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_chat_template_of_a_chat_prompt(tmp_path, capsys):
    tiny.save(tmp_path / "model")
    file, out = written(tmp_path, f"{PROMPT}\nchat = true\n"), tmp_path / "run"
    arguments = (tmp_path / "model", file, out, "zero-shot", "prompts")
    speaking(CHATML).save_pretrained(tmp_path / "model")
    lines = evaluate(*arguments)["prompts"]
    # A run of an earlier version goes on, as it did not say which template it had.
    earlier = json.loads((out / "config.json").read_text())
    del earlier["prompts"]["the chat template of moods/prompt:production"]
    (out / "config.json").write_text(json.dumps(earlier))
    assert evaluate(*arguments)["prompts"] == lines
    speaking(OTHER_CHATML).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate(*arguments)
    assert "the chat template of moods/prompt:production was another" in capsys.readouterr().err


@pytest.mark.slow
def test_prompts_are_asked_for_where_there_are_none(model_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate(model_folder, written(tmp_path), tmp_path / "run", "prompts")
    assert "none of the tasks moods has prompts of its own" in capsys.readouterr().err
