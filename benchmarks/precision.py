"""Does routing lose in bfloat16 what the model itself does not? Would other columns help?

    python -m benchmarks.precision --data DATA --out runs/precision

On SmolLM2-135M with the published router: option logits of the twelve tasks in float32 and in
bfloat16, unrouted and routed, with the widened columns held in several ways. Each way is tried
twice: in the bfloat16 model, and alone, in a float32 model whose columns are the only thing that is
rounded. Only the late third runs per way. Killed and started again, it goes on. A processor without
bfloat16 products is slow at them, so a product of two bfloat16 matrices is computed in float32 and
rounded once, which is what hardware with such products does.
"""

import argparse
import json
import time
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
from icrouting.routing.attach import attach
from icrouting.routing.attachment import RoutedLayer
from icrouting.routing.router import Routing
from icrouting.runtime.storage import save_json
from icrouting.tasks.catalogue import PAPER_TASKS
from icrouting.tasks.load import load_task

ROUTER = Path(__file__).parents[1] / "routers" / "smollm2-135m"
# Of a batch, in tokens.
TOKEN_BUDGET = 2048


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


# The run that the others are held against.
EXACT = "float32, routed"
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
        layer.z_key = layer.key_directions.project(layer.states.take("key"))[:, None]
        parts = torch.cat(way(layer.z_key, layer.z_key)[1], -1)
        # The attention function cuts off as many columns as the rank says.
        layer.rank = parts.shape[-1]
        columns = parts.to(key.dtype).expand(-1, key.shape[1], -1, -1)
        return torch.cat([key, columns], -1), torch.nn.functional.pad(value, (0, layer.rank))

    def widen_queries(layer, query, weights, first_biased=None):
        assert first_biased is None, "measured where every token gets the bias"
        columns = layer.query_directions.project(layer.states.take("query"))[:, None] * weights
        if spreads is not None:
            # The weights are divided by the model's scaling of logits, which comes back here.
            bias = query.shape[-1] ** -0.5 * columns @ layer.z_key.mT
            size = bias.square().mean().sqrt()
            spread = bias.std(-1).square().mean().sqrt()
            spreads.append((size.item(), spread.item()))
        parts = torch.cat(way(columns, layer.z_key)[0], -1)
        return torch.cat([query, parts.to(query.dtype)], -1)

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
        wide_bias = None if bias is None else bias.float()
        return linear(states.float(), weight.float(), wide_bias).to(states.dtype)

    with mock.patch.object(torch.nn.functional, "linear", product):
        yield


def ways_of(dtype):
    """Every run of one dtype: its name, and how columns are held; None is unrouted."""
    if dtype == torch.float32:
        runs = {"float32, unrouted": None, EXACT: exact}
        prefix = "float32, columns alone"
    else:
        runs = {"bfloat16, unrouted": None}
        prefix = "bfloat16, routed"
    for way, (function, _) in WAYS.items():
        runs[f"{prefix}: {way}"] = function
    return runs


@torch.no_grad()
def score(model, tokenizer, icr, task, indices, runs, spreads):
    """Option logits of a task's items, [n_options] each, by run and item; the trunk runs once."""
    first_layer = icr.pids.layers[0]
    pad_id = pad_id_of(tokenizer)
    texts = []
    ids_by_row = []
    for index in indices:
        example = task.test[index]
        text = task.prompt(example)
        texts.append(text)
        ids_by_row.append(option_ids(tokenizer, text, task.options(example)))
    token_lists = tokenize(tokenizer, texts)
    with icr.attached(model, tokenizer, gate=False) as routed:
        routing = routed.routing(texts)
    states = run_trunk(Decoder.of(model, tokenizer), token_lists, first_layer)
    option_logits = {}
    for name, way in runs.items():
        for rows in by_length(token_lists, TOKEN_BUDGET):
            batch = pad_states([states[row] for row in rows], pad_id)
            with ExitStack() as stack:
                if way is not None:
                    measured = spreads if name == EXACT else None
                    stack.enter_context(columns_held(way, measured))
                    attachment = stack.enter_context(attach(model, icr.pids))
                    attachment.routing = Routing(
                        routing.routing_vector[rows], routing.head_gates[rows]
                    )
                entry = stack.enter_context(late_entry(model, first_layer))
                logits = entry(*batch)
            for place, row in enumerate(rows):
                option_logits[name, indices[row]] = logits[place][ids_by_row[row]]
    return option_logits


def as_records(tokenizer, task, logits_by_item, seconds):
    """Records of option logits by run and item."""
    new_records = []
    for (name, index), logits in logits_by_item.items():
        example = task.test[index]
        record = records.Record(
            method=name,
            task=task.name,
            seed=0,
            index=index,
            label=example.label,
            prediction=int(logits.argmax()),
            option_logits=tuple(logits.tolist()),
            n_tokens=len(tokenizer(task.prompt(example)).input_ids),
            seconds=seconds,
        )
        new_records.append(record)
    return new_records


