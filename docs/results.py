"""Writes docs/results.md and a page a run from the run folders under benchmarks/results.

python docs/results.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The runs that are shown, by folder, and what they are.
RUNS = {
    "smollm2-135m": "SmolLM2-135M-Instruct, all twelve tasks",
    "smollm2-135m-rivals-once": (
        "SmolLM2-135M-Instruct, every rival fitted once on the five source tasks"
    ),
    "smollm2-135m-rivals-in-domain": "SmolLM2-135M-Instruct, every rival fitted on each task",
    "smollm2-135m-rivals-in-domain-seed-1": (
        "SmolLM2-135M-Instruct, every rival fitted on each task, a second seed"
    ),
    "smollm2-135m-rivals-in-domain-sources": (
        "SmolLM2-135M-Instruct, rivals fitted on each source task, three seeds"
    ),
    "smollm2-135m-gated": "SmolLM2-135M-Instruct, ICR behind a gate",
    "smollm2-135m-controls-once": (
        "SmolLM2-135M-Instruct, ICR and its controls at the rivals' budget"
    ),
    "smollm2-135m-probes": (
        "SmolLM2-135M-Instruct, ICR beside linear probes with as many rows as queries"
    ),
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B, all twelve tasks",
    "qwen2.5-coder-0.5b-shots": "Qwen2.5-Coder-0.5B, few-shot prompts",
    "qwen2.5-coder-0.5b-one-seed": "Qwen2.5-Coder-0.5B, ICR behind a gate, and I2CL",
    "qwen2.5-coder-0.5b-rivals-once": "Qwen2.5-Coder-0.5B, rivals fitted once",
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B, all twelve tasks",
    "demo": "The demo, SmolLM2-135M-Instruct on seven tasks",
}
HEAD = """# Results

Made from [`benchmarks/results`](../benchmarks/results) by `python docs/results.py`; every table
names its command, commit, seeds and what was cut short. The twelve-task runs come from
[`twelve-tasks.sh`](../benchmarks/recipes/twelve-tasks.sh), their routers are in
[`routers`](../routers); the rivals' and the controls' runs come from
[`rivals.sh`](../benchmarks/recipes/rivals.sh), and [who wins, in detail](who-wins-details.md) reads
them. Where an `answers.json` lies beside a run's figures, it holds what every method
chose on every item (`icr report RUN --keep-answers FOLDER`): `icr report FOLDER --restore-to RUN`
makes the run of it again, to be paired with others (`icr report RUN RUN --leads`) or gone on with.

The paper's tables: its table 1 (twelve tasks) is the first table here, and for rivals that are
taken over to unseen tasks the one of rivals fitted once; its table 2 (vectors fitted on each
in-domain task) and the LoRA of its table 8 are the source columns of the tables fitted on each
task; its table 11 (numbers kept, cost of a fit) is under rivals'.
"""


# The line of a report that ends in its command, which may be thousands of characters long.
RECIPE = re.compile(r"^- (Model .*?, commit [\w-]+): (.*)$", re.MULTILINE)


def report_of(run: str) -> str:
    """Returns a run's report."""
    return (RESULTS / run / "report.md").read_text(encoding="utf-8").strip()


def page() -> str:
    """Returns docs/results.md: each run's conclusion, and where its page is."""
    parts = [HEAD]
    for run, title in RUNS.items():
        # A report begins with its conclusion.
        conclusion = report_of(run).split("\n\n")[0]
        link = f"[Table, seeds, times and command](results/{run}.md)"
        parts.append(f"## {title}\n\n{conclusion}\n\n{link}\n")
    return "\n".join(parts)


def run_page(run: str) -> str:
    """Returns the page of a run: its report, with the command folded away."""
    folded = RECIPE.sub(
        r"- \1.\n\n<details><summary>Command</summary>\n<pre><code>\2</code></pre>\n</details>",
        report_of(run).replace("&&", "&amp;&amp;"),
    )
    record = f"Made from [its record](../../benchmarks/results/{run}) by `python docs/results.py`."
    return f"# {RUNS[run]}\n\n{record} [All runs](../results.md).\n\n{folded}\n"


def pages() -> dict[Path, str]:
    """Returns the text of every page of results by its file."""
    docs = ROOT / "docs"
    by_file = {docs / "results" / f"{run}.md": run_page(run) for run in RUNS}
    return {docs / "results.md": page(), **by_file}


if __name__ == "__main__":
    for file, text in pages().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
