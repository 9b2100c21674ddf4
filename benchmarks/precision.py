"""Does routing lose in bfloat16 what the model itself does not? And would other ways of holding the columns help?

    python benchmarks/precision.py --data DATA --out runs/precision

On SmolLM2-135M with the published router: option logits of the twelve tasks in float32 and in bfloat16, unrouted and
routed, with the widened columns held in several ways. Each way is tried twice: in the bfloat16 model, and alone, in a
float32 model whose columns are the only thing that is rounded. Only the late third runs per way. Killed and started
again, it goes on. A processor without bfloat16 products is slow at them, so a product of two bfloat16 matrices is
computed in float32 and rounded once, which is what hardware with such products does.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from icrouting import InContextRouter
from icrouting.decoder.batches import by_length, pad_id_of, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.loading import load_model
from icrouting.decoder.partial import late_entry
from icrouting.decoder.scoring import option_ids
from icrouting.evaluation import records
from icrouting.evaluation.items import draw_items
from icrouting.evaluation.runs import commit
from icrouting.fitting.trunk import pad_states, run_trunk
from icrouting.report import metrics
from icrouting.routing.attach import RoutedLayer, attach
from icrouting.routing.router import Routing
from icrouting.runtime.storage import save_json
from icrouting.tasks.catalogue import PAPER_TASKS
from icrouting.tasks.load import load_task

ROUTER = Path(__file__).parents[1] / "routers" / "smollm2-135m"
LENGTHS = 2048


def rounded(columns):
    """Columns as bfloat16 holds them, and what it leaves over, held likewise."""
    high = columns.bfloat16()
    return high.float(), (columns - high.float()).bfloat16().float()


def cast(query, key):
    return rounded(query)[:1], rounded(key)[:1]


def split(query, key):
    (q_high, q_low), (k_high, k_low) = rounded(query), rounded(key)
    return (q_high, q_high, q_low), (k_high, k_low, k_high)


def split_keys(query, key):
    high, low = rounded(key)
    return rounded(query)[:1] * 2, (high, low)


def split_queries(query, key):
    return rounded(query), rounded(key)[:1] * 2


def on_first_token(query, key):
    return cast(query, key - key[..., :1, :])


def on_the_mean(query, key):
    return cast(query, key - key.mean(-2, keepdim=True))


def exact(query, key):
    return (query,), (key,)


# Way of holding the columns -> how many times `rank` columns there are.
WAYS = {
    "cast": (cast, 1),
    "split": (split, 3),
    "keys split": (split_keys, 2),
    "queries split": (split_queries, 2),
    "centred on the first token": (on_first_token, 1),
    "centred on the mean": (on_the_mean, 1),
}


@contextmanager
def columns_held(way, spreads=None):
    """Inside, routed layers widen by the columns that `way` makes of those of queries and keys."""

    def widen_cached(layer, key, value):
        layer.z_key = layer.key_directions.project(layer.store["key"])[:, None]
        parts = torch.cat(way(layer.z_key, layer.z_key)[1], -1)
        layer.rank = parts.shape[-1]  # the attention function cuts off as many
        columns = parts.to(key.dtype).expand(-1, key.shape[1], -1, -1)
        return torch.cat([key, columns], -1), torch.nn.functional.pad(value, (0, layer.rank))

    def widen_queries(layer, query, weights):
        columns = layer.query_directions.project(layer.store["query"])[:, None] * weights
        if spreads is not None:  # the model's scaling of logits, which the weights are divided by
            bias = query.shape[-1] ** -0.5 * columns @ layer.z_key.mT
            spreads.append(
                (bias.square().mean().sqrt().item(), bias.std(-1).square().mean().sqrt().item())
            )
        return torch.cat([query, torch.cat(way(columns, layer.z_key)[0], -1).to(query.dtype)], -1)

    with (
        mock.patch.object(RoutedLayer, "widen_cached", widen_cached),
        mock.patch.object(RoutedLayer, "widen_queries", widen_queries),
    ):
        yield


@contextmanager
def products_in_float32():
    """Inside, a linear layer in bfloat16 multiplies in float32 and rounds once."""
    linear = torch.nn.functional.linear

    def product(states, weight, bias=None):
        wide = linear(states.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(states.dtype)

    with mock.patch.object(torch.nn.functional, "linear", product):
        yield


def ways_of(dtype):
    """Every run of one dtype: its name, and how columns are held; None is unrouted."""
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    runs: dict[str, Callable | None] = {f"{name}, unrouted": None}
    if dtype == torch.float32:
        runs["float32, routed"] = exact
    more = "float32, columns alone: " if dtype == torch.float32 else "bfloat16, routed: "
    return runs | {more + way: function for way, (function, _) in WAYS.items()}


@torch.no_grad()
def score(model, tokenizer, icr, task, indices, runs, spreads):
    """Option logits of a task's items, [n_options] each, by run and item; the trunk runs once."""
    examples, first, pad_id = (
        [task.test[index] for index in indices],
        icr.pids.layers[0],
        pad_id_of(tokenizer),
    )
    texts = [task.prompt(example) for example in examples]
    ids = [
        option_ids(tokenizer, text, task.options(e))
        for text, e in zip(texts, examples, strict=True)
    ]
    token_lists = tokenize(tokenizer, texts)
    with icr.attached(model, tokenizer) as routed:
        routing = routed.routing(texts)
    states, found = run_trunk(Decoder.of(model, tokenizer), token_lists, first), {}
    for name, way in runs.items():
        for rows in by_length(token_lists, LENGTHS):
            with ExitStack() as stack:
                if way is not None:
                    stack.enter_context(
                        columns_held(way, spreads if name == "float32, routed" else None)
                    )
                    attachment = stack.enter_context(attach(model, icr.pids))
                    attachment.routing = Routing(
                        routing.routing_vector[rows], routing.head_gates[rows]
                    )
                entry = stack.enter_context(late_entry(model, first))
                logits = entry(*pad_states([states[row] for row in rows], pad_id))
            found |= {
                (name, indices[row]): logits[place][ids[row]] for place, row in enumerate(rows)
            }
    return found


