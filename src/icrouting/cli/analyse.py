"""What `icr analyse` does, once its arguments are parsed."""

from collections.abc import Sequence
from pathlib import Path

from icrouting.analysing import page
from icrouting.analysing.config import AnalysisConfig
from icrouting.analysing.run import AnalysisFolder, Finding, analyse
from icrouting.analysing.study import Study
from icrouting.cli.loading import base_of_router, console, load, load_tasks, stoppable
from icrouting.decoder.backbone import Backbone
from icrouting.decoder.batches import context_length
from icrouting.decoder.decoder import Decoder
from icrouting.evaluation.items import within
from icrouting.icr import InContextRouter
from icrouting.routing.sources import as_learned
from icrouting.runtime.storage import save_text


def analyse_router(router: str, out: Path, model: Backbone, config: AnalysisConfig) -> None:
    """Analyses a router, prints what each picture says and writes the page.

    Args:
        router: its folder or hub id.
        out: the folder of the page and its tables.
        model: its base model.
        config: what to analyse.
    """
    folder = AnalysisFolder(out)
    with stoppable(lambda: _kept(folder)):
        icr = InContextRouter.from_pretrained(router)
        sources = icr.description.sources or ()
        names = config.tasks or tuple(icr.description.tasks)
        tasks = [as_learned(task, sources) for task in load_tasks(names, config.data)]
        base, tokenizer = load(base_of_router(model, icr))
        for place, task in enumerate(tasks):
            bound_task = task.bound_to(tokenizer)
            tasks[place], note = within(bound_task, tokenizer, context_length(base))
            if note:
                console.print(note, markup=False)
        study = Study.of(icr, Decoder.of(base, tokenizer), tasks, config)
        about = f"{base_of_router(model, icr)}, router {router} ({icr.digest()})"
        findings: list[Finding] = []
        for finding in analyse(study, folder):
            findings.append(finding)
            _show(finding)
            # After every part, so that one who stops it has a page too.
            save_text(folder.page, page.html(study, findings, folder, about))
    console.print(f"page: {folder.page}", soft_wrap=True, markup=False, highlight=False)


def _show(finding: Finding) -> None:
    """Prints a part's sentences."""
    kept = " (kept from an earlier run)" if finding.was_kept else ""
    console.print(f"{finding.part.title}{kept}", markup=False, highlight=False)
    for picture in finding.pictures:
        console.print(f"- {picture.says}", markup=False, highlight=False)


def _kept(folder: AnalysisFolder) -> str:
    parts: Sequence[str] = list(folder.kept())
    if not parts:
        return "no part was computed yet, the same command begins anew"
    return f"{folder.path} keeps {', '.join(parts)}; the same command goes on from there"
