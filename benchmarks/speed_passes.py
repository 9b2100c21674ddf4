"""What a routed pass costs beside a plain one, the paper's dense bias, and demonstrations."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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
from icrouting.decoder.decoder import Decoder
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
        """Batch, length and how a row says so; each shape once.

        Batches above `max_tokens` are cut.
        """
        batches_by_shape: dict[tuple[int, int], list[int]] = {}
        for length in self.lengths:
            for batch in self.batches:
                n_rows = min(batch, self.max_tokens // length) if is_cut else batch
                batches_by_shape.setdefault((n_rows, length), []).append(batch)
        for (n_rows, length), batches in batches_by_shape.items():
            if n_rows == 0:
                print(f"left out: {length} tokens are more than --max-tokens {self.max_tokens}")
                continue
            where = f"{n_rows} x {length}"
            cut_batches = [str(batch) for batch in batches if batch != n_rows]
            if cut_batches:
                where += f" (cut from {' and '.join(cut_batches)} rows)"
            yield n_rows, length, where

    def token_lists(self, n_rows: int, length: int) -> list[list[int]]:
        """Windows of the tasks' text, repeated where it is too short."""
        texts = [task.prompt(example) for task in self.tasks for example in task.train[:400]]
        token_lists = tokenize(self.tokenizer, texts)
        stream = torch.tensor([token for tokens in token_lists for token in tokens])
        positions = torch.arange(n_rows * length) % len(stream)
        return stream[positions].view(n_rows, length).tolist()

    def reader(self, model: PreTrainedModel, encoder: str) -> Reader:
        device = str(device_of(model))
        layers = self.pids.layers
        features = features_of(encoder, Decoder.of(model, self.tokenizer), device)
        generator = torch.Generator().manual_seed(0)
        n_heads = dims_of(model).n_heads
        router = Router(features.n_features, len(layers), n_heads, RANK, 256, generator)
        # Untrained, the router would add nothing.
        for weight in router.alpha.parameters():
            weight.data.add_(0.01 * torch.randn(weight.shape, generator=generator))
        router = router.requires_grad_(False).to(device)
        return Reader(Decoder.of(model, self.tokenizer), features, router, layers[0], 1.0)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the same weights, which can be routed while the first is not."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@torch.no_grad()
def scoring(world: World) -> None:
    """A scoring pass, plain and routed by either kind of features."""
    routed = twin(world.model)
    encoded = twin(world.model)
    by_hidden = world.reader(routed, HIDDEN)
    by_encoder = world.reader(encoded, world.encoder)
    with rerouted(by_hidden, world.pids), rerouted(by_encoder, world.pids):
        for n_rows, length, where in world.shapes():
            batch = pad(world.token_lists(n_rows, length), 0).to(device_of(world.model))
            calls = {
                "zero-shot": lambda batch=batch: next_token_logits(world.model, batch),
                "routed by the hidden state": lambda batch=batch: next_token_logits(routed, batch),
                "routed by the encoder": lambda batch=batch: next_token_logits(encoded, batch),
            }
            world.rows.measure("scoring", where, calls)


@torch.no_grad()
def reading(world: World) -> None:
    """The router alone, on hidden states that are there, and with the sentence encoder in front."""
    by_hidden = world.reader(world.model, HIDDEN)
    by_encoder = world.reader(world.model, world.encoder)
    for n_rows, length, where in world.shapes():
        lists = world.token_lists(n_rows, length)
        batch = pad(lists, 0).to(device_of(world.model))
        states = entering_states(
            Decoder.of(world.model, world.tokenizer), lists, by_hidden.first_layer
        )
        calls = {
            "zero-shot": lambda batch=batch: next_token_logits(world.model, batch),
            "router alone": lambda lists=lists, states=states: by_hidden.of_states(lists, states),
            "encoder and router alone": lambda lists=lists: by_encoder.of_states(lists, ()),
        }
        world.rows.measure("reading", where, calls)


@torch.no_grad()
def decoding(world: World) -> None:
    """One more token behind a cache: that of one prompt, repeated for every row of the batch."""
    routed = twin(world.model)
    device = device_of(world.model)
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

            # Caches are not filled for a row that is there already.
            if f"decoding: routed / plain, {where}" not in world.rows.content["rows"]:
                calls = {"plain": step_of(world.model), "routed": step_of(routed)}
                world.rows.measure("decoding", where, calls)


