"""The stages of a fit, each of which can be taken up again from what an earlier run kept in its folder."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from icrouting.config import HIDDEN, FitConfig
from icrouting.decoder.decoder import Decoder
from icrouting.decoder.hold import check_alone, frozen
from icrouting.fitting.extraction import extract
from icrouting.fitting.queries import training_queries
from icrouting.fitting.training import Trainer
from icrouting.routing.features import Features, features_of
from icrouting.routing.pids import PIDs, check_layers, late_third
from icrouting.routing.router import Router
from icrouting.runtime.locks import locked
from icrouting.runtime.processes import agree, first_one_first
from icrouting.runtime.storage import load_json, save_json
from icrouting.tasks.task import Task, rows_digest


def fit(
    decoder: Decoder,
    tasks: Sequence[Task],
    config: FitConfig,
    folder: Path | None = None,
    kind: type[Router] = Router,
) -> tuple[PIDs, Router, Features]:
    """Returns the PIDs, a router of a kind trained on them, and the features that it reads (stages 1 to 3).

    ValueError where the model cannot be routed, or the settings, tasks or folder do not fit.
    """
    if not tasks:
        raise ValueError("a fit needs at least one source task, got none")
    check_alone(decoder.model, "icr")
    # A model that cannot be routed is refused before anything is computed.
    _ = decoder.family
    dims = decoder.dims
    device = decoder.device
    layers = check_layers(config.layers or late_third(dims.n_layers), dims.n_layers)
    if config.encoder == HIDDEN and layers[0] == 0:
        raise ValueError(
            "what enters layer 0 has read the last token alone: with hidden states, route from layer 1 up"
        )
    with claimed(folder, config, tasks, decoder.fingerprint):
        features = features_of(config.encoder, decoder, str(device))
        generator = torch.Generator().manual_seed(config.seed)
        router = kind(
            features.n_features,
            len(layers),
            dims.n_heads,
            config.rank,
            config.hidden_width,
            generator,
        )
        router.to(device)
        with frozen(decoder.model):
            pids = router.adopt(extract(decoder, tasks, layers, config, folder))
            queries, scale = training_queries(decoder, tasks, features, layers[0], config, folder)
            Trainer(decoder, pids, router, queries, config, folder).run()
    router.absorb(*scale)
    return pids, router.eval().requires_grad_(False), features


@contextmanager
def claimed(
    folder: Path | None, config: FitConfig, tasks: Sequence[Task], fingerprint: str
) -> Iterator[None]:
    """Inside, a folder is one fit's alone, made or taken up where it was left, and the same fit for all processes.

    ValueError names what differs, where the folder holds another fit or the processes were given different ones.
    """
    settings = {**dataclasses.asdict(config), "tasks": [task.name for task in tasks]}
    settings = json.loads(
        json.dumps({**settings, "model": fingerprint, "rows": rows_digest(tasks)})
    )
    agree(**settings)
    if folder is None:
        yield
        return
    with locked(folder):
        with first_one_first():
            file = folder / "fit.json"
            if (
                not file.exists()
            ):  # so for the first process alone: others would write over each other
                save_json(file, settings)
            found = load_json(file)
            if different := [key for key in settings if found.get(key) != settings[key]]:
                changes = ", ".join(
                    f"{key} was {found.get(key)!r}, is {settings[key]!r}" for key in different
                )
                raise ValueError(
                    f"{folder} holds a fit with other settings ({changes}): choose another folder"
                )
        yield
