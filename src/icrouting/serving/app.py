"""The app: paths, statuses and streams; what they ask is done by the engine."""

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from icrouting.decoder.texts import prompts_of
from icrouting.routing.predictions import Prediction
from icrouting.serving.around import BodyLimit, Doorman
from icrouting.serving.engine import Engine
from icrouting.serving.jobs import Answer, Classification, Completion, Job, Piece, Refused, Scoring
from icrouting.serving.limits import Limits
from icrouting.serving.messages import (
    ChatAsked,
    ClassifyAsked,
    CompletionAsked,
    Generated,
    failure,
    usage,
)
from icrouting.serving.metrics import Metrics
from icrouting.several import BASE, Several

# How often it is looked whether a client has gone.
LOOK_SECONDS = 0.1


class Service:
    """What answers requests: the engine, and what is known before it is asked.

    Args:
        several: the model with its routers.
        limits: what is taken.
        digests: what identifies each router, by its name.
    """

    def __init__(self, several: Several, limits: Limits, digests: Mapping[str, str]):
        self.several = several
        self.limits = limits
        self.metrics = Metrics()
        self.engine = Engine(several, limits, self.metrics)
        self.started = int(time.time())
        self._digests = digests

    def models(self) -> list[dict[str, Any]]:
        """Returns the base model and every router, as they were loaded."""
        base = self.several.reader.decoder.model.config.name_or_path
        listed = []
        for name in self.several.names:
            listed.append(
                {
                    "id": name,
                    "object": "model",
                    "created": self.started,
                    "owned_by": "icrouting",
                    "base_model": str(base),
                    "digest": self._digests.get(name),
                }
            )
        return listed

    def check_name(self, name: str) -> None:
        """Refuses a name that is no model's."""
        if name not in self.several.names:
            raise Refused(
                404,
                f"no model {name!r} here: there are {', '.join(self.several.names)}",
                "model_not_found",
            )

    def tokens_of(self, text: str, max_tokens: int) -> list[int]:
        """Returns a prompt's tokens; refuses one for which there is no room."""
        if max_tokens > self.limits.max_tokens:
            raise Refused(
                400,
                f"max_tokens must be {self.limits.max_tokens} or less here, got {max_tokens}",
                "max_tokens_exceeded",
            )
        decoder = self.several.reader.decoder
        try:
            (tokens,) = decoder.tokenize([text])
        except ValueError as error:
            message = " ".join(str(error).split())
            raise Refused(400, message, "context_length_exceeded") from error
        longest = decoder.context_length
        if longest is not None and len(tokens) + max_tokens > longest:
            raise Refused(
                400,
                f"the prompt has {len(tokens)} tokens and asks for {max_tokens} more, the model "
                f"takes {longest} in all: shorten it",
                "context_length_exceeded",
            )
        return tokens

    def text_of(self, conversation: list[dict[str, str]]) -> str:
        """Returns a conversation in the words of the model's chat template."""
        (prompt,) = prompts_of([conversation], self.several.reader.decoder.tokenizer)
        return prompt.text

    def check_rows(self, n_rows: int) -> None:
        """Refuses more rows than a request may have."""
        if n_rows > self.limits.max_rows:
            raise Refused(
                400,
                f"a request may have {self.limits.max_rows} rows or prompts, got {n_rows}: send "
                "several, or use `icr predict` for a file",
                "too_many_rows",
            )


