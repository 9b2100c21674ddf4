"""Serving: every request gets its own router's answer, whatever else is asked meanwhile."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import openai
import pytest
import torch
import uvicorn

import tiny
from fitted import small_fit
from icrouting import InContextRouter, score_options
from icrouting.serving.app import Service, create_app
from icrouting.serving.limits import Limits
from icrouting.serving.server import listening
from icrouting.several import attach
from test_chat import CHATML, speaking

pytestmark = pytest.mark.slow

TASK = tiny.task("toy")
PROMPTS = [
    "Review: good good bad plot\nSentiment:",
    "Review: bad\nSentiment:",
    "Review: a moving scene of the boring film and the dull plot\nSentiment:",
    "ball goal",
]
OPTIONS = ["negative", "positive"]
NAMES = ("base", "tickets", "reviews")
LIMITS = Limits(max_tokens=40, max_rows=20, max_body=20_000, timeout=30)


@pytest.fixture(scope="module")
def model():
    model = tiny.model("llama")
    # No text ends by itself, so that lengths are those that are asked for.
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def talking():
    return speaking(CHATML)


@pytest.fixture(scope="module")
def routers(model, talking):
    big = small_fit(lr=0.05, epochs=6)
    small = small_fit(lr=0.05, epochs=6, rank=2, seed=3)
    return {
        "tickets": InContextRouter.fit(model, talking, [TASK], big, gate=False),
        "reviews": InContextRouter.fit(model, talking, [tiny.task("other")], small, gate=False),
    }


class Running:
    """A server in a thread."""

    def __init__(self, several, digests, limits=LIMITS, api_key=None):
        self.service = Service(several, limits, digests)
        self.socket = listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = create_app(self.service, api_key)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="module")
def lone_answers(model, talking, routers):
    """What each name answers to each prompt, alone: twelve tokens, and the options' shares."""
    answers = {}
    for name in NAMES:
        for prompt in PROMPTS:
            inputs = talking(prompt, return_tensors="pt")
            how = {"max_new_tokens": 12, "do_sample": False}
            if name == "base":
                tokens = model.generate(**inputs, **how)
                scores = score_options(model, talking, [prompt], OPTIONS)
            else:
                with routers[name].attached(model, talking) as routed:
                    tokens = model.generate(**inputs, **how)
                    scores = routed.score([prompt], OPTIONS)
            new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
            text = talking.decode(new_tokens, skip_special_tokens=True)
            answers[name, prompt] = (text, scores.softmax(1)[0].tolist())
    return answers


@pytest.fixture(scope="module")
def running(model, talking, routers, lone_answers):
    digests = {name: icr.digest() for name, icr in routers.items()}
    with attach(routers, model, talking) as several, Running(several, digests) as server:
        yield server


@pytest.fixture(scope="module")
def client(running):
    with httpx2.Client(base_url=running.url, timeout=60) as opened:
        yield opened


def complete(client, name, prompt, **more):
    body = {"model": name, "prompt": prompt, "max_tokens": 12, **more}
    return client.post("/v1/completions", json=body)


def events(text):
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_models_are_the_base_and_every_router_with_what_identifies_it(client, routers):
    listed = {each["id"]: each["digest"] for each in client.get("/v1/models").json()["data"]}
    assert listed == {"base": None, **{name: icr.digest() for name, icr in routers.items()}}
    assert client.get("/v1/models/tickets").json()["id"] == "tickets"


def test_under_load_every_answer_is_its_lone_run(client, running, lone_answers):
    asked = [(name, prompt) for name in NAMES for prompt in PROMPTS] * 12

    def ask(place):
        name, prompt = asked[place]
        text, shares = lone_answers[name, prompt]
        # Texts, streams and labels at once.
        if place % 3 == 0:
            body = {"model": name, "prompts": [prompt], "options": OPTIONS}
            (answer,) = client.post("/v1/classify", json=body).json()["data"]
            return list(answer["probabilities"].values()) == pytest.approx(shares, abs=1e-4)
        if place % 3 == 1:
            pieces = events(complete(client, name, prompt, stream=True).text)
            return "".join(piece["choices"][0]["text"] for piece in pieces) == text
        return complete(client, name, prompt).json()["choices"][0]["text"] == text

    with ThreadPoolExecutor(12) as pool:
        is_right = list(pool.map(ask, range(len(asked))))
    assert is_right.count(False) == 0
    # They were run together, and not one by one.
    counts = client.get("/metrics").text
    n_batches = float(counts.split('icr_batch_requests_count{kind="completion"} ')[1].split()[0])
    assert n_batches < 96


