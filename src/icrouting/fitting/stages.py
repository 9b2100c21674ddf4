"""The stages of a fit, each of which can be taken up again from what an earlier run kept."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hold import check_alone, frozen
from icrouting.fitting.extraction import MOMENTS_FILE, extract
from icrouting.fitting.folds import chosen_by_folds
from icrouting.fitting.former import places_of, take_up
from icrouting.fitting.pca import fit_pids
from icrouting.fitting.queries import HELD, Query, held_queries, training_queries
from icrouting.fitting.rows import check_rank, n_extracted
from icrouting.fitting.shelf import (
    EXTRACTION,
    TRUNK,
    Shelf,
    load_moments,
    load_pids,
    load_wider_moments,
    opened_held,
    save_pids,
)
from icrouting.fitting.training import CHECKPOINT_FILE, Trainer
from icrouting.fitting.trunk import ENTROPIES_FILE
from icrouting.fitting.validation import Look
from icrouting.fitting.warm import Start
from icrouting.routing.features import Features, features_of
from icrouting.routing.pids import PIDs, check_layers, late_third
from icrouting.routing.router import Router
from icrouting.runtime.defaults import usual_defaults
from icrouting.runtime.locks import locked
from icrouting.runtime.processes import agree, first_one_first, is_first
from icrouting.runtime.storage import load_metadata
from icrouting.tasks.task import Task, check_names, rows_digest, template_digest


@usual_defaults()
def fit(
    decoder: Decoder,
    tasks: Sequence[Task],
    config: FitConfig,
    folder: Path | None = None,
    kind: type[Router] = Router,
    stages: Path | None = None,
    start: Start | None = None,
    read_queries: Callable[[Sequence[Query]], object] | None = None,
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
        stages: keeps the stages before the training by what they depend on, for other fits to take
            up; None keeps them in `folder`.
        start: the router to go on from, whose directions are taken; `tasks` and `config` are those
            that it gives for them.
        read_queries: is handed the training queries, with what they left in the trunk.

    Raises:
        ValueError: the model cannot be routed, or the settings, tasks or folder do not fit.
    """
    if not tasks:
        raise ValueError("a fit needs at least one source task, got none")
    check_names(tasks)
    check_alone(decoder.model, "icr")
    tasks = [task.bound_to(decoder.tokenizer) for task in tasks]
    # A model that cannot be routed is refused before anything is computed.
    _ = decoder.family
    n_layers = decoder.dims.n_layers
    layers = check_layers(config.layers or late_third(n_layers), n_layers)
    if config.encoder == HIDDEN and layers[0] == 0:
        raise ValueError(
            "what enters layer 0 has read the last token alone: "
            "with hidden states, route from layer 1 up"
        )
    if start is None:
        check_rank(tasks, config, decoder.dims)
    # So is an encoder that is not there, before a folder is made.
    features = features_of(config.encoder, decoder, str(decoder.device))
    # Processes share batches by their number, and another budget makes others.
    agree(token_budget=decoder.token_budget)
    if start is not None:
        start.check_features(features)
    shelf = Shelf.of(stages or folder, decoder, tasks, layers, config)
    template = template_digest(tasks)

    def untrained() -> Router:
        router = kind(
            features.n_features,
            len(layers),
            decoder.dims.n_heads,
            config.rank,
            config.hidden_width,
            torch.Generator().manual_seed(config.seed),
        )
        router.to(decoder.device)
        if start is not None:
            start.put_into(router, scale)
        return router

    # A router that is gone on from keeps its directions, however it came by them.
    learns_directions = config.basis == "learned" and start is None
    # The model's weights take no gradient: what is trained is the router.
    with (
        claimed(folder, config, tasks, decoder, shelf, start, template),
        frozen(decoder.model),
    ):
        if start is None:
            extracted = extract_pids(decoder, tasks, layers, config, shelf)
        else:
            extracted = start.pids
        with shelf.opened(TRUNK) as place:
            queries, scale = training_queries(decoder, tasks, features, layers[0], config, place)
        if start is not None:
            scale = start.scale(scale)
        held: list[Query] = []
        if config.patience:
            with opened_held(stages, shelf, tasks) as place:
                held = held_queries(
                    *(decoder, tasks, features, scale, layers[0], config), place or folder
                )
        if read_queries is not None:
            read_queries(queries)
        # A warm start goes on where its own training ended, so that nothing changes before the
        # first step.
        first_scale = 1.0 if start is None else config.final_alpha_scale
        trainer = train(
            *(decoder, extracted, untrained, queries, held, config, folder),
            first_scale=first_scale,
            rehearsed=() if start is None else tuple(start.description.tasks),
            learns_directions=learns_directions,
        )
    if folder is not None and is_first():
        # The states of a hundred rows are soon made again.
        shutil.rmtree(folder / HELD, ignore_errors=True)
    router = trainer.router
    pids = router.leave_directions(trainer.pids) if learns_directions else trainer.pids
    # From here on the router reads features as they are.
    router.absorb(*scale)
    return pids, router.eval().requires_grad_(False), features


