"""Writes docs/support.md from the ways and families that the tests run over.

python docs/support.py
"""

import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# What is supported

Made by `python docs/support.py` from what the tests run over: `tests/ways.py` for the ways of
running a model, `tests/test_families.py` for the families. "Works" means: a test compares it, in
float32 on tiny sharp models, with the slow obvious version, one prompt at a time on dense matrices
without padding or cache (`tests/reference.py`). It also checks that without the routing it would
come out otherwise. "Raises" means: a `ValueError` or a `RuntimeError` with the sentence given, and
a test that it comes. Everything was run on a processor, with the versions in `constraints.txt`.
Besides, `tests/test_accelerator.py` was run once, in an earlier form, on one NVIDIA H100 (torch
2.11.0, transformers 5.17.0). Routed logits of every family but Gemma 2 equal the processor's
reference there on `sdpa` and `eager`, caches (three families) one pass, and every method (Llama,
Gemma 3) what it gives after saving and loading. That a router fitted there answers alike on a
processor was not run.
"""


def ways() -> str:
    """Returns a table of ways for each of their groups."""
    # The tests' folder is on the path only when this file is run.
    from ways import WAYS

    parts = []
    for group in dict.fromkeys(way.group for way in WAYS):
        parts.append(f"## {group}\n\n| way | outcome | |\n|---|---|---|")
        for way in WAYS:
            if way.group == group:
                parts.append(f"| {way.name} | {way.outcome} | {remark(way)} |")
        parts.append("")
    return "\n".join(parts)


def remark(way) -> str:
    """Returns the sentence that a way raises, its note and where else it is tested."""
    sentence = f"“{way.raises}”" if way.raises else ""
    remarks = [sentence, way.note, way.elsewhere]
    return "; ".join(text for text in remarks if text)


def families() -> str:
    """Returns the tables of families and of the laws that are tested for every one of them."""
    import test_families
    import tiny

    parts = ["## Families\n\n| family | model type | kernel | sliding window |\n|---|---|---|---|"]
    for family, config in tiny.ALL_CONFIGS.items():
        slides = "yes" if getattr(config, "sliding_window", None) else ""
        kernel = tiny.model_of(family).config._attn_implementation
        parts.append(f"| {family} | `{config.model_type}` | `{kernel}` | {slides} |")
    parts.append("\nFor every family:\n\n| law | tested with |\n|---|---|")
    for name, law in inspect.getmembers(test_families, inspect.isfunction):
        axes = tested_values(law)
        # A law of every family is a test over all of them.
        if name.startswith("test_") and axes.pop("family", None):
            sentence = name.removeprefix("test_").replace("_", " ")
            values = [f"{axis}: {', '.join(map(str, axes[axis]))}" for axis in sorted(axes)]
            parts.append(f"| {sentence} | {'; '.join(values)} |")
    return "\n".join(parts) + "\n"


def tested_values(law) -> dict[str, list]:
    """Returns a test's parameters by axis: the values, or their names where they have some."""
    axes = {}
    for mark in getattr(law, "pytestmark", ()):
        if mark.name == "parametrize":
            axis, values = mark.args[:2]
            axes[axis] = mark.kwargs.get("ids") or values
    return axes


def page() -> str:
    """Returns docs/support.md."""
    return "\n".join((HEAD, ways(), families()))


if __name__ == "__main__":
    sys.path.append(str(ROOT / "tests"))
    (ROOT / "docs" / "support.md").write_text(page())