class Waiting:
    """The parts of answers to one request, as they come from the engine's thread."""

    def __init__(self, limits: Limits):
        self.deadline = time.monotonic() + limits.timeout
        self.jobs: list[Job] = []
        self._parts: list[asyncio.Queue[Answer]] = []
        self._loop = asyncio.get_running_loop()
        self._looks_at = time.monotonic() + LOOK_SECONDS

    def sender(self) -> Callable[[Answer], None]:
        """Returns what the next job is to hand its parts to."""
        parts: asyncio.Queue[Answer] = asyncio.Queue()
        self._parts.append(parts)

        def send(part: Answer) -> None:
            self._loop.call_soon_threadsafe(parts.put_nowait, part)

        return send

    async def part(self, place: int, request: Request) -> Any:
        """Returns the next part of a job's answer.

        Raises:
            Refused: there is none in time, the client has gone, or the job was refused.
        """
        while True:
            now = time.monotonic()
            if now >= self.deadline:
                raise Refused(504, "the answer took too long, and was given up", "timeout")
            if now >= self._looks_at:
                self._looks_at = now + LOOK_SECONDS
                if await request.is_disconnected():
                    raise Refused(499, "the client has gone", "client_gone")
            wait = min(self._looks_at, self.deadline) - now
            try:
                part = await asyncio.wait_for(self._parts[place].get(), wait)
            except TimeoutError:
                continue
            if isinstance(part, Refused):
                raise part
            if isinstance(part, ValueError | TypeError):
                raise Refused(400, " ".join(str(part).split()), "bad_request") from part
            if isinstance(part, BaseException):
                raise part
            return part

    def leave(self) -> None:
        """Says that nobody waits any longer."""
        for job in self.jobs:
            job.gone.set()


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """Returns the app that answers for a service.

    Args:
        service: what it asks.
        api_key: what requests have to name in their `Authorization` header; None asks for nothing.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        # What was taken is answered before the model is let go.
        await asyncio.to_thread(service.engine.close)

    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="icrouting", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_paths(app, service)
    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(BodyLimit, max_body=service.limits.max_body)
    # Added last, so that it stands outermost.
    app.add_middleware(Doorman, metrics=service.metrics, api_key=api_key, paths=paths)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        body = failure(error.message, error.status, error.code)
        return JSONResponse(body, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(failure(_in_a_line(error), 400, "invalid_request"), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        body = failure(f"{request.url.path}: {error.detail}", error.status_code, "")
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        # What went wrong inside is for the log, and not for whoever asks.
        return JSONResponse(failure("the model failed on this request", 500, "internal"), 500)


def _in_a_line(error: RequestValidationError) -> str:
    """Returns what is wrong with a body, and where."""
    sentences = []
    for each in error.errors()[:3]:
        if each["type"] == "json_invalid":
            return "the body is no JSON: " + str(each.get("ctx", {}).get("error", each["msg"]))
        place = ".".join(str(part) for part in each["loc"] if part != "body")
        message = each["msg"].removeprefix("Value error, ")
        sentences.append(f"{place}: {message}" if place else message)
    return "; ".join(sentences)


def _add_paths(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        is_alive = service.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else "down"}, 200 if is_alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return next(each for each in service.models() if each["id"] == name)

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked, request: Request) -> Response:
        service.check_rows(len(asked.prompts))
        shape = Shape("text_completion", "cmpl", asked)
        return await _generated(service, asked.prompts, asked.max_tokens, shape, request)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Response:
        service.check_name(asked.model)
        try:
            text = service.text_of(asked.conversation)
        except ValueError as error:
            raise Refused(400, " ".join(str(error).split()), "no_chat") from error
        shape = Shape("chat.completion", "chatcmpl", asked)
        return await _generated(service, [text], asked.most_tokens, shape, request)

    @app.post("/v1/classify")
    async def classify(asked: ClassifyAsked, request: Request) -> dict[str, Any]:
        return await _classified(service, asked, request)


class Shape:
    """How the answer to one request is written, in one piece or in a stream."""

    def __init__(self, kind: str, prefix: str, asked: Generated):
        self.asked = asked
        self.is_chat = kind.startswith("chat")
        self._kind = kind
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }

    def whole(self, texts: Sequence[Piece], n_prompt: int) -> dict[str, Any]:
        """Returns the answer in one piece."""
        choices = []
        for index, text in enumerate(texts):
            choice: dict[str, Any] = {"index": index, "finish_reason": text.finish_reason}
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": text.text}
            else:
                choice["text"] = text.text
            choices.append(choice | {"logprobs": None})
        n_generated = sum(text.n_tokens for text in texts)
        counts = usage(n_prompt, n_generated)
        return {**self._head, "object": self._kind, "choices": choices, "usage": counts}

    def chunk(self, index: int, piece: Piece, is_first: bool) -> str:
        """Returns a part of a stream."""
        choice: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason}
        if self.is_chat:
            choice["delta"] = {"content": piece.text}
            if is_first:
                choice["delta"]["role"] = "assistant"
        else:
            choice["text"] = piece.text
        return self._event([choice | {"logprobs": None}])

    def counted(self, n_prompt: int, n_generated: int) -> str:
        """Returns the part of a stream that holds the number of tokens."""
        return self._event([], usage=usage(n_prompt, n_generated))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = f"{self._kind}.chunk" if self.is_chat else self._kind
        body = {**self._head, "object": kind, "choices": choices, **more}
        return f"data: {json.dumps(body)}\n\n"


async def _generated(
    service: Service, texts: Sequence[str], max_tokens: int, shape: Shape, request: Request
) -> Response:
    """Answers a request for texts."""
    asked = shape.asked
    service.check_name(asked.model)
    request.state.model = asked.model
    waiting = Waiting(service.limits)
    token_lists = [service.tokens_of(text, max_tokens) for text in texts]
    jobs = []
    for tokens in token_lists:
        job = Completion(asked.model, waiting.sender(), waiting.deadline)
        job.tokens = tokens
        job.max_tokens = max_tokens
        job.stop = asked.stops
        jobs.append(job)
    waiting.jobs.extend(jobs)
    service.engine.submit(jobs)
    n_prompt = sum(map(len, token_lists))
    if asked.stream:
        stream = _streamed(service, waiting, shape, n_prompt, request)
        return StreamingResponse(stream, media_type="text/event-stream")
    try:
        whole = []
        for place in range(len(jobs)):
            whole.append(await _whole(waiting, place, request))
    finally:
        waiting.leave()
    service.metrics.tokens(sum(text.n_tokens for text in whole))
    return JSONResponse(shape.whole(whole, n_prompt))


async def _whole(waiting: Waiting, place: int, request: Request) -> Piece:
    """Returns all parts of one text as one."""
    text = ""
    n_tokens = 0
    while True:
        piece = await waiting.part(place, request)
        text += piece.text
        n_tokens += piece.n_tokens
        if piece.finish_reason is not None:
            return Piece(text, n_tokens, piece.finish_reason)


async def _streamed(
    service: Service, waiting: Waiting, shape: Shape, n_prompt: int, request: Request
) -> AsyncIterator[str]:
    """Yields a stream's events; a client that goes away ends it, and its rows with it."""
    n_generated = 0
    try:
        # The texts of one request one behind the other, as each may be long.
        for place in range(len(waiting.jobs)):
            is_first = True
            while True:
                piece = await waiting.part(place, request)
                n_generated += piece.n_tokens
                yield shape.chunk(place, piece, is_first)
                is_first = False
                if piece.finish_reason is not None:
                    break
        if shape.asked.wants_usage:
            yield shape.counted(n_prompt, n_generated)
        yield "data: [DONE]\n\n"
    except Refused as refusal:
        body = failure(refusal.message, refusal.status, refusal.code)
        yield f"data: {json.dumps(body)}\n\n"
    finally:
        waiting.leave()
        service.metrics.tokens(n_generated)