def train(
    decoder: Decoder,
    extracted: PIDs,
    untrained: Callable[[], Router],
    queries: Sequence[Query],
    held: Sequence[Query],
    config: FitConfig,
    folder: Path | None = None,
    *,
    first_scale: float = 1.0,
    rehearsed: Collection[str] = (),
    learns_directions: bool = False,
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
        first_scale: the routing vector's scale before the first step.
        rehearsed: names of the tasks whose rows cross-validation does not judge on.
        learns_directions: whether directions are trained along, as parameters of the router.
    """

    def trained(
        rest: Sequence[Query], held: Sequence[Query], folder: Path | None, chosen: Look | None
    ) -> Trainer:
        router = untrained()
        pids = router.adopt(extracted)
        if learns_directions:
            pids = router.learn_directions(pids)
        trainer = Trainer(
            decoder, pids, router, rest, config, folder, held, chosen, first_scale=first_scale
        )
        trainer.run()
        return trainer

    def looks(rest: Sequence[Query], held: Sequence[Query], folder: Path | None) -> Sequence[Look]:
        return trained(rest, held, folder, None).watch.looks

    chosen = None
    if config.watches(len(queries)) and not held:
        chosen = chosen_by_folds(queries, looks, config.seed, folder, rehearsed)
    return trained(queries, held, folder, chosen)


def extract_pids(
    decoder: Decoder,
    tasks: Sequence[Task],
    layers: tuple[int, ...],
    config: FitConfig,
    shelf: Shelf | None,
) -> PIDs:
    """Returns the PIDs of few-shot prompts of all source tasks, pooled (stages 1 and 2)."""
    shelf = shelf or Shelf(None, None, {})
    with shelf.opened(EXTRACTION) as place:
        pids = load_pids(place, layers, config)
        if pids is None:
            moments = load_moments(place)
            if moments is None:
                moments = load_wider_moments(shelf)
            if moments is None:
                moments = extract(decoder, tasks, layers, config, place)
            generator = torch.Generator().manual_seed(config.seed)
            pids = fit_pids(moments, layers, config.rank, config.basis, generator)
            save_pids(place, pids, config)
    return pids


@contextmanager
def claimed(
    folder: Path | None,
    config: FitConfig,
    tasks: Sequence[Task],
    decoder: Decoder,
    shelf: Shelf,
    start: Start | None,
    chat_template: str | None = None,
) -> Iterator[None]:
    """Inside, a folder is one fit's alone, and the same fit for all processes.

    It is made, or taken up where it was left; what a fit with other settings left is set aside.

    Raises:
        ValueError: another run is writing to the folder, or the processes were started with
            different fits; what differs is named.
    """
    settings = {
        **dataclasses.asdict(config),
        "tasks": [task.name for task in tasks],
        "model": decoder.fingerprint,
        # A fingerprint is the same in every dtype, and what a training goes along is not.
        "dtype": str(decoder.model.dtype),
        "rows": rows_digest(tasks),
        "start": None if start is None else start.digest,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    if shelf.about:
        # The tokenizer's, which may be another one of the same model.
        settings["tokens"] = shelf.about[EXTRACTION]["tokens"]
    # As a file gives them back, so that tuples compare as lists.
    settings = json.loads(json.dumps(settings))
    agree(**settings)
    if folder is None:
        yield
        return
    with locked(folder):
        with first_one_first():
            # The others would write over each other.
            if is_first():
                take_up(folder, settings, shelf)
        yield


def kept_stages(
    decoder: Decoder,
    tasks: Sequence[Task],
    config: FitConfig,
    stages: Path,
    start: Start | None = None,
) -> list[str]:
    """Returns what a fit will find of its stages in a folder, a phrase each."""
    tasks = [task.bound_to(decoder.tokenizer) for task in tasks]
    n_layers = decoder.dims.n_layers
    layers = check_layers(config.layers or late_third(n_layers), n_layers)
    n_prompts = n_extracted(tasks, config)
    shelf = Shelf.of(stages, decoder, tasks, layers, config)
    # The directions are those of the router that it goes on from.
    if start is not None:
        shelf = dataclasses.replace(shelf, extraction=None)
    return shelf.kept(n_prompts)


def progress_in(folder: Path) -> list[str]:
    """Returns what a fit that was stopped has kept in its folder, a phrase a stage."""
    phrases = []
    places = places_of(folder)
    moments = load_metadata(places[EXTRACTION] / MOMENTS_FILE)
    if moments is not None:
        phrases.append(f"{int(moments['n_done']):,} prompts of the extraction")
    if load_metadata(places[TRUNK] / ENTROPIES_FILE) is not None:
        phrases.append("the trunk's states")
    training = load_metadata(folder / CHECKPOINT_FILE)
    if training is not None and training["step"] != "0":
        phrases.append(f"training up to step {int(training['step']):,}")
    return phrases
