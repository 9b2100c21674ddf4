"""Does each request get its own router's answer under load, and what does routing cost a server?

    python -m benchmarks.serving --routers one=FOLDER two=FOLDER --model pinned:smollm2-135m \\
        --data pinned:staicc --tasks agnews sst2 --out benchmarks/results/serving.json

One server, in a thread of this process, on loopback; so many clients ask at once, each its next
request when it has its answer. "isolation" compares every answer with that of its lone run, made
before: labels of prompts, and greedy texts, of mixed routers, lengths and the base model. "speed"
takes turns: the same prompts all of the routers, and all of the base model.

The generator is our own loop over an HTTP client, since each answer has to be compared.
"""

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx2
import numpy as np
import torch
import uvicorn

from benchmarks.speed_turns import device_name
from icrouting.decoder.loading import load_model
from icrouting.evaluation.runs import commit
from icrouting.icr import InContextRouter
from icrouting.runtime.storage import save_json
from icrouting.serving.app import Service, create_app
from icrouting.serving.limits import Limits
from icrouting.serving.server import listening
from icrouting.several import BASE, Several, attach
from icrouting.tasks.load import load_task

TOKENS = 8


class Server:
    """A server in a thread, and what asks it."""

    def __init__(self, several: Several, clients: int):
        self._socket = listening("127.0.0.1", 0)
        url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.service = Service(several, Limits(timeout=600), {})
        config = uvicorn.Config(create_app(self.service), log_level="error", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        limits = httpx2.Limits(max_connections=clients)
        self._client = httpx2.Client(base_url=url, timeout=600, limits=limits)
        self._n_clients = clients

    def __enter__(self) -> "Server":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error) -> None:
        self._client.close()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def ask(self, requests) -> tuple[list, list[float], float]:
        """Returns the answers to requests, the seconds of each and of all together."""
        started = time.perf_counter()
        with ThreadPoolExecutor(self._n_clients) as pool:
            pairs = list(pool.map(self._one, requests))
        seconds = time.perf_counter() - started
        return [answer for answer, _ in pairs], [each for _, each in pairs], seconds

    def _one(self, request) -> tuple[object, float]:
        name, prompt, options = request
        started = time.perf_counter()
        if options is None:
            body = {"model": name, "prompt": prompt, "max_tokens": TOKENS}
            answer = self._client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        else:
            body = {"model": name, "prompts": [prompt], "options": options}
            (label,) = self._client.post("/v1/classify", json=body).json()["data"]
            answer = list(label["probabilities"].values())
        return answer, time.perf_counter() - started


def lone(several: Several, request) -> object:
    """Returns the answer to one request by itself."""
    name, prompt, options = request
    if options is None:
        (text,) = several.generate([prompt], [name], max_new_tokens=TOKENS, do_sample=False)
        return text
    scores = several.score([prompt], options, [name])
    return scores.double().softmax(1)[0].tolist()


def isolation(several: Several, server: Server, prompts, n_requests: int) -> dict[str, object]:
    """Returns how many answers under load differ from those of their lone runs."""
    distinct = []
    for name in several.names:
        for prompt, options in prompts:
            distinct += [(name, prompt, options), (name, prompt, None)]
    expected = [lone(several, request) for request in distinct]
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(distinct), size=n_requests).tolist()
    answers, _, seconds = server.ask([distinct[place] for place in drawn])
    n_wrong = 0
    largest_gap = 0.0
    for place, answer in zip(drawn, answers, strict=True):
        if isinstance(answer, str):
            n_wrong += answer != expected[place]
            continue
        gaps = np.abs(np.array(answer) - expected[place])
        largest_gap = max(largest_gap, float(gaps.max()))
        n_wrong += int(np.argmax(answer)) != int(np.argmax(expected[place]))
    return {
        "requests": n_requests,
        "distinct": len(distinct),
        "answers that differ": n_wrong,
        "largest difference of a probability": largest_gap,
        "requests a second": n_requests / seconds,
    }


def speed(several: Several, server: Server, prompts, turns: int) -> dict[str, object]:
    """Returns throughput and latency of routed requests beside those of the base model."""
    routers = [name for name in several.names if name != BASE]
    kinds = {}
    for kind in ("classify", "complete"):
        asked = {"routed": [], BASE: []}
        for place, (prompt, options) in enumerate(prompts):
            request_options = options if kind == "classify" else None
            asked["routed"].append((routers[place % len(routers)], prompt, request_options))
            asked[BASE].append((BASE, prompt, request_options))
        measured = {name: [] for name in asked}
        for turn in range(turns + 1):
            for name, requests in asked.items():
                _, latencies, seconds = server.ask(requests)
                # The first turn warms up.
                if turn:
                    p50, p99 = np.quantile(latencies, [0.5, 0.99]).tolist()
                    measured[name].append((len(requests) / seconds, p50, p99))
        ratios = {}
        for column, label in enumerate(("throughput", "p50", "p99")):
            pairs = zip(measured["routed"], measured[BASE], strict=True)
            ratios[label] = [routed[column] / base[column] for routed, base in pairs]
        kinds[kind] = {
            "routed over base": {label: median(values) for label, values in ratios.items()},
            "turns": ratios,
            "base": {
                "requests a second": median(each[0] for each in measured[BASE]),
                "p50": median(each[1] for each in measured[BASE]),
                "p99": median(each[2] for each in measured[BASE]),
            },
        }
    return kinds


def main() -> None:
    """Measures, and writes the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--routers", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--model", default="pinned:smollm2-135m")
    parser.add_argument("--dtype", default="float32", help="bfloat16 rounds batches apart")
    parser.add_argument("--data", default="pinned:staicc")
    parser.add_argument("--tasks", nargs="+", default=["agnews", "sst2"])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=12, help="of each task")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, dtype=getattr(torch, arguments.dtype))
    routers = {}
    for text in arguments.routers:
        name, _, folder = text.partition("=")
        routers[name] = InContextRouter.from_pretrained(folder)
    prompts = []
    for name in arguments.tasks:
        task = load_task(name, arguments.data)
        for row in task.test[: arguments.prompts]:
            prompts.append((task.prompt(row), list(task.options(row))))
    record: dict[str, object] = {
        "commit": commit(),
        "device": device_name(),
        "model": arguments.model,
        "dtype": arguments.dtype,
        "clients": arguments.clients,
        "tokens a text": TOKENS,
        "threads": torch.get_num_threads(),
    }
    with attach(routers, model, tokenizer) as several, Server(several, arguments.clients) as server:
        record["speed"] = speed(several, server, prompts * 4, arguments.turns)
        print(record["speed"], flush=True)
        save_json(arguments.out, record)
        record["isolation"] = isolation(several, server, prompts, arguments.requests)
        print(record["isolation"], flush=True)
        counts = server.service.metrics.text().decode()
        sizes = [line for line in counts.splitlines() if line.startswith("icr_batch_requests_")]
        record["batches"] = [line for line in sizes if "_created" not in line]
        save_json(arguments.out, record)


if __name__ == "__main__":
    main()
