"""Which model a command loads; light, so that `--help` comes at once."""

from dataclasses import dataclass, replace

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Backbone:
    """Which frozen model, and where it goes.

    Attributes:
        model: Hub id, local folder, .gguf file, or "pinned:smollm2-135m"; by default the one that
            the router was fitted on, and HuggingFaceTB/SmolLM2-135M-Instruct without a router.
        device_map: "auto" or "balanced" spreads it over accelerators, memory and disk; by default
            one device holds it.
    """

    model: str | None = None
    device_map: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The model's name, or the default."""
        return self.model or DEFAULT_MODEL

    def or_else(self, name: str) -> "Backbone":
        """Returns this, with a name where it has none."""
        return replace(self, model=self.model or name)
