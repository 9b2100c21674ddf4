"""Chats on the command line: fit, eval, generate and inspect."""

import json

import pytest
import torch

import tiny
from commands import FIT, make_world, on
from icrouting.cli import main
from icrouting.cli.evaluate import _load_tasks
from icrouting.cli.reading import load_tasks
from icrouting.cli.routers import Routers, _other_chats
from icrouting.decoder.decoder import Decoder
from icrouting.evaluation import runs
from icrouting.evaluation.config import EvalConfig
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


def evaluate(folder, out, *more):
    where = [*on(folder), *router(folder), "--tasks", "sst2", "--seeds", "0"]
    methods = ["--methods", "zero-shot", "few-shot", "icr"]
    few = ["--n-test", "3", "--demos-per-class", "1"]
    main.main(["eval", "--out", str(out), *where, *methods, *few, *more])
    return json.loads((out / "config.json").read_text())


def test_fit_chat_saves_a_router_of_chats_and_is_finished_only_once(
    chat_world, encoder_folder, capsys
):
    icr = InContextRouter.from_pretrained(chat_world / "chat-router")
    assert [source.chat for source in icr.description.sources] == [True]
    fit(chat_world, encoder_folder)
    assert "holds this router already" in " ".join(capsys.readouterr().out.split())
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
    # And a run of earlier versions, which had no chats, does not become one.
    plain = {name: value for name, value in config.items() if "chat" not in name}
    changes = runs._changes(plain, config)
    assert changes[0] == "chat was null, is true"


def test_a_router_that_is_asked_otherwise_than_it_learned_is_noted(chat_world):
    icr = InContextRouter.from_pretrained(chat_world / "chat-router")
    note = _other_chats(icr, [tiny.task()])
    assert note == "learned from chats, and is asked otherwise: toy."
    assert _other_chats(icr, [tiny.task().in_chat()]) == ""
    plain = InContextRouter.from_pretrained(chat_world / "router")
    note = _other_chats(plain, [tiny.task().in_chat()])
    assert note == "learned from plain prompts, and is asked otherwise: toy."
    assert _other_chats(plain, [tiny.task()]) == ""


def test_a_router_s_sources_are_read_as_it_learned_from_them(chat_world):
    for folder, is_chat in (("chat-router", True), ("router", False)):
        icr = InContextRouter.from_pretrained(chat_world / folder)
        config = EvalConfig(data=str(chat_world / "data"), tasks=("mr",))
        read_tasks = dict(zip(config.tasks, load_tasks(config.tasks, config.data), strict=True))
        routers = Routers(icr, (), {})
        tasks, (source,) = _load_tasks(config, read_tasks, routers, reads_sources=True)
        assert (tasks[0].spec.chat, source.spec.chat) == (False, is_chat)


PROMPT = r"Review: a joy .\nSentiment:"
TURN = "<|user|>\nReview: a joy .\nSentiment:<|end|>\n<|assistant|>\n"


@pytest.fixture
def seen(monkeypatch):
    """The prompts that the router is asked about, as texts."""
    monkeypatch.setattr("icrouting.decoder.loading.default_dtype", lambda: torch.float32)
    texts = []
    tokenize = Decoder.tokenize

    def noted(self, asked):
        texts.extend(asked)
        return tokenize(self, asked)

    monkeypatch.setattr(Decoder, "tokenize", noted)
    return texts


def router(folder):
    return ["--model", str(folder / "model"), "--router", str(folder / "chat-router")]


def test_generate_takes_the_prompt_as_a_turn(chat_world, seen, capsys):
    command = ["generate", *router(chat_world), "--prompt", PROMPT, "--max-new-tokens", "2"]
    main.main([*command, "--chat"])
    assert "effect on 1 prompt" in capsys.readouterr().out
    assert set(seen) == {f"<|system|>\nBe good.<|end|>\n{TURN}"}


def test_inspect_takes_the_prompt_as_a_turn_behind_a_system_turn(chat_world, seen, tmp_path):
    options = ["--options", "negative", "positive", "--out", str(tmp_path / "page.html")]
    command = ["inspect", *router(chat_world), "--prompt", PROMPT, *options]
    # The router learned from chats without this turn.
    with pytest.warns(UserWarning, match="form of none"):
        main.main([*command, "--chat", "--system", "Judge."])
    assert set(seen) == {f"<|system|>\nJudge.<|end|>\n{TURN}"}


def test_a_system_turn_without_a_chat_is_refused(chat_world, capsys):
    with pytest.raises(SystemExit):
        main.main(["generate", *router(chat_world), "--prompt", PROMPT, "--system", "Judge."])
    assert "--system is a turn of a chat: give --chat" in capsys.readouterr().err