async def _classified(service: Service, asked: ClassifyAsked, request: Request) -> dict[str, Any]:
    """Answers a request for labels."""
    service.check_name(asked.model)
    request.state.model = asked.model
    waiting = Waiting(service.limits)
    if asked.rows is not None:
        service.check_rows(len(asked.rows))
        if asked.model == BASE:
            raise Refused(
                400,
                "rows are of a task that a router knows, and the base model knows none: name a "
                "router, or give prompts and options",
                "no_task",
            )
        job: Job = Classification(
            asked.model, waiting.sender(), waiting.deadline, rows=asked.rows, task=asked.task
        )
    else:
        prompts = asked.prompts or []
        service.check_rows(len(prompts))
        for prompt in prompts:
            service.tokens_of(prompt, 1)
        job = Scoring(
            asked.model,
            waiting.sender(),
            waiting.deadline,
            prompts=prompts,
            options=asked.options or [],
        )
    waiting.jobs.append(job)
    service.engine.submit([job])
    try:
        answer = await waiting.part(0, request)
    finally:
        waiting.leave()
    data = []
    for index, each in enumerate(answer):
        data.append({"index": index, **_label_of(each, asked.options)})
    return {"object": "list", "model": asked.model, "data": data}


def _label_of(
    answer: Prediction | Sequence[float], options: Sequence[str] | None
) -> dict[str, Any]:
    """Returns an answer as a request gets it."""
    if isinstance(answer, Prediction):
        return {
            "label": answer.label,
            "probability": answer.probability,
            "probabilities": answer.probabilities,
            "status": answer.status,
        }
    shares = [math.exp(each) for each in answer]
    probabilities = dict(zip(options or [], shares, strict=True))
    label = max(probabilities, key=probabilities.__getitem__)
    return {
        "label": label,
        "probability": probabilities[label],
        "probabilities": probabilities,
        "status": "answered",
    }
