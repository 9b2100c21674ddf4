"""Chats on the command line: fit, eval, generate and inspect."""

import json

import pytest

from commands import FIT, make_world, on
from icrouting.cli import main
from icrouting.icr import InContextRouter
from test_chat import CHATML, speaking

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chat_world(tmp_path_factory, encoder_folder):
    """A world whose tokenizer has a chat template, with a router fitted on chats beside its own."""
    folder = tmp_path_factory.mktemp("chats")
    make_world(folder, encoder_folder)
    speaking(CHATML).save_pretrained(folder / "model")
    fit(folder, encoder_folder)
    return folder


def fit(folder, encoder_folder, *more, out="chat-router"):
    where = [*on(folder), "--encoder", str(encoder_folder)]
    main.main(["fit", "--out", str(folder / out), *where, *FIT.split(), "--chat", *more])


def evaluate(folder, out, *more, router="chat-router"):
    where = [*on(folder), "--router", str(folder / router), "--tasks", "sst2", "--seeds", "0"]
    methods = ["--methods", "zero-shot", "few-shot", "calibration", "icr"]
    few = ["--n-test", "3", "--demos-per-class", "1"]
    main.main(["eval", "--out", str(out), *where, *methods, *few, *more])
    return json.loads((out / "config.json").read_text())


def test_fit_chat_saves_a_router_of_chats_and_is_finished_only_once(
    chat_world, encoder_folder, capsys
):
    icr = InContextRouter.from_pretrained(chat_world / "chat-router")
    assert [source.chat for source in icr.description.sources] == [True]
    fit(chat_world, encoder_folder)
    assert "holds this router already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fit(chat_world, encoder_folder, out="router")
    assert "a router of other settings or data" in capsys.readouterr().err


def test_a_dry_run_counts_the_tokens_of_chats(chat_world, encoder_folder, capsys):
    counts = []
    for more in ([], ["--chat"]):
        main.main(["fit", "--out", "x", *on(chat_world), *FIT.split(), "--dry-run", *more])
        counts.append(capsys.readouterr().out)
    assert counts[0] != counts[1]


def test_eval_chat_is_a_run_of_its_own_and_goes_on(chat_world, tmp_path, capsys):
    config = evaluate(chat_world, tmp_path / "run", "--chat")
    assert config["chat"] is True
    assert len(config["chat_template"]) == 16
    assert not any("learned from" in note and "otherwise" in note for note in config["notes"])
    before = (tmp_path / "run" / "records.jsonl").read_text()
    assert evaluate(chat_world, tmp_path / "run", "--chat")["rows"] == config["rows"]
    assert (tmp_path / "run" / "records.jsonl").read_text() == before
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate(chat_world, tmp_path / "run")
    assert "chat was true, is null" in capsys.readouterr().err


def test_a_plain_run_is_not_gone_on_with_in_chats(chat_world, tmp_path, capsys):
    config = evaluate(chat_world, tmp_path / "run", router="router")
    assert "chat" not in config
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate(chat_world, tmp_path / "run", "--chat", router="router")
    assert "chat was null, is true" in capsys.readouterr().err


def test_a_router_that_is_asked_otherwise_than_it_learned_is_noted(chat_world, tmp_path):
    (note,) = [
        note
        for note in evaluate(chat_world, tmp_path / "run")["notes"]
        if "asked otherwise" in note
    ]
    assert note == "ICR learned from chats, and is asked otherwise: sst2."


PROMPT = r"Review: a joy .\nSentiment:"


@pytest.mark.parametrize("more", [[], ["--system", "Judge."]])
def test_generate_and_inspect_take_the_prompt_as_a_turn(more, chat_world, tmp_path, capsys):
    router = ["--model", str(chat_world / "model"), "--router", str(chat_world / "chat-router")]
    main.main(["generate", *router, "--prompt", PROMPT, "--max-new-tokens", "2", "--chat", *more])
    assert "effect on 1 prompt" in capsys.readouterr().out
    page = tmp_path / "page.html"
    options = ["--options", "negative", "positive", "--out", str(page)]
    main.main(["inspect", *router, "--prompt", PROMPT, *options, "--chat", *more])
    tokens = page.read_text()
    assert "sys" in tokens
    assert ("Judge" in tokens.replace("</span>", "")) or more == [] or "J" in tokens


def test_a_system_turn_without_a_chat_is_refused(chat_world, capsys):
    router = ["--model", str(chat_world / "model"), "--router", str(chat_world / "chat-router")]
    with pytest.raises(SystemExit):
        main.main(["generate", *router, "--prompt", PROMPT, "--system", "Judge."])
    assert "--system is a turn of a chat: give --chat" in capsys.readouterr().err
