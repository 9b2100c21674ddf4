"""The stages of a fit, each of which can be taken up again from what an earlier run kept."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from icrouting.config import EARLIER, HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hold import check_alone, frozen
from icrouting.fitting.extraction import MOMENTS_FILE, extract
from icrouting.fitting.folds import chosen_by_folds
from icrouting.fitting.pca import fit_pids
from icrouting.fitting.queries import HELD, Query, held_queries, training_queries
from icrouting.fitting.training import CHECKPOINT_FILE, Trainer
from icrouting.fitting.trunk import ENTROPIES_FILE
from icrouting.fitting.validation import Look
from icrouting.routing.features import Features, features_of
from icrouting.routing.pids import PIDs, check_layers, late_third
from icrouting.routing.router import Router
from icrouting.runtime.checks import differences
from icrouting.runtime.defaults import usual_defaults
from icrouting.runtime.locks import locked
from icrouting.runtime.processes import agree, first_one_first, is_first
from icrouting.runtime.storage import load_json, load_metadata, save_json
from icrouting.tasks.task import Task, rows_digest


@usual_defaults()
def fit(
    decoder: Decoder,
    tasks: Sequence[Task],
    config: FitConfig,
    folder: Path | None = None,
    kind: type[Router] = Router,
) -> tuple[PIDs, Router, Features]:
    """Returns the PIDs, a router trained on them, and the features that it reads.

    Stages 1 to 3, on the frozen model.

    Args:
        decoder: the model to route.
        tasks: the source tasks.
        config: settings.
        folder: keeps what the stages computed, so that a fit that was stopped goes on from there.
        kind: which router is trained: the paper's, or a subclass of it that has other parts, or
            that trains the directions along (`Router.adopt`).

    Raises:
        ValueError: the model cannot be routed, or the settings, tasks or folder do not fit.
    """
    if not tasks:
        raise ValueError("a fit needs at least one source task, got none")
    check_alone(decoder.model, "icr")
    # A model that cannot be routed is refused before anything is computed.
    _ = decoder.family
    n_layers = decoder.dims.n_layers
    layers = check_layers(config.layers or late_third(n_layers), n_layers)
    if config.encoder == HIDDEN and layers[0] == 0:
        raise ValueError(
            "what enters layer 0 has read the last token alone: "
            "with hidden states, route from layer 1 up"
        )
    # So is an encoder that is not there, before a folder is made.
    features = features_of(config.encoder, decoder, str(decoder.device))

    def untrained() -> Router:
        router = kind(
            features.n_features,
            len(layers),
            decoder.dims.n_heads,
            config.rank,
            config.hidden_width,
            torch.Generator().manual_seed(config.seed),
        )
        return router.to(decoder.device)

    # The model's weights take no gradient: what is trained is the router.
    with claimed(folder, config, tasks, decoder.fingerprint), frozen(decoder.model):
        extracted = extract_pids(decoder, tasks, layers, config, folder)
        queries, scale = training_queries(decoder, tasks, features, layers[0], config, folder)
        held = held_queries(decoder, tasks, features, scale, layers[0], config, folder)
        trainer = train(decoder, extracted, untrained, queries, held, config, folder)
    if folder is not None and is_first():
        # The states of a hundred rows are soon made again.
        shutil.rmtree(folder / HELD, ignore_errors=True)
    router = trainer.router
    # From here on the router reads features as they are.
    router.absorb(*scale)
    return trainer.pids, router.eval().requires_grad_(False), features


def train(
    decoder: Decoder,
    extracted: PIDs,
    untrained: Callable[[], Router],
    queries: Sequence[Query],
    held: Sequence[Query],
    config: FitConfig,
    folder: Path | None = None,
) -> Trainer:
    """Returns a training that has run to its end (stage 3).

    Args:
        decoder: the frozen model.
        extracted: the PIDs.
        untrained: makes a router.
        queries: the training queries.
        held: validation queries. Where there are none, cross-validation chooses the steps, if
            `config` asks for either.
        config: settings.
        folder: keeps checkpoints.
    """

    def trained(
        rest: Sequence[Query], held: Sequence[Query], folder: Path | None, chosen: Look | None
    ) -> Trainer:
        router = untrained()
        pids = router.adopt(extracted)
        trainer = Trainer(decoder, pids, router, rest, config, folder, held, chosen)
        trainer.run()
        return trainer

    def looks(rest: Sequence[Query], held: Sequence[Query], folder: Path | None) -> Sequence[Look]:
        return trained(rest, held, folder, None).watch.looks

    chosen = None
    if config.watches(len(queries)) and not held:
        chosen = chosen_by_folds(queries, looks, config.seed, folder)
    return trained(queries, held, folder, chosen)


def extract_pids(
    decoder: Decoder,
    tasks: Sequence[Task],
    layers: tuple[int, ...],
    config: FitConfig,
    folder: Path | None,
) -> PIDs:
    """Returns the PIDs of few-shot prompts of all source tasks, pooled (stages 1 and 2)."""
    moments = extract(decoder, tasks, layers, config, folder)
    generator = torch.Generator().manual_seed(config.seed)
    return fit_pids(moments, layers, config.rank, config.basis, generator)


@contextmanager
def claimed(
    folder: Path | None, config: FitConfig, tasks: Sequence[Task], fingerprint: str
) -> Iterator[None]:
    """Inside, a folder is one fit's alone, and the same fit for all processes.

    It is made, or taken up where it was left.

    Raises:
        ValueError: the folder holds another fit or the processes were started with different ones;
            what differs is named.
    """
    settings = {
        **dataclasses.asdict(config),
        "tasks": [task.name for task in tasks],
        "model": fingerprint,
        "rows": rows_digest(tasks),
    }
    # As a file gives them back, so that tuples compare as lists.
    settings = json.loads(json.dumps(settings))
    agree(**settings)
    if folder is None:
        yield
        return
    with locked(folder):
        with first_one_first():
            _check_settings(folder, settings)
        yield


def progress_in(folder: Path) -> list[str]:
    """Returns what a fit that was stopped has kept in its folder, a phrase a stage."""
    phrases = []
    moments = load_metadata(folder / MOMENTS_FILE)
    if moments is not None:
        phrases.append(f"{int(moments['n_done']):,} prompts of the extraction")
    if load_metadata(folder / ENTROPIES_FILE) is not None:
        phrases.append("the trunk's states")
    training = load_metadata(folder / CHECKPOINT_FILE)
    if training is not None and training["step"] != "0":
        phrases.append(f"training up to step {int(training['step']):,}")
    return phrases


def _check_settings(folder: Path, settings: dict[str, object]) -> None:
    """ValueError if a folder holds a fit with other settings; an empty one keeps these."""
    file = folder / "fit.json"
    # So for the first process alone: others would write over each other.
    if not file.exists():
        save_json(file, settings)
    phrases = differences({**EARLIER, **load_json(file)}, settings)
    # Where nothing was computed, nothing binds.
    if phrases and not progress_in(folder):
        save_json(file, settings)
    elif phrases:
        raise ValueError(
            f"{folder} holds a fit with other settings ({', '.join(phrases)}): "
            "choose another folder"
        )
