"""What training, extraction and loading take beside the paper's algorithm, a bare forward and loading the model."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed_passes import RANK, World, dense_bias, twin
from icrouting.config import HIDDEN, PAPER
from icrouting.decoder.batches import by_length, context_length, pad, pad_id_of, tokenize
from icrouting.decoder.families import decoder_of, device_of, dims_of
from icrouting.decoder.loading import load_model
from icrouting.decoder.scoring import option_ids
from icrouting.fitting import losses
from icrouting.fitting.capture import TOKEN_BUDGET, capture_last_tokens
from icrouting.fitting.pca import QKMoments
from icrouting.fitting.training import Query, Trainer, alpha_scale
from icrouting.fitting.trunk import TrunkState, run_trunk
from icrouting.icr import InContextRouter
from icrouting.routing import artifact
from icrouting.routing.features import features_of
from icrouting.routing.router import Router
from icrouting.tasks.prompts import extraction_prompts


def paper_terms(model, given, trainer, queries):
    """The loss's terms as the paper's algorithm has them: a plain and a routed pass, logits at every position."""
    batch = pad([query.state.tokens for query in queries], 0).to(device_of(model))
    routing = trainer.router(
        torch.stack([query.features for query in queries]).to(device_of(model))
    )
    scale = alpha_scale(trainer.step, trainer.n_steps, trainer.config.final_alpha_scale)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask.long(),
        "use_cache": False,
    }
    rows = torch.arange(len(queries), device=batch.last.device)
    with torch.no_grad():
        plain = trainer.model(**inputs).logits[rows, batch.last].float()
    given.routing = routing.scaled(scale)
    logits = model(**inputs).logits[rows, batch.last].float()
    targets = torch.tensor(
        [query.option_ids[query.label] for query in queries], device=logits.device
    )
    return {
        "ce": torch.nn.functional.cross_entropy(logits, targets),
        "conf": losses.confidence_loss(logits, losses.entropy(plain)),
        "spar": losses.sparsity_loss(routing.routing_vector, trainer.config.deepest_weight),
        "gate": losses.gate_loss(routing.head_gates),
        "queries": torch.tensor(float(len(queries)), device=logits.device),
    }


def training(world: World) -> None:
    """Two epochs of the paper's settings; ours runs the trunk in the first place. Features are given to both."""
    model, biased, layers = world.model, twin(world.model), world.pids.layers
    n_features, n_heads, generator = 384, dims_of(model).n_heads, torch.Generator().manual_seed(0)
    chosen = [
        (task, example) for task in world.tasks for example in task.train[: 4 * world.n_items]
    ]
    texts = [task.prompt(example) for task, example in chosen]
    lists = tokenize(world.tokenizer, texts)
    ids = [
        option_ids(world.tokenizer, text, of.options(e))
        for text, (of, e) in zip(texts, chosen, strict=True)
    ]
    features = torch.randn(len(chosen), n_features, generator=generator)
    config, logs = dataclasses.replace(PAPER, encoder=HIDDEN), {}

    def trainer_of(states):
        items = zip(states, features, ids, chosen, strict=True)
        queries = [
            Query(state, vector, option_list, e.label)
            for state, vector, option_list, (_, e) in items
        ]
        seeded = torch.Generator().manual_seed(0)
        router = Router(n_features, len(layers), n_heads, RANK, 256, seeded).to(device_of(model))
        return Trainer(model, world.pids, router, queries, config, 0)

    def ours(states=None):
        trainer = trainer_of(states or run_trunk(model, lists, layers[0], 0))
        trainer.run()
        logs["ours"] = [entry["loss"] for entry in trainer.log]

    def papers():
        trainer = trainer_of([TrunkState(tokens, torch.empty(0), 0.0) for tokens in lists])
        with dense_bias(biased, world.pids) as given:
            for _ in range(trainer.n_steps):
                queries = [trainer.queries[row] for row in trainer._rows()]
                trainer._update(paper_terms(biased, given, trainer, queries))
        logs["paper's"] = [entry["loss"] for entry in trainer.log]

    def more():
        gap = max(
            abs(own - other) for own, other in zip(logs["ours"], logs["paper's"], strict=True)
        )
        assert gap < (2e-3 if model.dtype == torch.float32 else 0.2), f"the losses differ by {gap}"
        tokens = sum(map(len, lists)) / len(lists)
        return {
            "steps": len(logs["ours"]),
            "loss_gap": gap,
            "first_loss": logs["ours"][0],
            "mean_tokens": tokens,
        }

    where = f"{len(chosen)} queries, 2 epochs, batches of {config.batch_size}"
    states = run_trunk(model, lists, layers[0], 0)
    world.rows.measure("training", where, {"ours": ours, "the paper's algorithm": papers}, more)
    calls = {"ours, trunk there": lambda: ours(states), "the paper's algorithm": papers}
    world.rows.measure("training", where, calls, more)


@torch.no_grad()
def extraction(world: World) -> None:
    """Few-shot prompts through capture and moments; the bare forward runs the same batches, tokenized before."""
    model, dims, layers, rng = (
        world.model,
        dims_of(world.model),
        world.pids.layers,
        np.random.default_rng(0),
    )
    prompts = [
        prompt for task in world.tasks for prompt in extraction_prompts(task, world.n_items, 5, rng)
    ]
    lists = tokenize(world.tokenizer, [prompt.text for prompt in prompts], context_length(model))
    groups = [[lists[row] for row in group] for group in by_length(lists, TOKEN_BUDGET)]
    batches = [pad(group, pad_id_of(world.tokenizer)).to(device_of(model)) for group in groups]

    def extract():
        moments = QKMoments(
            len(layers), dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
        )
        for query, key in capture_last_tokens(model, world.tokenizer, prompts, layers):
            moments.update(query, key)

    def bare():
        for batch in batches:
            decoder_of(model)(
                batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False
            )

    # Tokens a second are the inverse of seconds, so that extraction's rate over the bare one is bare over extraction.
    calls = {"seconds of extraction": extract, "seconds of the bare forward": bare}
    world.rows.measure(
        "extraction", f"{len(prompts)} prompts, {sum(map(len, lists))} tokens", calls
    )


def loading(world: World, name: str) -> None:
    model, tokenizer, device = world.model, world.tokenizer, device_of(world.model)
    config = dataclasses.replace(PAPER, encoder=HIDDEN)
    features = features_of(HIDDEN, model, tokenizer, str(device))
    description = artifact.describe(model, world.tasks, config, world.pids.layers, features)
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
