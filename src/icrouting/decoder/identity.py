"""Identity: what tells a frozen decoder apart from every other."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from icrouting.decoder.families import base_of

_SAMPLES_PER_WEIGHT = 16
# What models are kept in, from coarse to fine.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# How close float16 has its numbers around zero, where other dtypes have finer ones.
_FINEST_STEP = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """A weight's shape, and numbers taken evenly from it."""

    shape: Shape
    numbers: Tensor


def fingerprint(model: nn.Module) -> str:
    """Returns 16 hex digits that identify a model's architecture and weights.

    A strided sample of every weight, rounded to bfloat16, so that the same checkpoint loaded as
    float32 or as bfloat16, with or without LoRA around it, gives the same digits.
    """
    return weights_digest(base_of(model))


def weights_digest(module: nn.Module) -> str:
    """Returns 16 hex digits that identify a module's weights."""
    texts = []
    for name, sample in sorted(_samples(module, {}).items()):
        numbers = sample.numbers.to(torch.bfloat16).float().cpu().tolist()
        texts.append(f"{name}{sample.shape}{numbers}")
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def base_weights(model: nn.Module) -> dict[str, str]:
    """Returns the shape and sampled numbers of each of a model's weights, as text by name.

    `difference` reads them: they tell whether another model is this one rounded or with rows added
    to its vocabulary, which the digits of a fingerprint cannot.
    """
    texts = {}
    for name, sample in _samples(base_of(model), {}).items():
        numbers = sample.numbers.float().cpu().numpy().astype("<f4")
        encoded = base64.b64encode(numbers.tobytes()).decode()
        texts[name] = f"{'x'.join(map(str, sample.shape))} {encoded}"
    return texts


def read_weight(text: str) -> Sample:
    """Returns what a text of `base_weights` holds; ValueError for any other."""
    sizes, _, encoded = text.partition(" ")
    try:
        shape = tuple(int(size) for size in sizes.split("x") if size)
        content = np.frombuffer(base64.b64decode(encoded, validate=True), "<f4")
    except ValueError as error:
        raise ValueError(f"expected shape and numbers of a weight, got {text!r:.60}") from error
    if len(content) != min(_SAMPLES_PER_WEIGHT, prod(shape)):
        raise ValueError(f"expected shape and numbers of a weight, got {text!r:.60}")
    return Sample(shape, torch.from_numpy(content.astype(np.float32)))


def difference(model: nn.Module, expected: Mapping[str, str]) -> str | None:
    """Returns what makes a model another one than the one described, None where nothing does.

    Rounding does not: a model in float16 and its copy in bfloat16 are one. Nor do rows at the end
    of the vocabulary, or a vocabulary head that is tied to the embeddings in one of the two alone.

    Args:
        model: the model.
        expected: what `base_weights` gave for the other.
    """
    base = base_of(model)
    stored = {name: read_weight(text) for name, text in expected.items()}
    embeddings = f"{_name_in(base, base.get_input_embeddings())}.weight"
    head_module = _name_in(base, base.get_output_embeddings())
    head = f"{head_module}.weight"
    # A head that is tied to the embeddings is no weight of its own.
    if embeddings in stored:
        stored.setdefault(head, stored[embeddings])
    here = _samples(base, {name: sample.shape for name, sample in stored.items()})
    if embeddings in here:
        here.setdefault(head, here[embeddings])
    for name in sorted(stored.keys() ^ here.keys()):
        return f"it has no {name}" if name in stored else f"it has {name} beside"
    for name, sample in stored.items():
        shape = here[name].shape
        is_of_vocabulary = name in (embeddings, head, f"{head_module}.bias")
        if is_of_vocabulary and shape[1:] == sample.shape[1:]:
            continue
        if shape != sample.shape:
            return f"its {name} is of shape {shape}, not {sample.shape}"
    return _other_numbers(stored, here)


def _other_numbers(stored: Mapping[str, Sample], here: Mapping[str, Sample]) -> str | None:
    """Returns which weights hold other numbers than rounding explains, None where none does."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, sample in stored.items():
        numbers = here[name].numbers.float().cpu()
        # Of a smaller vocabulary the last rows are not there.
        n_both = min(len(numbers), len(sample.numbers))
        pairs[name] = sample.numbers[:n_both], numbers[:n_both]
    # Numbers that went through a coarse dtype stay coarse in a finer one.
    coarseness = [_place_of_dtype(torch.cat(side)) for side in zip(*pairs.values(), strict=True)]
    dtype = _DTYPES[min(coarseness)]
    changed = []
    for name, (numbers, numbers_here) in pairs.items():
        if not _are_alike(numbers, numbers_here, dtype):
            changed.append(name)
    if not changed:
        return None
    numbers, numbers_here = pairs[changed[0]]
    place = int((numbers_here - numbers).abs().nan_to_num(torch.inf).argmax())
    return (
        f"{len(changed)} of its {len(pairs)} weights hold other numbers, {changed[0]} for one "
        f"({numbers_here[place]:.6g}, not {numbers[place]:.6g})"
    )


def _place_of_dtype(numbers: Tensor) -> int:
    """Returns the place of the coarsest dtype that has all of these numbers."""
    for place, dtype in enumerate(_DTYPES[:-1]):
        if torch.equal(numbers.to(dtype).float(), numbers):
            return place
    return len(_DTYPES) - 1


def _are_alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two samples may be of one weight, the coarser of them in a dtype."""
    rounded = one.to(dtype).float()
    other_rounded = other.to(dtype).float()
    if dtype != torch.bfloat16:
        return torch.equal(rounded, other_rounded)
    # Rounded to float16 on the way, one number in sixteen ends a step away. A model that was
    # trained further by so little has moved many of them, and small ones by more than a step.
    gap = (rounded - other_rounded).abs()
    exponent = torch.frexp(torch.maximum(rounded.abs(), other_rounded.abs())).exponent - 1
    step = torch.ldexp(torch.full_like(gap, torch.finfo(dtype).eps), exponent)
    is_moved = gap > _FINEST_STEP
    n_far = int((gap > step.clamp_min(_FINEST_STEP)).sum())
    return n_far == 0 and int(is_moved.sum()) <= len(gap) // 2 + 1


def _samples(module: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, Sample]:
    """Returns a sample of each weight by name.

    Args:
        module: holds the weights.
        shapes: of weights that are sampled at the places where one of that shape would be.
    """
    # Tied weights count once; off-loaded ones are no longer one object, so names tell them.
    tied = getattr(module, "all_tied_weights_keys", {})
    counted = set()
    for name, _ in module.named_parameters():
        if "lora_" not in name and name not in tied:
            counted.add(name)
    samples = {}
    for prefix, owner in module.named_modules():
        # Brings off-loaded weights in, for as long as they are read.
        with align_module_device(owner):
            for name, weight in owner.named_parameters(prefix, recurse=False):
                if name not in counted:
                    continue
                # LoRA keeps the plain layer as its `base_layer`.
                plain_name = name.replace(".base_layer", "")
                shape = tuple(weight.shape)
                flat = weight.detach().reshape(-1)
                stride = max(1, prod(shapes.get(plain_name, shape)) // _SAMPLES_PER_WEIGHT)
                # A copy: the weight may leave again.
                numbers = flat[::stride][:_SAMPLES_PER_WEIGHT].clone()
                samples[plain_name] = Sample(shape, numbers)
    return samples


def _name_in(base: PreTrainedModel, module: nn.Module | None) -> str | None:
    """Returns what a model calls a module inside it."""
    for name, part in base.named_modules():
        if part is module:
            return name
    return None