def test_several_prompts_of_one_request_are_answered_in_their_order(client, lone_answers):
    choices = complete(client, "reviews", PROMPTS).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for prompt, choice in zip(PROMPTS, choices, strict=True):
        assert choice["text"] == lone_answers["reviews", prompt][0]


def test_usage_counts_tokens(client, talking):
    usage = complete(client, "base", PROMPTS[0]).json()["usage"]
    n_prompt = len(talking(PROMPTS[0]).input_ids)
    assert usage == {
        "prompt_tokens": n_prompt,
        "completion_tokens": 12,
        "total_tokens": n_prompt + 12,
    }


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(client, lone_answers):
    text = lone_answers["tickets", PROMPTS[0]][0]
    stop = text[4:6]
    choice = complete(client, "tickets", PROMPTS[0], stop=stop).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    pieces = events(complete(client, "tickets", PROMPTS[0], stop=[stop], stream=True).text)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text[: text.index(stop)]


def test_openais_client_works_unchanged(running, lone_answers, model, talking):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        assert [each.id for each in client.models.list()] == list(NAMES)
        text = lone_answers["tickets", PROMPTS[1]][0]
        whole = client.completions.create(model="tickets", prompt=PROMPTS[1], max_tokens=12)
        assert whole.choices[0].text == text
        stream = client.completions.create(
            model="tickets", prompt=PROMPTS[1], max_tokens=12, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == text
        turns = [{"role": "user", "content": "Is it good?"}]
        rendered = talking.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model_alone(running, "base", model, rendered)
        expected = talking.decode(tokens, skip_special_tokens=True)
        chat = client.chat.completions.create(model="base", messages=turns, max_tokens=8)
        assert chat.choices[0].message.content == expected
        chunks = list(
            client.chat.completions.create(
                model="base",
                messages=turns,
                max_completion_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == expected
        assert chunks[-1].usage.completion_tokens == 8
        with pytest.raises(openai.NotFoundError, match="base, tickets, reviews"):
            client.completions.create(model="ticket", prompt="x")


def model_alone(running, name, model, inputs):
    with running.service.several.rows([name]):
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :]


def test_rows_of_a_known_task_get_label_probability_and_status(client, running):
    rows = [{"text": "good plot"}, {"text": "dull"}, {"name": "no text"}]
    answers = client.post("/v1/classify", json={"model": "tickets", "rows": rows}).json()["data"]
    expected = running.service.several.predict(rows, "tickets")
    for answer, prediction in zip(answers, expected, strict=True):
        assert (answer["label"], answer["status"]) == (prediction.label, prediction.status)
    assert [answer["status"].partition(":")[0] for answer in answers] == [
        *("routed", "routed"),
        "malformed",
    ]


@pytest.mark.parametrize(
    ("path", "body", "status", "why"),
    [
        ("completions", {"model": "ticket", "prompt": "x"}, 404, "there are base, tickets"),
        ("completions", {"model": "base"}, 400, "prompt: Field required"),
        ("completions", {"model": "base", "prompt": "x", "best_of": 2}, 400, "best_of: Extra"),
        ("completions", {"model": "base", "prompt": "x", "temperature": 0.7}, 400, "greedy"),
        ("completions", {"model": "base", "prompt": "x", "n": 2}, 400, "n must be 1"),
        ("completions", {"model": "base", "prompt": "x", "max_tokens": 41}, 400, "40 or less"),
        ("completions", {"model": "base", "prompt": "joy " * 505}, 400, "asks for 16 more"),
        ("completions", {"model": "base", "prompt": "joy " * 4000}, 400, "context of 512"),
        ("completions", {"model": "base", "prompt": "x " * 20_000}, 413, "20,000 bytes"),
        ("classify", {"model": "tickets", "rows": [{"text": "x"}] * 21}, 400, "20 rows or"),
        ("classify", {"model": "base", "rows": [{"text": "x"}]}, 400, "name a router"),
        ("classify", {"model": "tickets", "rows": [{"text": "x"}], "task": "none"}, 400, "none"),
        ("classify", {"model": "tickets"}, 400, "rows of a task"),
        (
            "classify",
            {"model": "base", "prompts": ["x"], "options": ["joy", "joy ride"]},
            400,
            "label_scoring",
        ),
        ("chat/completions", {"model": "base", "messages": []}, 400, "messages"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_line(path, body, status, why, client):
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert why in message
    assert "\n" not in message


def test_a_body_that_is_no_json_is_refused(client):
    response = client.post(
        "/v1/completions", content="{oops", headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert "no JSON" in response.json()["error"]["message"]


def test_a_body_of_unknown_length_is_counted_as_it_comes(client):
    def chunks():
        for _ in range(50):
            yield b" " * 1000

    response = client.post(
        "/v1/completions", content=chunks(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413


def test_a_path_that_is_not_there_is_told_in_the_same_shape(client):
    response = client.get("/v1/nothing")
    assert response.status_code == 404
    assert "/v1/nothing" in response.json()["error"]["message"]


def test_a_client_that_goes_away_frees_its_row_and_the_others_are_unharmed(
    running, client, lone_answers
):
    before = client.get("/metrics").text
    body = {"model": "tickets", "prompt": PROMPTS[0], "max_tokens": 40, "stream": True}
    with httpx2.Client(base_url=running.url, timeout=60) as leaving, ThreadPoolExecutor(2) as pool:
        with leaving.stream("POST", "/v1/completions", json=body) as response:
            other = pool.submit(complete, client, "reviews", PROMPTS[1])
            next(response.iter_lines())
        text, _ = lone_answers["reviews", PROMPTS[1]]
        assert other.result().json()["choices"][0]["text"] == text
    assert "icr_tokens_total" in before
    # Nobody waits any longer.
    assert complete(client, "base", "ball").status_code == 200
    assert "icr_queue_requests 0.0" in client.get("/metrics").text


@contextmanager
def alone(talking, limits, **how):
    """A server of its own, as one model is held by one attachment, and a client of it."""
    other = tiny.model("llama", seed=1)
    icr = InContextRouter.fit(other, talking, [TASK], small_fit(), gate=False)
    with (
        attach({"a": icr}, other, talking) as several,
        Running(several, {}, limits, **how) as it,
        httpx2.Client(base_url=it.url, timeout=60) as client,
    ):
        yield several, client


def test_with_a_key_only_those_who_name_it_are_answered(talking):
    with alone(talking, LIMITS, api_key="open") as (_, client):
        assert client.get("/v1/models").status_code == 401
        assert client.get("/healthz").status_code == 200
        wrong = {"Authorization": "Bearer shut"}
        assert client.get("/v1/models", headers=wrong).status_code == 401
        right = {"Authorization": "Bearer open"}
        assert client.get("/v1/models", headers=right).status_code == 200
        counts = client.get("/metrics", headers=right).text
        assert 'path="/v1/models",status="401"' in counts


def test_a_full_queue_says_when_to_come_again(talking):
    limits = replace(LIMITS, max_queue=2, max_batch=1)
    with alone(talking, limits) as (several, client), ThreadPoolExecutor(8) as pool:
        # The engine stands still while somebody else holds the model.
        with several.rows(["base"]):
            waiting = [pool.submit(complete, client, "a", "ball") for _ in range(6)]
            while sum(each.done() for each in waiting) < 3:
                time.sleep(0.01)
            refused = [each.result() for each in waiting if each.done()]
        assert {each.status_code for each in refused} == {429}
        assert {each.headers["retry-after"] for each in refused} == {"1"}
        statuses = [each.result().status_code for each in waiting]
        assert statuses.count(200) == 3


def test_a_request_that_waits_too_long_is_given_up(talking):
    with alone(talking, replace(LIMITS, timeout=0.5)) as (several, client):
        with several.rows(["base"]):
            response = complete(client, "a", "ball")
        assert response.status_code == 504
        assert complete(client, "a", "ball").status_code == 200


def test_the_models_dtype_and_gradients_are_as_they_were(model, running):
    assert not any(
        weight.requires_grad and weight.grad is not None for weight in model.parameters()
    )
    assert next(model.parameters()).dtype == torch.float32
