"""What `icr serve` does, once its arguments are parsed."""

import os
from collections.abc import Sequence
from pathlib import Path

from icrouting import several
from icrouting.cli.loading import base_of_router, console, load
from icrouting.decoder.backbone import Backbone
from icrouting.icr import InContextRouter
from icrouting.serving.app import Service, create_app
from icrouting.serving.limits import Limits
from icrouting.serving.server import listening, run

KEY = "ICR_API_KEY"


def serve(
    artifacts: Sequence[str],
    model: Backbone,
    host: str,
    port: int,
    limits: Limits,
) -> None:
    """Serves a model with routers until it is told to end."""
    folders = named(artifacts)
    opened = listening(host, port)
    with opened:
        routers = {
            name: InContextRouter.from_pretrained(folder) for name, folder in folders.items()
        }
        first = next(iter(routers.values()))
        base, tokenizer = load(base_of_router(model, first))
        with several.attach(routers, base, tokenizer) as attached:
            digests = {name: icr.digest() for name, icr in routers.items()}
            service = Service(attached, limits, digests)
            address = f"http://{host}:{opened.getsockname()[1]}"
            names = ", ".join(attached.names)
            console.print(f"serving {names} at {address}/v1 (ctrl-C ends it)", markup=False)
            run(create_app(service, os.environ.get(KEY) or None), opened)
    console.print("stopped; what was in flight was answered")


def named(artifacts: Sequence[str]) -> dict[str, str]:
    """Returns the folders of routers by the names that requests call them by.

    Raises:
        ValueError: two have one name, or one is the base model's.
    """
    folders: dict[str, str] = {}
    for artifact in artifacts:
        name, sign, folder = artifact.partition("=")
        if not sign:
            folder = artifact
            name = Path(artifact).name or artifact
        if not name or not folder:
            raise ValueError(f"expected FOLDER or NAME=FOLDER, got {artifact!r}")
        if name in folders:
            raise ValueError(f"two routers are called {name!r}: name one of them NAME=FOLDER")
        if name == several.BASE:
            raise ValueError(f"{name!r} is the model as it is: call the router something else")
        folders[name] = folder
    return folders