def as_records(tokenizer, task, found, seconds):
    """Records of option logits by run and item."""
    made = []
    for (name, index), logits in found.items():
        example, options = task.test[index], tuple(logits.tolist())
        n_tokens = len(tokenizer(task.prompt(example)).input_ids)
        made.append(
            records.Record(
                name,
                task.name,
                0,
                index,
                example.label,
                int(logits.argmax()),
                options,
                n_tokens,
                seconds,
            )
        )
    return made


def run(data: Path, out: Path, n_items: int) -> None:
    file, sizes = out / "records.jsonl", out / "bias.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    icr = InContextRouter.from_pretrained(ROUTER)
    tasks = [load_task(name, str(data)) for name in PAPER_TASKS]
    for dtype in (torch.float32, torch.bfloat16):
        done, runs = {record.key for record in records.read(file)}, ways_of(dtype)
        model, tokenizer = load_model("pinned:smollm2-135m", dtype=dtype, device="cpu")
        for task in tasks:
            items = [
                index
                for index in draw_items(task, n_items)
                if not all((name, task.name, 0, index) in done for name in runs)
            ]
            if not items:
                continue
            started, spreads = time.monotonic(), []
            with products_in_float32():
                found = score(model, tokenizer, icr, task, items, runs, spreads)
            records.append(
                file, as_records(tokenizer, task, found, (time.monotonic() - started) / len(found))
            )
            with sizes.open("a") as stream:
                stream.writelines(json.dumps(pair) + "\n" for pair in spreads)
            print(f"{dtype} {task.name}: {time.monotonic() - started:.0f} s", flush=True)
    tabulate(out)


def errors(of, reference):
    """What each item's option logits, less their mean, are off by: the root of the mean square, in nats."""
    logits = dict(zip(reference["item"], reference.option_logits, strict=True))
    pairs = [
        (np.array(o), np.array(logits[item]))
        for item, o in zip(of["item"], of.option_logits, strict=True)
    ]
    return np.array([np.std(ours - theirs) for ours, theirs in pairs])


def tabulate(out: Path) -> None:
    """Writes, for every run, its error against float32, agreement, accuracy and McNemar's test."""
    lines = metrics.frame(records.read(out / "records.jsonl")).sort_values(
        ["task", "index"], kind="stable"
    )
    by_run, rng = dict(list(lines.groupby("method", sort=False))), np.random.default_rng(0)
    unrouted = errors(by_run["bfloat16, unrouted"], by_run["float32, unrouted"])
    resampled = rng.integers(len(unrouted), size=(2000, len(unrouted)))
    rows = {}
    for name, found in by_run.items():
        reference = by_run["float32, unrouted" if "unrouted" in str(name) else "float32, routed"]
        off = errors(found, reference)
        ratios = np.sqrt((off**2)[resampled].mean(1) / (unrouted**2)[resampled].mean(1))
        rows[name] = {
            "error": round(float(np.sqrt((off**2).mean())), 5),
            "times unrouted": [
                round(float(end), 3) for end in np.percentile(ratios, [50, 2.5, 97.5])
            ],
            "same prediction": int(
                (found.prediction.to_numpy() == reference.prediction.to_numpy()).sum()
            ),
            "accuracy": round(100 * metrics.accuracy(found).value, 2),
            "won, lost": [
                int((metrics.paired(found, reference).change == sign).sum()) for sign in (1, -1)
            ],
            "mcnemar p": round(metrics.mcnemar(found, reference), 3),
            "accuracy by task": {
                task: round(100 * float(part.right.mean()), 1)
                for task, part in found.groupby("task", sort=False)
            },
        }
    pairs = [json.loads(line) for line in (out / "bias.jsonl").read_text().splitlines()]
    whole, spread = np.sqrt(np.square(pairs).mean(0))
    about = {
        "command": "python benchmarks/precision.py --data DATA",
        "commit": commit(),
        "items": len(unrouted),
    }
    about["bias"] = {
        "root mean square": round(float(whole), 3),
        "spread over the keys": round(float(spread), 3),
    }
    save_json(
        out / "table.json",
        {**about, "columns": {way: n for way, (_, n) in WAYS.items()}, "rows": rows},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the twelve data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--items", type=int, default=24, help="test items per task")
    arguments = parser.parse_args()
    run(arguments.data, arguments.out, arguments.items)