@contextmanager
def dense_bias(model: PreTrainedModel, pids: PIDs) -> Iterator[SimpleNamespace]:
    """Inside, routing is done the paper's way: a bias in the additive mask.

    The bias is [batch, n_heads, q_len, kv_len]; `routing` of what is yielded is to be set.
    """
    positions = {attention_of(model, layer): position for position, layer in enumerate(pids.layers)}
    holder = SimpleNamespace(routing=None)
    device = device_of(model)
    query_directions = pids.query_directions().to(device)
    key_directions = pids.key_directions().to(device)
    causal_masks: dict[int, Tensor] = {}

    def causal_mask(n_tokens: int) -> Tensor:
        if n_tokens not in causal_masks:
            ones = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device)
            causal_masks[n_tokens] = ones.tril()
        return causal_masks[n_tokens]

    def attend(module, query, key, value, attention_mask, **kwargs):
        position = positions.get(module)
        if position is not None:
            alpha = holder.routing.routing_vector[:, position]
            gates = holder.routing.head_gates[:, position]
            z_query = project(stores[position]["query"], query_directions[position])
            z_key = project(stores[position]["key"], key_directions[position])
            scores = (z_query * alpha[:, None]) @ z_key.mT
            bias = gates[:, :, None, None] * scores[:, None]
            # No mask stands for the causal one.
            if attention_mask is None:
                attention_mask = causal_mask(query.shape[2])
            attention_mask = bias.to(query.dtype).masked_fill(~attention_mask, -torch.inf)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    with (
        captured(model, pids.layers) as stores,
        attention_function(model, "icrouting_dense", attend, masks="sdpa"),
    ):
        yield holder


@torch.no_grad()
def dense(world: World) -> None:
    """The same routed logits by a dense bias and by wider heads: time, and a pass's peak memory."""
    ours = twin(world.model)
    theirs = twin(world.model)
    with attach(ours, world.pids) as attachment, dense_bias(theirs, world.pids) as holder:
        router = world.reader(ours, HIDDEN).router
        for n_rows, length, where in world.shapes():
            batch = pad(world.token_lists(n_rows, length), 0).to(device_of(ours))
            generator = torch.Generator().manual_seed(length)
            features = torch.randn(n_rows, ours.config.hidden_size, generator=generator)
            routing = router(features.to(device_of(ours)))
            attachment.routing = routing
            holder.routing = routing

            def more(batch=batch):
                gaps = next_token_logits(ours, batch) - next_token_logits(theirs, batch)
                gap = gaps.abs().max().item()
                most = 1e-2 if ours.dtype == torch.float32 else 1.0
                assert gap < most, f"the two ways differ by {gap}"
                our_peak = peak_bytes(lambda: next_token_logits(ours, batch))
                their_peak = peak_bytes(lambda: next_token_logits(theirs, batch))
                return {
                    "peak_bytes": their_peak,
                    "base_peak_bytes": our_peak,
                    "peak_ratio": round(their_peak / our_peak, 2),
                    "logit_gap": gap,
                }

            calls = {
                "wider heads": lambda batch=batch: next_token_logits(ours, batch),
                "dense bias": lambda batch=batch: next_token_logits(theirs, batch),
            }
            world.rows.measure("dense", where, calls, more)


@torch.no_grad()
def demonstrations(world: World) -> None:
    """Few-shot prompts, whole and behind a kept context, beside routed ones.

    They hold the paper's five demonstrations a class.
    """
    model = world.model
    routed = twin(world.model)
    tokenizer = world.tokenizer
    reader = world.reader(routed, HIDDEN)
    weights = [*reader.router.parameters(), world.pids.query_pids, world.pids.key_pids]
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    with rerouted(reader, world.pids):
        for task in world.tasks:
            examples = task.test[: world.n_items]
            demos = [(task, demo) for demo in balanced_demos(task, 5, np.random.default_rng(0))]
            prompts = [few_shot(task, example, demos) for example in examples]
            options = [task.options(example) for example in examples]
            context = tokenize(tokenizer, [prompts[0].context])[0]
            kept: dict[str, KeptContext] = {}
            others = [few_shot(task, example, demos) for example in task.validation[:2]]
            other_options = [task.options(example) for example in task.validation[:2]]
            # Other rows' prompts put the context there, so that no turn has to run it.
            score_options(model, tokenizer, others, other_options, kept=kept)
            (kept_context,) = kept.values()

            def call(model, prompts, kept=None, options=options):
                return lambda: score_options(model, tokenizer, prompts, options, kept=kept)

            base = {"routed": call(routed, [prompt.query for prompt in prompts])}
            rivals = {
                "few-shot": call(model, [prompt.text for prompt in prompts]),
                "few-shot behind a kept context": call(model, prompts, kept),
            }
            token_lists = tokenize(tokenizer, [prompt.query for prompt in prompts])
            sizes = {
                "context_tokens": len(context),
                "prompt_tokens": round(sum(map(len, token_lists)) / len(token_lists), 1),
                "context_cache_bytes": kept_context.n_numbers * model.dtype.itemsize,
                "pids_and_router_bytes": weight_bytes,
            }
            where = f"{task.name}, {len(examples)} item(s)"
            for name, rival in rivals.items():
                calls = base | {name: rival}
                world.rows.measure("few-shot", where, calls, lambda sizes=sizes: sizes)
