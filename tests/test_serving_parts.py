"""The parts of serving: texts that grow, the queue, names, and the command."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx2
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import tiny
from commands import on
from icrouting.cli import main
from icrouting.cli.serve import named
from icrouting.serving.engine import Engine
from icrouting.serving.jobs import Completion, Piece, Refused, Scoring
from icrouting.serving.limits import Limits
from icrouting.serving.metrics import Metrics
from icrouting.serving.server import listening
from icrouting.serving.texts import Growing

TOKENIZER = tiny.tokenizer()


def growing(tokens, max_tokens, stop=(), end_ids=()):
    """The pieces that are told of tokens as they come, and the text."""
    pieces = []
    job = Completion("base", pieces.append, time.monotonic() + 60)
    job.max_tokens = max_tokens
    job.stop = stop
    text = Growing(job, TOKENIZER, set(end_ids))
    for token in tokens:
        text.add(token)
    return pieces, text


@given(
    tokens=st.lists(st.integers(2, 300), min_size=1, max_size=12),
    stop=st.lists(st.text("abcdefgh ", min_size=1, max_size=3), max_size=2),
)
@examples(max_examples=200, deadline=None)
def test_pieces_make_the_text_up_to_the_first_stop(tokens, stop):
    pieces, text = growing(tokens, len(tokens), stop)
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    # A stop text ends the answer as soon as it is there, so only the text until then is searched.
    for n in range(1, len(tokens) + 1):
        begun = TOKENIZER.decode(tokens[:n], skip_special_tokens=True)
        places = [begun.find(each) for each in stop if each in begun]
        if places:
            whole = begun[: min(places)]
            break
    assert "".join(piece.text for piece in pieces) == whole
    assert text.has_ended
    assert [piece.finish_reason is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]


def test_half_a_character_waits_for_the_rest():
    tokens = TOKENIZER("é").input_ids
    tokens = [token for token in tokens if token not in TOKENIZER.all_special_ids]
    assert len(tokens) > 1, "the tokenizer spells it by bytes"
    pieces, _ = growing([*tokens, *TOKENIZER(" good").input_ids[-1:]], len(tokens) + 1)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece.text for piece in pieces)


def test_an_end_token_ends_a_text_and_is_no_part_of_it():
    pieces, text = growing([20, 21, 7, 22], 10, end_ids=[7])
    assert text.has_ended
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode([20, 21])
    assert pieces[-1].finish_reason == "stop"


def test_a_text_that_nobody_waits_for_ends_and_is_not_told():
    pieces = []
    job = Completion("base", pieces.append, time.monotonic() + 60)
    job.max_tokens = 5
    text = Growing(job, TOKENIZER, set())
    job.gone.set()
    text.add(20)
    assert text.has_ended
    assert pieces == []


class Failing:
    """Several routers, of which any batch with the prompt "bad" fails."""

    def __init__(self):
        model = SimpleNamespace(generation_config=None)
        self.reader = SimpleNamespace(decoder=SimpleNamespace(model=model, tokenizer=TOKENIZER))
        self.batches = []

    def score(self, prompts, options, names):
        self.batches.append(list(prompts))
        if "bad" in prompts:
            raise RuntimeError("the model failed")
        return torch.zeros(len(prompts), len(options))


def scoring(prompt, seconds=60.0):
    answers = []
    job = Scoring("base", answers.append, time.monotonic() + seconds)
    job.prompts = [prompt]
    job.options = ["a", "b"]
    return job, answers


def run_together(jobs, limits=None):
    several = Failing()
    engine = Engine(several, limits or Limits(), Metrics())
    engine.submit([job for job, _ in jobs])
    engine.start()
    engine.close()
    return several


def test_a_request_that_fails_fails_alone():
    jobs = [scoring("good"), scoring("bad"), scoring("fine")]
    several = run_together(jobs)
    assert several.batches[0] == ["good", "bad", "fine"]
    assert [type(answers[0]) for _, answers in jobs] == [list, RuntimeError, list]
    assert [len(answers) for _, answers in jobs] == [1, 1, 1]


def test_what_was_told_in_part_is_not_told_again():
    job = Completion("base", (told := []).append, time.monotonic() + 60)
    job.tell(Piece("a", 1))
    engine = Engine(Failing(), Limits(), Metrics())
    engine._answer_alone(job, RuntimeError("the model failed"))
    assert [type(part) for part in told] == [Piece, RuntimeError]
    job.tell(Piece("b", 1))
    assert len(told) == 2


def test_a_batch_holds_no_more_than_it_may_and_keeps_the_order():
    jobs = [scoring(str(number)) for number in range(7)]
    several = run_together(jobs, Limits(max_batch=3))
    assert several.batches == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


def test_what_nobody_waits_for_is_not_computed():
    late, answers = scoring("late", seconds=-1)
    gone, _ = scoring("gone")
    gone.gone.set()
    several = run_together([(late, answers), (gone, []), scoring("good")])
    assert several.batches == [["good"]]
    assert answers[0].status == 504


def test_a_closed_engine_takes_nothing_and_has_finished_all():
    jobs = [scoring(str(number)) for number in range(20)]
    engine = Engine(Failing(), Limits(), Metrics())
    engine.submit([job for job, _ in jobs])
    engine.start()
    engine.close()
    assert all(len(answers) == 1 for _, answers in jobs)
    with pytest.raises(Refused, match="shutting down"):
        engine.submit([scoring("more")[0]])


def test_names_are_those_that_are_given_or_the_folders():
    assert named(["runs/tickets", "b=other/router"]) == {
        "tickets": "runs/tickets",
        "b": "other/router",
    }
    for artifacts, why in (
        (["a/x", "b/x"], "two routers are called 'x'"),
        (["base=a"], "is the model as it is"),
        (["=a"], "expected FOLDER or NAME=FOLDER"),
    ):
        with pytest.raises(ValueError, match=why):
            named(artifacts)


def test_a_port_in_use_is_told_before_a_model_is_loaded(world, capsys, monkeypatch):
    monkeypatch.setattr("icrouting.cli.serve.load", None)
    with listening("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as ended:
            main.main(["serve", str(world / "router"), "--port", port])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(rf"cannot listen at 127.0.0.1:{port}: .*choose another --port", error)
    assert error.count("\n") == 1


def test_without_the_extra_the_command_says_what_to_install(world, capsys, monkeypatch):
    monkeypatch.setattr("icrouting.cli.reading.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main.main(["serve", str(world / "router")])
    assert "pip install 'icrouting[serve]'" in capsys.readouterr().err


def test_a_folder_without_a_router_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(["serve", f"x={tmp_path}"])
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.processes
def test_a_server_that_is_told_to_end_answers_what_is_in_flight(world, encoder_folder):
    script = "from icrouting.cli.main import main; main()"
    where = ["--port", "0", *on(world)[:2]]
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", script, "serve", f"mine={world / 'router'}", *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    try:
        said = []
        while not said or "http://" not in said[-1]:
            line = child.stdout.readline()
            assert line, said
            said.append(line)
        url = re.search(r"http://[\d.:]+", said[-1])[0]
        body = {"model": "mine", "prompt": "Review: bad\nSentiment:", "max_tokens": 200}
        answers = []

        def ask():
            answers.append(httpx2.post(f"{url}/v1/completions", json=body, timeout=60))

        while True:
            try:
                httpx2.get(f"{url}/healthz")
                break
            except httpx2.ConnectError:
                time.sleep(0.05)
        asking = threading.Thread(target=ask)
        asking.start()
        while 'model="mine"' not in (counts := httpx2.get(f"{url}/metrics").text):
            if "icr_batch_requests_count" in counts:
                break
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        asking.join()
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] > 0
        rest = child.stdout.read()
        assert "what was in flight was answered" in rest
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.stdout.close()
