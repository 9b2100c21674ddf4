"""What every command loads: models, and what it reads before one."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from icrouting.cli.reading import console as console
from icrouting.cli.reading import load_tasks as load_tasks
from icrouting.cli.reading import stoppable as stoppable
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.loading import dtype_of, load_model
from icrouting.icr import InContextRouter

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load(model: Backbone) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a model and its tokenizer, without the loaders' bars."""
    disable_progress_bar()  # they would fill the terminal between ours
    return load_model(
        model.name,
        device_map=model.device_map,
        device=model.device,
        dtype=dtype_of(model.dtype),
    )


def base_of_router(model: Backbone, icr: InContextRouter) -> Backbone:
    """Returns the model that was asked for, or else the one that a router was fitted on.

    Raises:
        ValueError: none was asked for, and the router does not say which it was.
    """
    return model if model.model else model.or_else(icr.base_model)
