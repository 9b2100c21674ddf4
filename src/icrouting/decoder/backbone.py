"""Which model a command loads; light, so that `--help` comes at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backbone:
    """Which frozen model, and where it goes.

    Attributes:
        model: Hub id, local folder, .gguf file, or "pinned:smollm2-135m".
        device_map: "auto" or "balanced" spreads it over accelerators, memory and disk; by default
            one device holds it.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    device_map: str | None = None

    def __str__(self) -> str:
        return self.model
