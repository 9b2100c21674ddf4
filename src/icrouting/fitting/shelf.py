"""The shelf: a folder where stages of fits lie by what they depend on, for many fits to share.

    SHELF/extraction-<digest>/   stage.json, moments.safetensors, pids-<basis>-<rank>.safetensors
    SHELF/trunk-<digest>/        stage.json, trunk.bin, trunk.safetensors
    SHELF/held-<digest>/         the same of validation rows, where fits share a shelf

A digest is that of the settings in stage.json, so that what does not change a stage (a learning
rate, for the trunk the rank too) finds it again, and what does change it never does. Several
processes may use a shelf at once: who needs a stage that another one is computing waits for it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from icrouting.config import EARLIER, FitConfig
from icrouting.decoder.batches import tokenize
from icrouting.decoder.decoder import Decoder
from icrouting.fitting.drawing import demo_encoder
from icrouting.fitting.extraction import MOMENTS_FILE
from icrouting.fitting.pca import QKMoments
from icrouting.fitting.rows import rows_to_learn_from
from icrouting.fitting.trunk import TRUNK_FILE
from icrouting.routing.pids import PIDs
from icrouting.runtime.locks import locked
from icrouting.runtime.processes import decided, is_first, wait
from icrouting.runtime.storage import (
    load_json,
    load_metadata,
    load_tensors,
    save_json,
    save_tensors,
)
from icrouting.tasks.task import Task, rows_digest, template_digest

EXTRACTION = "extraction"
TRUNK = "trunk"
HELD = "held"
STAGE_FILE = "stage.json"
N_DIGITS = 16
# Training rows of a task that are tokenized to know the tokenizer by.
N_READ = 200
# The settings of a fit that the extraction depends on, beside model, layers and rows.
EXTRACTION_SETTINGS = (
    *("n_prompts", "demos_per_class", "queries_per_context", "skip_nan", "seed"),
    *("demo_selection", "extract_from", "pooling"),
)
# Those that the trunk depends on.
TRUNK_SETTINGS = ("n_queries", "max_tokens", "seed")
_PID_TENSORS = (
    "query_pids",
    "key_pids",
    "query_std",
    "key_std",
    "query_explained",
    "key_explained",
)


@dataclass(frozen=True)
class Shelf:
    """Where one fit's stages lie.

    Attributes:
        extraction: folder of the moments and the PIDs; None keeps none.
        trunk: folder of the trunk's states; None keeps none.
        about: what each stage depends on, by its name.
    """

    extraction: Path | None
    trunk: Path | None
    about: dict[str, dict[str, object]]

    @classmethod
    def of(
        cls,
        root: Path | None,
        decoder: Decoder,
        tasks: Sequence[Task],
        layers: tuple[int, ...],
        config: FitConfig,
    ) -> "Shelf":
        """Returns where a fit's stages lie in the folder `root`; None keeps none."""
        if root is None:
            return cls(None, None, {})
        # A fingerprint is the same in every dtype, and what the model computes is not.
        common = {
            "model": decoder.fingerprint,
            "dtype": str(decoder.model.dtype),
            "context_length": decoder.context_length,
            "tokens": _digest_of_tokens(decoder, tasks),
        }
        values = vars(config)
        extraction = {**common, "rows": _digest_of_rows(tasks), "layers": list(layers)}
        for name in EXTRACTION_SETTINGS:
            # What an earlier version extracted is found by what it knew of.
            if name not in EARLIER or values[name] != EARLIER[name]:
                extraction[name] = values[name]
        encoder = demo_encoder(config)
        if encoder is not None:
            extraction["encoder"] = encoder.fingerprint
        # Of few rows, those that are held back elsewhere are learned from too.
        learned = [
            replace(task, train=tuple(rows_to_learn_from(task, tasks, config))) for task in tasks
        ]
        trunk = {**common, "rows": _digest_of_rows(learned), "first_layer": layers[0]}
        trunk |= {name: values[name] for name in TRUNK_SETTINGS}
        return cls(
            root / f"{EXTRACTION}-{_digest(extraction)}",
            root / f"{TRUNK}-{_digest(trunk)}",
            {EXTRACTION: extraction, TRUNK: trunk},
        )

    @contextmanager
    def opened(self, stage: str) -> Iterator[Path | None]:
        """Inside, a stage's folder is this run's alone; who finds it taken waits."""
        folder = {EXTRACTION: self.extraction, TRUNK: self.trunk}[stage]
        if folder is None:
            yield None
            return
        with locked(folder, is_patient=True):
            if is_first():
                save_json(folder / STAGE_FILE, {"stage": stage, **self.about[stage]})
            yield folder

    def kept(self, n_prompts: int) -> list[str]:
        """Returns what an earlier fit left of these stages, a phrase each.

        Args:
            n_prompts: of the whole extraction, at most.
        """
        phrases = []
        if self.extraction is not None:
            metadata = load_metadata(self.extraction / MOMENTS_FILE)
            if metadata is not None:
                n_done = int(metadata["n_done"])
                # Prompts that are too long for the model are left out of the whole, too.
                is_whole = n_done == n_prompts or _is_whole(self.extraction)
                of_all = "" if is_whole else f" of {n_prompts:,}"
                phrases.append(f"extraction kept: {n_done:,}{of_all} prompts")
        if self.trunk is not None and (self.trunk / TRUNK_FILE).exists():
            phrases.append("trunk kept")
        return phrases


