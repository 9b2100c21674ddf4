"""Which model a command loads; light, so that `--help` comes at once."""

from dataclasses import dataclass, replace
from typing import Literal

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Backbone:
    """Which frozen model, and where it goes.

    Attributes:
        model: Hub id, local folder, .gguf file, or "pinned:smollm2-135m"; by default the one that
            the router was fitted on, and HuggingFaceTB/SmolLM2-135M-Instruct without a router.
        device_map: "auto" or "balanced" spreads it over accelerators, memory and disk; by default
            one device holds it.
        device: The device that holds it: "cpu", "cuda", "cuda:1" or "mps"; by default the
            accelerator where there is one.
        dtype: What its weights are computed in: "float32", "bfloat16" or "float16"; "auto" asks the
            hardware. Answers in another dtype are another measurement.
    """

    model: str | None = None
    device_map: str | None = None
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self):
        if self.device is not None and self.device_map is not None:
            raise ValueError(
                f"expected --device or --device-map, got both ({self.device!r}, "
                f"{self.device_map!r}): leave one out"
            )

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The model's name, or the default."""
        return self.model or DEFAULT_MODEL

    def or_else(self, name: str) -> "Backbone":
        """Returns this, with a name where it has none."""
        return replace(self, model=self.model or name)
