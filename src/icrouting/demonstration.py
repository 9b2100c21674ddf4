"""The demo: the whole way, from nothing to a report, on pinned model, encoder and data."""

from pathlib import Path

from icrouting import commands, runs
from icrouting import methods as registry
from icrouting.config import FitConfig
from icrouting.evaluate import evaluate
from icrouting.tasks import rows_digest

MODEL = "pinned:smollm2-135m"
DATA = "pinned:staicc"
SOURCES = ("agnews", "sst2", "trec")
TASKS = (*SOURCES, "sst5", "mr", "subj", "emotion")
METHODS = ("zero-shot", "few-shot", "icr")


def run(out: Path, quick: bool) -> None:
    """Fits, evaluates and reports; each part goes on from what an earlier call left."""
    n_prompts, n_queries, n_test = (6, 60, 24) if quick else (40, 400, 120)
    config = FitConfig(n_prompts=n_prompts, n_queries=n_queries, encoder="pinned:minilm")
    console = commands.console
    console.print(f"In-Context Routing on {MODEL}: source tasks {', '.join(SOURCES)}, tested on {len(TASKS)} tasks")
    tasks = commands.load_tasks(TASKS, DATA)
    sources = [task for task in tasks if task.name in SOURCES]
    model, tokenizer = commands.load(MODEL)
    icr = commands.fit_and_save(out / "router", model, tokenizer, sources, config)
    methods = registry.make(METHODS, registry.Settings(router=str(out / "router")))
    runs.claim(
        out,
        runs.RunConfig(
            model=MODEL,
            data=DATA,
            rows=rows_digest(tasks),
            router=icr.digest(),
            methods=list(METHODS),
            tasks=runs.task_entries(tasks, SOURCES),
            seeds=[0],
            n_test=n_test,
            demos_per_class=config.demos_per_class,
            notes=[
                f"A demonstration: {n_prompts} extraction prompts and {n_queries} queries per source task, "
                f"{n_test} test items per task, one seed (the paper takes 5,000, 5,000, 500 and three)."
            ],
        ),
    )
    evaluate(model, tokenizer, methods, sources, tasks, [0], n_test, out / "records.jsonl")
    commands.finish(out, model, tokenizer, methods, sources, tasks, icr, out / "router" / "fit")
    commands.show(out)
    console.print(f"router: {out / 'router'}", soft_wrap=True)