def run(data: Path, out: Path, n_items: int) -> None:
    file = out / "records.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    icr = InContextRouter.from_pretrained(ROUTER)
    tasks = [load_task(name, str(data)) for name in PAPER_TASKS]
    for dtype in (torch.float32, torch.bfloat16):
        done = {record.key for record in records.read(file)}
        runs = ways_of(dtype)
        model, tokenizer = load_model("pinned:smollm2-135m", dtype=dtype, device="cpu")
        for task in tasks:
            items = []
            for index in draw_items(task, n_items):
                if not all((name, task.name, 0, index) in done for name in runs):
                    items.append(index)
            if not items:
                continue
            started = time.monotonic()
            spreads = []
            with products_in_float32():
                logits_by_item = score(model, tokenizer, icr, task, items, runs, spreads)
            seconds = (time.monotonic() - started) / len(logits_by_item)
            records.append(file, as_records(tokenizer, task, logits_by_item, seconds))
            with (out / "bias.jsonl").open("a") as stream:
                stream.writelines(json.dumps(pair) + "\n" for pair in spreads)
            print(f"{dtype} {task.name}: {time.monotonic() - started:.0f} s", flush=True)
    tabulate(out)


def errors(lines, reference):
    """What each item's option logits are off by: the root of the mean square, in nats.

    A shift of all options alike changes no answer, so logits are taken less their mean.
    """
    reference_logits = dict(zip(reference["item"], reference.option_logits, strict=True))
    off = []
    for item, logits in zip(lines["item"], lines.option_logits, strict=True):
        off.append(np.std(np.array(logits) - np.array(reference_logits[item])))
    return np.array(off)


def root_mean_square(values, axis=None):
    return np.sqrt((values**2).mean(axis))


def row_of(lines, reference, unrouted, resampled) -> dict:
    """One run's error, agreement, accuracy and McNemar's test against its float32 run.

    `unrouted` are the errors of the bfloat16 model itself, `resampled` the bootstrap's rows.
    """
    off = errors(lines, reference)
    ratios = root_mean_square(off[resampled], 1) / root_mean_square(unrouted[resampled], 1)
    change = metrics.paired(lines, reference).change
    is_same = lines.prediction.to_numpy() == reference.prediction.to_numpy()
    accuracy_by_task = {}
    for task, part in lines.groupby("task", sort=False):
        accuracy_by_task[task] = round(100 * float(part.right.mean()), 1)
    return {
        "error": round(float(root_mean_square(off)), 5),
        "times unrouted": [round(float(end), 3) for end in np.percentile(ratios, [50, 2.5, 97.5])],
        "same prediction": int(is_same.sum()),
        "accuracy": round(100 * metrics.accuracy(lines).value, 2),
        "won, lost": [int((change == sign).sum()) for sign in (1, -1)],
        "mcnemar p": round(metrics.mcnemar(lines, reference), 3),
        "accuracy by task": accuracy_by_task,
    }


def tabulate(out: Path) -> None:
    """Writes, for every run, its error against float32, agreement, accuracy and McNemar's test."""
    lines = metrics.frame(records.read(out / "records.jsonl"))
    lines = lines.sort_values(["task", "index"], kind="stable")
    lines_by_run = dict(list(lines.groupby("method", sort=False)))
    rng = np.random.default_rng(0)
    unrouted = errors(lines_by_run["bfloat16, unrouted"], lines_by_run["float32, unrouted"])
    resampled = rng.integers(len(unrouted), size=(2000, len(unrouted)))
    rows = {}
    for name, run_lines in lines_by_run.items():
        reference_name = "float32, unrouted" if "unrouted" in str(name) else EXACT
        reference = lines_by_run[reference_name]
        rows[name] = row_of(run_lines, reference, unrouted, resampled)
    pairs = [json.loads(line) for line in (out / "bias.jsonl").read_text().splitlines()]
    size, spread = root_mean_square(np.array(pairs), 0)
    content = {
        "command": "python -m benchmarks.precision --data DATA",
        "commit": commit(),
        "items": len(unrouted),
        "bias": {
            "root mean square": round(float(size), 3),
            "spread over the keys": round(float(spread), 3),
        },
        "columns": {way: n_parts for way, (_, n_parts) in WAYS.items()},
        "rows": rows,
    }
    save_json(out / "table.json", content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the twelve data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--items", type=int, default=24, help="test items per task")
    arguments = parser.parse_args()
    run(arguments.data, arguments.out, arguments.items)
