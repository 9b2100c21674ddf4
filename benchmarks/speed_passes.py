"""What a routed pass costs beside a plain one, beside the paper's dense bias, and beside demonstrations."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.speed_turns import Rows, peak_bytes
from icrouting.config import HIDDEN
from icrouting.decoder.batches import pad, tokenize
from icrouting.decoder.families import CACHE, attention_of, device_of, dims_of
from icrouting.decoder.kernels import attention_function
from icrouting.decoder.partial import entering_states
from icrouting.decoder.passes import KeptContext, next_token_logits
from icrouting.decoder.scoring import score_options
from icrouting.fitting.capture import captured
from icrouting.routing.attach import attach
from icrouting.routing.attention import project
from icrouting.routing.features import features_of
from icrouting.routing.pids import PIDs
from icrouting.routing.reader import Reader
from icrouting.routing.rerouting import rerouted
from icrouting.routing.router import Router
from icrouting.tasks.prompts import balanced_demos, few_shot
from icrouting.tasks.task import Task

RANK = 8


@dataclass(frozen=True)
class World:
    """What is measured: a model with random PIDs and routers, which cost what fitted ones cost."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pids: PIDs
    encoder: str
    tasks: list[Task]
    rows: Rows
    lengths: list[int]
    batches: list[int]
    max_tokens: int
    n_items: int

    def shapes(self, is_cut=True) -> Iterator[tuple[int, int, str]]:
        """Batch, length and how a row says so; batches above `max_tokens` are cut, and shapes measured once."""
        asked: dict[tuple[int, int], list[int]] = {}
        for length in self.lengths:
            for batch in self.batches:
                n_rows = min(batch, self.max_tokens // length) if is_cut else batch
                asked.setdefault((n_rows, length), []).append(batch)
        for (n_rows, length), batches in asked.items():
            cut = [str(batch) for batch in batches if batch != n_rows]
            if n_rows:
                yield (
                    n_rows,
                    length,
                    f"{n_rows} x {length}"
                    + (f" (cut from {' and '.join(cut)} rows)" if cut else ""),
                )
            else:
                print(f"left out: {length} tokens are more than --max-tokens {self.max_tokens}")

    def token_lists(self, n_rows: int, length: int) -> list[list[int]]:
        """Windows of the tasks' text, repeated where it is too short."""
        texts = [task.prompt(example) for task in self.tasks for example in task.train[:400]]
        stream = torch.tensor(
            [token for tokens in tokenize(self.tokenizer, texts) for token in tokens]
        )
        return stream[torch.arange(n_rows * length) % len(stream)].view(n_rows, length).tolist()

    def reader(self, model: PreTrainedModel, encoder: str) -> Reader:
        device, first = str(device_of(model)), self.pids.layers[0]
        features, generator = (
            features_of(encoder, model, self.tokenizer, device),
            torch.Generator().manual_seed(0),
        )
        router = Router(
            features.n_features, len(self.pids.layers), dims_of(model).n_heads, RANK, 256, generator
        )
        for weight in router.alpha.parameters():  # untrained, it would add nothing
            weight.data.add_(0.01 * torch.randn(weight.shape, generator=generator))
        return Reader(
            model, self.tokenizer, features, router.requires_grad_(False).to(device), first, 1.0
        )


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the same weights, which can be routed while the first is not."""
    return copy.deepcopy(
        model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    )


@torch.no_grad()
def scoring(world: World) -> None:
    routed, encoded = twin(world.model), twin(world.model)
    readers = world.reader(routed, HIDDEN), world.reader(encoded, world.encoder)
    with rerouted(readers[0], world.pids), rerouted(readers[1], world.pids):
        for n_rows, length, where in world.shapes():
            lists = world.token_lists(n_rows, length)
            batch = pad(lists, 0).to(device_of(world.model))
            calls = {
                "zero-shot": lambda batch=batch: next_token_logits(world.model, batch),
                "routed by the hidden state": lambda batch=batch: next_token_logits(routed, batch),
                "routed by the encoder": lambda batch=batch: next_token_logits(encoded, batch),
            }
            world.rows.measure("scoring", where, calls)


@torch.no_grad()
def reading(world: World) -> None:
    """The router alone, on hidden states that are there, and with the sentence encoder in front."""
    by_hidden, by_encoder = (
        world.reader(world.model, encoder) for encoder in (HIDDEN, world.encoder)
    )
    for n_rows, length, where in world.shapes():
        lists = world.token_lists(n_rows, length)
        batch = pad(lists, 0).to(device_of(world.model))
        states = entering_states(world.model, lists, by_hidden.first_layer, 0)
        calls = {
            "zero-shot": lambda batch=batch: next_token_logits(world.model, batch),
            "router alone": lambda lists=lists, states=states: by_hidden.of_states(lists, states),
            "encoder and router alone": lambda lists=lists: by_encoder.of_states(lists, ()),
        }
        world.rows.measure("reading", where, calls)


@torch.no_grad()
def decoding(world: World) -> None:
    """One more token behind a cache; a row's cache is that of one prompt, repeated for every row of the batch."""
    routed, device = twin(world.model), device_of(world.model)
    with rerouted(world.reader(routed, HIDDEN), world.pids):
        for n_rows, length, where in world.shapes(is_cut=False):
            prompt = torch.tensor(world.token_lists(1, length), device=device)
            token = prompt[:, -1:].expand(n_rows, 1)
            mask = torch.ones(n_rows, length + 1, dtype=torch.long, device=device)

            def step_of(model, prompt=prompt, token=token, mask=mask, n_rows=n_rows):
                cache = model(prompt, use_cache=True, logits_to_keep=1)[CACHE]
                cache.batch_repeat_interleave(n_rows)

                def step():
                    model(token, attention_mask=mask, use_cache=True, **{CACHE: cache})
                    cache.crop(-1)

                return step

            names = {"plain": world.model, "routed": routed}
            if f"decoding: routed / plain, {where}" not in world.rows.content["rows"]:
                world.rows.measure(
                    "decoding", where, {name: step_of(model) for name, model in names.items()}
                )


@contextmanager
def dense_bias(model: PreTrainedModel, pids: PIDs) -> Iterator[SimpleNamespace]:
    """Inside, routing is done the paper's way: a bias [batch, n_heads, q_len, kv_len] in the additive mask."""
    positions = {attention_of(model, layer): position for position, layer in enumerate(pids.layers)}
    given, device = SimpleNamespace(routing=None), device_of(model)
    query_directions, key_directions = (
        pids.query_directions().to(device),
        pids.key_directions().to(device),
    )
    causal: dict[int, Tensor] = {}

    def attend(module, query, key, value, attention_mask, **kwargs):
        if (position := positions.get(module)) is not None:
            alpha, gates = (
                given.routing.routing_vector[:, position],
                given.routing.head_gates[:, position],
            )
            z_query = project(stores[position]["query"], query_directions[position])
            z_key = project(stores[position]["key"], key_directions[position])
            bias = gates[:, :, None, None] * ((z_query * alpha[:, None]) @ z_key.mT)[:, None]
            if attention_mask is None:
                n_tokens = query.shape[2]
                if n_tokens not in causal:
                    causal[n_tokens] = torch.ones(
                        n_tokens, n_tokens, dtype=torch.bool, device=device
                    ).tril()
                attention_mask = causal[n_tokens]
            attention_mask = bias.to(query.dtype).masked_fill(~attention_mask, -torch.inf)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    with (
        captured(model, pids.layers) as stores,
        attention_function(model, "icrouting_dense", attend, masks="sdpa"),
    ):
        yield given


@torch.no_grad()
def dense(world: World) -> None:
    """The same routed logits by a dense bias and by wider heads: time, and peak memory of what a pass makes."""
    ours, theirs = twin(world.model), twin(world.model)
    with attach(ours, world.pids) as attachment, dense_bias(theirs, world.pids) as given:
        router = world.reader(ours, HIDDEN).router
        for n_rows, length, where in world.shapes():
            batch = pad(world.token_lists(n_rows, length), 0).to(device_of(ours))
            features = torch.randn(
                n_rows, ours.config.hidden_size, generator=torch.Generator().manual_seed(length)
            )
            given.routing = attachment.routing = router(features.to(device_of(ours)))

            def more(batch=batch):
                gap = (
                    (next_token_logits(ours, batch) - next_token_logits(theirs, batch))
                    .abs()
                    .max()
                    .item()
                )
                assert gap < (1e-2 if ours.dtype == torch.float32 else 1.0), (
                    f"the two ways differ by {gap}"
                )
                peaks = [
                    peak_bytes(lambda model=model: next_token_logits(model, batch))
                    for model in (ours, theirs)
                ]
                ratio = round(peaks[1] / peaks[0], 2)
                return {
                    "peak_bytes": peaks[1],
                    "base_peak_bytes": peaks[0],
                    "peak_ratio": ratio,
                    "logit_gap": gap,
                }

            calls = {
                "wider heads": lambda batch=batch: next_token_logits(ours, batch),
                "dense bias": lambda batch=batch: next_token_logits(theirs, batch),
            }
            world.rows.measure("dense", where, calls, more)


@torch.no_grad()
def demonstrations(world: World) -> None:
    """Few-shot prompts of the paper's five demonstrations a class, whole and behind a kept context, beside routed."""
    model, routed, tokenizer = world.model, twin(world.model), world.tokenizer
    with ExitStack() as stack:
        stack.enter_context(rerouted(reader := world.reader(routed, HIDDEN), world.pids))
        for task in world.tasks:
            examples = task.test[: world.n_items]
            demos = [(task, demo) for demo in balanced_demos(task, 5, np.random.default_rng(0))]
            prompts = [few_shot(task, example, demos) for example in examples]
            options = [task.options(example) for example in examples]
            context = tokenize(tokenizer, [prompts[0].context])[0]
            kept: dict[str, KeptContext] = {}
            others = [few_shot(task, example, demos) for example in task.validation[:2]]
            other_options = [task.options(example) for example in task.validation[:2]]
            score_options(model, tokenizer, others, other_options, kept=kept)  # keeps the context
            (cache,) = (found.n_numbers for found in kept.values())
            weights = [*reader.router.parameters(), world.pids.query_pids, world.pids.key_pids]

            def call(model, prompts, kept=None, options=options):
                return lambda: score_options(model, tokenizer, prompts, options, kept=kept)

            base = {"routed": call(routed, [prompt.query for prompt in prompts])}
            rivals = {
                "few-shot": call(model, [prompt.text for prompt in prompts]),
                "few-shot behind a kept context": call(model, prompts, kept),
            }
            lengths = tokenize(tokenizer, [prompt.query for prompt in prompts])
            bytes_of = {
                "context_tokens": len(context),
                "prompt_tokens": round(sum(map(len, lengths)) / len(lengths), 1),
                "context_cache_bytes": cache * model.dtype.itemsize,
                "pids_and_router_bytes": sum(
                    weight.numel() * weight.element_size() for weight in weights
                ),
            }
            for name, rival in rivals.items():
                calls = base | {name: rival}
                where = f"{task.name}, {len(examples)} item(s)"
                world.rows.measure("few-shot", where, calls, lambda bytes_of=bytes_of: bytes_of)
