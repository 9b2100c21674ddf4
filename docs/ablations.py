"""Writes docs/ablations.md from the sweeps under benchmarks/results/sweeps.

python docs/ablations.py
"""

import tomllib
from pathlib import Path
from typing import Any

from icrouting.runtime.storage import load_json
from icrouting.sweeping.presets import preset_of

ROOT = Path(__file__).parents[1]
SWEEPS = ROOT / "benchmarks" / "results" / "sweeps"
PAGE = ROOT / "docs" / "ablations.md"
PICTURES = ROOT / "docs" / "ablations"
# What we read in each sweep: a verdict and a sentence, by model and preset.
VERDICTS = ROOT / "docs" / "ablations.toml"
HEAD = """# The paper's ablations, measured

Each ablation of the paper, and some that it left out, is one command: `icr sweep --preset NAME`.
Below, each stands beside what the paper found. Expectations were written down before the runs:
[entry 47 of the log](../benchmarks/LOG.md). Made by `python docs/ablations.py`.

"Reproduced" means that the difference has the paper's sign and its interval leaves out zero.
"Cannot be told" means that the interval holds zero. Intervals are over items, for the fits that
were made. The paper's models have 7 billion parameters and more, ours far fewer: what is not
reproduced here may hold there.
"""


def verdicts() -> dict[str, dict[str, dict[str, str]]]:
    """Returns "verdict" and "here", by model and preset, in the order of the page."""
    return tomllib.loads(VERDICTS.read_text(encoding="utf-8"))


def overview(model: str, by_preset: dict[str, dict[str, str]]) -> list[str]:
    """Returns the lines of a model's table: the paper, what came here, the verdict."""
    lines = ["| what varies | what came here | beside the paper |", "| --- | --- | --- |"]
    for preset, read in by_preset.items():
        anchor = f"#{preset}-{model}".replace(".", "")
        lines.append(f"| [{preset}]({anchor}) | {read['here']} | {read['verdict']} |")
    return lines


def section(model: str, preset: str) -> list[str]:
    """Returns the lines of one sweep: what the paper found, table, picture, origin."""
    folder = SWEEPS / model / preset
    record = load_json(folder / "sweep.json")
    known = preset_of(preset)
    place = folder.relative_to(ROOT).as_posix()
    lines = [f"### {preset}, {model}", ""]
    lines += [
        f"The paper says ({known.section}): {known.found}".replace(" (not in the paper)", ""),
        "",
    ]
    lines += [*table_of(folder / "sweep.md"), ""]
    # Beside the page, so that a site of these pages has it.
    lines += [f"![{alt_text(record)}](ablations/{picture_name(model, preset)})", ""]
    names = ("json", "csv")
    links = ", ".join(f"[{name}](../{place}/sweep.{name})" for name in names)
    lines += [f"Record: {links}. Command: `{record['command']}`", ""]
    return lines


def picture_name(model: str, preset: str) -> str:
    """Returns the name of a sweep's picture beside the page."""
    return f"{model}-{preset}.svg"


def copy_pictures() -> None:
    """Puts every sweep's picture beside the page."""
    PICTURES.mkdir(exist_ok=True)
    for model, by_preset in verdicts().items():
        for preset in by_preset:
            picture = (SWEEPS / model / preset / "sweep.svg").read_bytes()
            (PICTURES / picture_name(model, preset)).write_bytes(picture)


def table_of(file: Path) -> list[str]:
    """Returns the table's lines of a sweep's own page."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|")]


def alt_text(record: dict[str, Any]) -> str:
    """Returns what a sweep's picture shows, in a sentence."""
    return f"Accuracy and difference to {record['reference']} of each setting. " + record[
        "conclusion"
    ].replace("\n", " ")


def page() -> str:
    """Returns docs/ablations.md."""
    lines = [HEAD]
    for model, by_preset in verdicts().items():
        lines += [f"## {model}", "", *overview(model, by_preset), ""]
        for preset in by_preset:
            lines += section(model, preset)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    copy_pictures()
    PAGE.write_text(page(), encoding="utf-8")
