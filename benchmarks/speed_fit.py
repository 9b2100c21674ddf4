"""What training, extraction and loading take.

Beside the paper's algorithm, a bare forward, and loading the model.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed_passes import RANK, World, dense_bias, twin
from icrouting.config import HIDDEN, PAPER
from icrouting.decoder.batches import by_length, context_length, pad, pad_id_of, tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.families import device_of, dims_of, stack_of
from icrouting.decoder.loading import load_model
from icrouting.decoder.scoring import option_ids
from icrouting.fitting import losses
from icrouting.fitting.capture import TOKEN_BUDGET, capture_last_tokens
from icrouting.fitting.pca import QKMoments
from icrouting.fitting.training import Query, Trainer, alpha_scale
from icrouting.fitting.trunk import TrunkState, run_trunk
from icrouting.icr import InContextRouter
from icrouting.routing.description import describe
from icrouting.routing.features import features_of
from icrouting.routing.router import Router
from icrouting.tasks.prompts import extraction_prompts


def paper_terms(model, bias, trainer, queries):
    """The loss's terms by the paper's algorithm: a plain and a routed pass, logits everywhere."""
    device = device_of(model)
    batch = pad([query.state.tokens for query in queries], 0).to(device)
    features = torch.stack([query.features for query in queries]).to(device)
    routing = trainer.router(features)
    scale = alpha_scale(trainer.step, trainer.n_steps, trainer.config.final_alpha_scale)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask.long(),
        "use_cache": False,
    }
    rows = torch.arange(len(queries), device=batch.last.device)
    with torch.no_grad():
        plain = trainer.decoder.model(**inputs).logits[rows, batch.last].float()
    bias.routing = routing.scaled(scale)
    logits = model(**inputs).logits[rows, batch.last].float()
    right_ids = [query.option_ids[query.label] for query in queries]
    targets = torch.tensor(right_ids, device=logits.device)
    return {
        "ce": torch.nn.functional.cross_entropy(logits, targets),
        "conf": losses.confidence_loss(logits, losses.entropy(plain)),
        "spar": losses.sparsity_loss(routing.routing_vector, trainer.config.deepest_weight),
        "gate": losses.gate_loss(routing.head_gates),
        "queries": torch.tensor(float(len(queries)), device=logits.device),
    }


def training(world: World) -> None:
    """Two epochs of the paper's settings; ours runs the trunk first, both are handed features."""
    model = world.model
    biased = twin(world.model)
    layers = world.pids.layers
    n_features = 384
    examples = []
    texts = []
    ids = []
    for task in world.tasks:
        for example in task.train[: 4 * world.n_items]:
            text = task.prompt(example)
            examples.append(example)
            texts.append(text)
            ids.append(option_ids(world.tokenizer, text, task.options(example)))
    token_lists = tokenize(world.tokenizer, texts)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(examples), n_features, generator=generator)
    config = dataclasses.replace(PAPER, encoder=HIDDEN)
    losses_by_way = {}

    def trainer_of(states):
        queries = []
        for state, vector, option_list, example in zip(
            states, features, ids, examples, strict=True
        ):
            queries.append(Query(state, vector, option_list, example.label))
        seeded = torch.Generator().manual_seed(0)
        router = Router(n_features, len(layers), dims_of(model).n_heads, RANK, 256, seeded)
        return Trainer(
            Decoder.of(model, world.tokenizer),
            world.pids,
            router.to(device_of(model)),
            queries,
            config,
        )

    def ours(states=None):
        trainer = trainer_of(
            states or run_trunk(Decoder.of(model, world.tokenizer), token_lists, layers[0])
        )
        trainer.run()
        losses_by_way["ours"] = [entry["loss"] for entry in trainer.log]

    def papers():
        trainer = trainer_of([TrunkState(tokens, torch.empty(0), 0.0) for tokens in token_lists])
        with dense_bias(biased, world.pids) as bias:
            for _ in range(trainer.n_steps):
                queries = [trainer.queries[row] for row in trainer._rows()]
                trainer._update(paper_terms(biased, bias, trainer, queries))
        losses_by_way["paper's"] = [entry["loss"] for entry in trainer.log]

    def more():
        # Two ways of computing one thing must have walked the same path.
        our_losses = losses_by_way["ours"]
        gaps = np.abs(np.subtract(our_losses, losses_by_way["paper's"]))
        gap = float(gaps.max())
        assert gap < (2e-3 if model.dtype == torch.float32 else 0.2), f"the losses differ by {gap}"
        return {
            "steps": len(our_losses),
            "loss_gap": gap,
            "first_loss": our_losses[0],
            "mean_tokens": sum(map(len, token_lists)) / len(token_lists),
        }

    where = f"{len(examples)} queries, 2 epochs, batches of {config.batch_size}"
    states = run_trunk(Decoder.of(model, world.tokenizer), token_lists, layers[0])
    world.rows.measure("training", where, {"ours": ours, "the paper's algorithm": papers}, more)
    calls = {"ours, trunk there": lambda: ours(states), "the paper's algorithm": papers}
    world.rows.measure("training", where, calls, more)


@torch.no_grad()
def extraction(world: World) -> None:
    """Few-shot prompts through capture and moments, beside a bare forward of the same batches.

    The bare forward's are tokenized before.
    """
    model = world.model
    dims = dims_of(model)
    layers = world.pids.layers
    rng = np.random.default_rng(0)
    prompts = []
    for task in world.tasks:
        prompts += extraction_prompts(task, world.n_items, 5, rng)
    texts = [prompt.text for prompt in prompts]
    token_lists = tokenize(world.tokenizer, texts, context_length(model))
    batches = []
    for rows in by_length(token_lists, TOKEN_BUDGET):
        batch = pad([token_lists[row] for row in rows], pad_id_of(world.tokenizer))
        batches.append(batch.to(device_of(model)))

    def extract():
        query_width = dims.n_heads * dims.head_dim
        key_width = dims.n_kv_heads * dims.head_dim
        moments = QKMoments(len(layers), query_width, key_width)
        for query, key in capture_last_tokens(Decoder.of(model, world.tokenizer), prompts, layers):
            moments.update(query, key)

    def bare():
        for batch in batches:
            mask = batch.attention_mask.long()
            stack_of(model)(batch.input_ids, attention_mask=mask, use_cache=False)

    # Tokens a second are the inverse of seconds: extraction's rate over the bare one is bare over
    # extraction.
    calls = {"seconds of extraction": extract, "seconds of the bare forward": bare}
    where = f"{len(prompts)} prompts, {sum(map(len, token_lists))} tokens"
    world.rows.measure("extraction", where, calls)


def loading(world: World, name: str) -> None:
    """Loading the model beside loading the artifact, and beside entering and leaving `attached`."""
    model = world.model
    tokenizer = world.tokenizer
    config = dataclasses.replace(PAPER, encoder=HIDDEN)
    features = features_of(HIDDEN, Decoder.of(model, tokenizer), str(device_of(model)))
    description = describe(
        Decoder.of(model, world.tokenizer), world.tasks, config, world.pids.layers, features
    )
    made = InContextRouter(description, world.pids, world.reader(model, HIDDEN).router)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)

        def attached():
            with made.attached(model, tokenizer):
                pass

        calls = {
            "the model": lambda: load_model(name),
            "the artifact": lambda: InContextRouter.from_pretrained(folder),
            "entering and leaving `attached`": attached,
        }
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        world.rows.measure("loading", "once each", calls, lambda: {"artifact_bytes": size})