@contextmanager
def opened_held(root: Path | None, shelf: Shelf, tasks: Sequence[Task]) -> Iterator[Path | None]:
    """Inside, the folder of validation rows' states on a shared shelf is this run's alone.

    Args:
        root: the shared shelf; None has no such folder.
        shelf: where the fit's other stages lie.
        tasks: the source tasks.
    """
    if root is None:
        yield None
        return
    about = dict(shelf.about[TRUNK])
    # Whatever is trained on.
    del about["n_queries"]
    about["rows"] = _digest_of_rows([replace(task, train=task.validation) for task in tasks])
    folder = root / f"{HELD}-{_digest(about)}"
    with locked(folder, is_patient=True):
        yield folder


def delete_trunks(root: Path) -> None:
    """Deletes the states of all trunks of a shelf, which are as large as their tokens are many.

    One that another run is writing stays.
    """
    # An earlier version's lies in the folder itself.
    (root / TRUNK_FILE).unlink(missing_ok=True)
    for folder in sorted(root.glob(f"{TRUNK}-*")):
        try:
            with locked(folder):
                (folder / TRUNK_FILE).unlink(missing_ok=True)
        # Another run's, which goes on.
        except ValueError:
            continue


def load_pids(folder: Path | None, layers: tuple[int, ...], config: FitConfig) -> PIDs | None:
    """Returns the PIDs that an extraction's folder keeps, None where it has none of this rank."""
    if folder is None:
        return None
    file = _pids_file(folder, config)
    # The first process alone looks, since another one may be writing it by now.
    if not decided(file.exists()):
        return None
    tensors, _ = load_tensors(file)
    return PIDs(layers=layers, basis=config.basis, **tensors)


def save_pids(folder: Path | None, pids: PIDs, config: FitConfig) -> None:
    """Keeps PIDs in the folder of their extraction, which is whole from here on."""
    if folder is None:
        return
    if is_first():
        tensors = {name: getattr(pids, name).contiguous() for name in _PID_TENSORS}
        save_tensors(_pids_file(folder, config), tensors)
    wait()


def load_moments(folder: Path | None) -> QKMoments | None:
    """Returns the moments of an extraction that is whole, None where there is none."""
    # Whoever goes on with half of one draws its prompts again, of a whole one nobody need.
    if folder is None or not decided(_is_whole(folder)):
        return None
    tensors, _ = load_tensors(folder / MOMENTS_FILE)
    return QKMoments.from_tensors(tensors)


def load_wider_moments(shelf: Shelf) -> QKMoments | None:
    """Returns an extraction's moments, taken from a whole one of the same prompts and more layers.

    None where the shelf has no such extraction. Where prompts are skipped that are not finite, more
    layers may skip more of them, and nothing is taken.
    """
    if shelf.extraction is None or shelf.about[EXTRACTION]["skip_nan"]:
        return None
    wanted = json.loads(json.dumps(shelf.about[EXTRACTION]))
    layers = wanted.pop("layers")
    for file in sorted(shelf.extraction.parent.glob(f"{EXTRACTION}-*/{STAGE_FILE}")):
        content = load_json(file)
        wider_layers = content.pop("layers", [])
        is_of_same_prompts = content == {"stage": EXTRACTION, **wanted}
        is_wider = is_of_same_prompts and set(layers) < set(wider_layers)
        if decided(is_wider and _is_whole(file.parent)):
            tensors, _ = load_tensors(file.parent / MOMENTS_FILE)
            moments = QKMoments.from_tensors(tensors)
            return moments.of_layers([wider_layers.index(layer) for layer in layers])
    return None


def _is_whole(folder: Path) -> bool:
    """Whether an extraction was run to its end, which its first PIDs say."""
    return any(folder.glob("pids-*.safetensors")) and (folder / MOMENTS_FILE).exists()


def _pids_file(folder: Path, config: FitConfig) -> Path:
    return folder / f"pids-{config.basis}-{config.rank}.safetensors"


def _digest(settings: dict[str, object]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:N_DIGITS]


def _digest_of_tokens(decoder: Decoder, tasks: Sequence[Task]) -> str:
    """Returns digits that identify how a tokenizer reads tasks, by their first training rows.

    Tokenizers of one vocabulary may put other tokens before a text, or part its words otherwise.
    """
    texts = []
    for task in tasks:
        for row in task.train[:N_READ]:
            prompt = task.prompt(row)
            texts += [prompt, prompt + task.joint + task.answer(row)]
    token_lists = tokenize(decoder.tokenizer, texts)
    return hashlib.sha256(json.dumps(token_lists).encode()).hexdigest()[:N_DIGITS]


def _digest_of_rows(tasks: Sequence[Task]) -> str:
    """Returns digits that identify what a fit reads of tasks: training rows, and how they read."""
    digest = hashlib.sha256()
    for task in tasks:
        # Whatever it is called, and whatever it is tested on.
        spec = replace(task.spec, name="", group="")
        digest.update(rows_digest([replace(task, spec=spec, validation=(), test=())]).encode())
    template = template_digest(tasks)
    if template is not None:
        digest.update(template.encode())
    return digest.hexdigest()[:N_DIGITS]
