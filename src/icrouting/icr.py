"""InContextRouter: fit once on a few tasks, attach to the same model on any task."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import transformers
from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from torch import nn
from transformers import PreTrainedTokenizerBase

from icrouting.config import BiasRows, FitConfig, check_bias_rows
from icrouting.decoder.decoder import Decoder
from icrouting.fitting import stages as fitting
from icrouting.fitting.gating import fit_gate
from icrouting.fitting.queries import Query
from icrouting.fitting.rows import n_judged, n_learned
from icrouting.fitting.warm import Start
from icrouting.routing import artifact, shipped
from icrouting.routing.card import model_card
from icrouting.routing.description import Description, describe
from icrouting.routing.features import features_of
from icrouting.routing.gate import PromptGate
from icrouting.routing.ownership import check_place_on_hub
from icrouting.routing.pids import PIDs
from icrouting.routing.reader import Gate, Reader
from icrouting.routing.rerouting import rerouted, unrouted
from icrouting.routing.routed import Routed
from icrouting.routing.router import Router, Spread, check_spread
from icrouting.routing.shipped import TaskCalibration
from icrouting.routing.sources import FormWatch
from icrouting.runtime.showing import in_short, ranges
from icrouting.tasks.task import Task, TaskSpec, digest_of_template


@dataclass(frozen=True, eq=False)
class InContextRouter(ModelHubMixin):
    """PIDs and a trained router for one base model (arXiv 2509.22854).

    `save_pretrained(folder)` writes config.json, model.safetensors and a model card,
    `push_to_hub("owner/name")` uploads them; both keep a card as it stands, with the results
    recorded in it, and overwrite nothing but a router. config.json holds one prompt of each source
    task, and the card shows one of these.

    Attributes:
        description: what it is and where it comes from; the artifact's config.json.
        pids: the directions.
        router: the trained router.
        folder: where it was loaded from; None if it was fitted here.
        gate: which prompts it routes; None where it routes all.
        calibrations: tasks' priors, by which `predict` calibrates what the gate leaves alone.

    Examples:
        A model of two layers and a vocabulary of six words stands for a real one (`load_model`).

        >>> from tempfile import TemporaryDirectory
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from icrouting import Example, FitConfig, InContextRouter, Task, TaskSpec
        >>> vocabulary = dict(a=0, dull=1, nice=2, film=3, bad=4, good=5)
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=6, num_hidden_layers=2, **sizes))
        >>> rows = (Example({"text": "dull"}, (), 0), Example({"text": "nice"}, (), 1)) * 8
        >>> task = Task(TaskSpec("mood", "near", "a {text} film", ("bad", "good")), rows, ())
        >>> config = FitConfig((1,), rank=2, n_prompts=8, encoder="hidden", min_steps=2, patience=0)
        >>> with TemporaryDirectory() as folder:
        ...     InContextRouter.fit(model, tokenizer, [task], config).save_pretrained(folder)
        ...     icr = InContextRouter.from_pretrained(folder)
        >>> with icr.attached(model, tokenizer) as routed:
        ...     routed.score(["a nice film", "a dull film"], ["bad", "good"]).shape
        torch.Size([2, 2])
    """

    description: Description
    pids: PIDs
    router: Router
    folder: Path | None = None
    gate: PromptGate | None = None
    calibrations: tuple[TaskCalibration, ...] = ()

    # Where this is empty, the mixin would set it on every new object, which is frozen.
    _hub_mixin_config: ClassVar[dict] = {"method": "icr"}

    def __repr__(self) -> str:
        fitted = self.description
        tasks = ", ".join(fitted.tasks) or "unnamed tasks"
        variants = "".join(f"{phrase}, " for phrase in fitted.fit.variants())
        return (
            f"InContextRouter({fitted.base_model!r}, fitted on {in_short(tasks)}, layers "
            f"{ranges(fitted.layers)}, rank {fitted.fit.rank}, {variants}digest {self.digest()})"
        )

    def __eq__(self, other: object) -> bool:
        """Whether another router is the same one, wherever it was loaded from."""
        if not isinstance(other, InContextRouter):
            return NotImplemented
        is_same_router = self.digest() == other.digest() and self.gate == other.gate
        is_same_router = is_same_router and self.calibrations == other.calibrations
        return self.description == other.description and is_same_router

    def __hash__(self) -> int:
        return hash(self.digest())

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        config: FitConfig | None = None,
        *,
        folder: str | Path | None = None,
        token_budget: int | None = None,
        stages: str | Path | None = None,
        start: "InContextRouter | None" = None,
        keep: int = 0,
        gate: bool = True,
    ) -> "InContextRouter":
        """Returns a router fitted on source tasks: extraction, PIDs, training (sections 2 to 4).

        Args:
            model: a frozen decoder of a known family, from `load_model`, `from_pretrained` or peft.
            tokenizer: its tokenizer.
            tasks: the source tasks.
            config: settings; None takes the defaults.
            folder: keeps the stages' results, so that a fit that was stopped goes on from there;
                what fits with other settings left in it is taken up as far as it is the same. Each
                trunk.bin in it, as large as the tokens are many, can be deleted once the router is
                saved.
            token_budget: padded tokens of a forward pass; fewer take less memory, and move numbers
                by rounding alone. None takes 4,096.
            stages: another folder for the results of extraction, PCA and trunk, which many fits
                can share, also at once: each is kept by what it depends on, so that another
                learning rate or rank does not extract again. None keeps them in `folder`.
            start: a router of this model to go on from, with new tasks beside those that it knows:
                its directions are kept and nothing is extracted; settings that shape a router
                (`fitting.warm.SHAPING`) are its own, whatever is left at its default.
            keep: training rows of each task that `start` knows to train on again, so that it is not
                forgotten; these tasks are to be among `tasks`.
            gate: whether the router is to know prompts unlike these tasks', and to leave them to
                the base model (`routing.gate`; not in the paper); a line in the log says where it
                cannot.

        Raises:
            ValueError: the model cannot be routed, or the settings, tasks, folder or start do not
                fit.
        """
        config = config or FitConfig()
        decoder = Decoder.of(model, tokenizer, token_budget).unwrapped()
        tasks = [task.bound_to(tokenizer) for task in tasks]
        fit_folder = None if folder is None else Path(folder)
        stages_folder = None if stages is None else Path(stages)
        warm = None
        if start is not None:
            start.check_fitted_on(decoder, "the router to start from")
            warm = start.as_start(keep)
            config = warm.settings(config)
            tasks = warm.trained_tasks(tasks, config.seed)
        elif keep:
            raise ValueError(f"keep={keep} is of the tasks of a router to start from: give `start`")
        queries: list[Query] = []
        pids, router, features = fitting.fit(
            decoder,
            tasks,
            config,
            fit_folder,
            stages=stages_folder,
            start=warm,
            read_queries=queries.extend,
        )
        new_tasks = tasks
        if start is not None:
            new_tasks = [task for task in tasks if task.name not in start.description.tasks]
        description = describe(
            decoder,
            new_tasks,
            config,
            pids.layers,
            features,
            n_learned(tasks, config),
            n_judged(tasks, config),
        )
        if warm is not None:
            description = warm.described(description, tasks)
        prompt_gate = fit_gate(queries, tasks, pids.layers[0], warm) if gate else None
        return cls(description, pids, router, gate=prompt_gate)

    def as_start(self, keep: int = 0) -> Start:
        """Returns what a fit goes on from; `keep` rows of each known task are trained on again."""
        return Start(self.description, self.pids, self.router, self.digest(), keep, self.gate)

    @contextmanager
    def attached(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        strength: float = 1.0,
        gate: Gate | bool | None = True,
        spread: Spread | None = None,
        bias_rows: BiasRows | None = None,
    ) -> Iterator[Routed]:
        """Inside, every plain `model(...)` and `model.generate(...)` is routed by its prompt.

        On leaving, also by an exception, the model is as it was found. A first prompt of a call
        that has the form of none of the tasks that the router was fitted on is warned of, once.

        Args:
            model: the base model that the router was fitted on.
            tokenizer: its tokenizer.
            strength: factor on the routing vector; 0 gives the logits of the untouched model.
            gate: True leaves prompts that the router's own gate does not know to the base model, if
                it has a gate; False and None route every prompt. Or what gives each prompt a
                further factor, [batch], from the states that enter the first routed layer,
                [q_len, hidden_size] each; the method "icr-gated" has one.
            spread: a control that keeps the magnitude and takes away where it goes: "alpha" gives
                all directions of a layer the same, "gates" all heads (`Routing.spread`).
            bias_rows: which rows of attention logits get the bias, "all" or from the "last" prompt
                row on (`FitConfig.bias_rows`); None adds it where the router was fitted with it.

        Raises:
            ValueError: another base model, or one that is attached already.
        """
        decoder = Decoder.of(model, tokenizer)
        with self.attached_to(
            decoder, strength=strength, gate=gate, spread=spread, bias_rows=bias_rows
        ) as routed:
            yield routed

    @contextmanager
    def attached_to(
        self,
        decoder: Decoder,
        *,
        strength: float = 1.0,
        gate: Gate | bool | None = True,
        spread: Spread | None = None,
        bias_rows: BiasRows | None = None,
    ) -> Iterator[Routed]:
        """Does what `attached` does, for a decoder."""
        prompt_gate = self._gate_asked_for(gate)
        reader = self.reader(decoder, strength=strength, gate=prompt_gate, spread=spread)
        reader = self.watching(reader, stacklevel=5)
        with self.attached_by(reader, strength=strength, bias_rows=bias_rows) as routed:
            yield routed

    def watching(self, reader: Reader, *, stacklevel: int = 2) -> Reader:
        """Returns a reader that warns of prompts of a form that the router does not know.

        Warns at once, at this `stacklevel`, of a tokenizer with another chat template.
        """
        tokenizer = reader.decoder.tokenizer
        if not self.has_template_of(tokenizer):
            warnings.warn(
                "this tokenizer's chat template is another one than the router was fitted by: what "
                "routing does to its prompts was not learned and may do harm; load the tokenizer "
                "that it was fitted with, or set its `chat_template`",
                stacklevel=stacklevel,
            )
        sources = self.description.sources
        return replace(reader, forms=FormWatch(sources, tokenizer)) if sources else reader

    def _gate_asked_for(self, gate: Gate | bool | None) -> Gate | None:
        """Returns the gate that `attached` was asked for; None for none."""
        if gate is True:
            return self.gate
        return None if gate is False else gate

    @contextmanager
    def attached_by(
        self, reader: Reader, *, strength: float = 1.0, bias_rows: BiasRows | None = None
    ) -> Iterator[Routed]:
        """Does what `attached` does, for a reader, whose model has been looked at already.

        Of a prompt's form it says nothing, unless the reader does.
        """
        bias_rows = bias_rows or self.description.fit.bias_rows
        check_bias_rows(bias_rows)
        # Exact in every dtype at strength 0: wider heads round differently below float32.
        with rerouted(reader, self.pids, bias_rows) if strength else unrouted(reader) as now:
            sources = self.description.sources or ()
            yield Routed(
                reader,
                self.pids.layers,
                strength,
                now.last,
                now.hold,
                sources,
                self.made_of(reader.gate, strength, spread=reader.spread, bias_rows=bias_rows),
                self.calibrations,
                bias_rows,
            )

    def made_of(
        self,
        gate: Gate | None,
        strength: float = 1.0,
        *,
        spread: Spread | None = None,
        bias_rows: BiasRows | None = None,
    ) -> str:
        """Returns what gives scores behind a gate, at a strength, as calibrations keep it.

        The other two are as in `attached`.
        """
        # Whatever else it may be, it is told from others while it is there.
        behind = f"another gate, {id(gate):x}"
        if gate is None:
            behind = "no gate"
        elif gate is self.gate and self.gate is not None:
            # A router may be given another, which leaves other prompts alone.
            behind = f"its own gate {self.gate.digest}"
        spread_phrase = "" if spread is None else f", {spread} spread evenly"
        rows = bias_rows or self.description.fit.bias_rows
        rows_phrase = "" if rows == "all" else ", bias from the last prompt row on"
        return (
            f"router {self.digest()} at strength {strength:g} with {behind}"
            f"{spread_phrase}{rows_phrase}"
        )

    def reader(
        self,
        decoder: Decoder,
        *,
        strength: float = 1.0,
        gate: Gate | None = None,
        spread: Spread | None = None,
    ) -> Reader:
        """Returns what reads prompts for this router; ValueError for another model or encoder."""
        check_spread(spread)
        if not math.isfinite(strength):
            raise ValueError(f"strength must be a finite number, got {strength}")
        fitted = self.description
        decoder = decoder.unwrapped()
        self.check_fitted_on(decoder, "this router")
        self.router.to(decoder.device)
        # A sentence encoder is small: the processor will do, beside a model that fills its device.
        features = features_of(fitted.fit.encoder, decoder, "cpu")
        # The same name on the hub may stand for other weights by now.
        if features.fingerprint != fitted.encoder:
            raise ValueError(
                f"the router was fitted with another sentence encoder than {fitted.fit.encoder!r} "
                f"is here: expected weights {fitted.encoder}, got {features.fingerprint}"
            )
        # Training ended at this scale of alpha (section 4).
        scale = strength * fitted.fit.final_alpha_scale
        return Reader(decoder, features, self.router, self.pids.layers[0], scale, gate, spread)

    @property
    def base_model(self) -> str:
        """The name of the model that it was fitted on; ValueError where that had none."""
        name = self.description.base_model
        # A model without a name is described by its class.
        if isinstance(getattr(transformers, name, None), type):
            raise ValueError(
                f"the router was fitted on a {name} without a name: say which model it is"
            )
        return name

    def check_fitted_on(self, decoder: Decoder, what: str) -> None:
        """Checks that a decoder is the base model; ValueError says how it is another.

        Args:
            decoder: the model to look at.
            what: what the error is to call this router.
        """
        fitted = self.description
        decoder.check_fitted_on(what, fitted.base_model, fitted.fingerprint, fitted.base_weights)

    def with_calibration(self, calibration: TaskCalibration) -> "InContextRouter":
        """Returns this router with a task's priors, in place of earlier ones of the same template.

        Args:
            calibration: from `Routed.calibrate_task` of this router.

        Raises:
            ValueError: it is of another router, or another template has its task's name here.
        """
        if not calibration.made_of.startswith(f"router {self.digest()} "):
            raise ValueError(
                f"the calibration is of {calibration.made_of}, not of this router, "
                f"{self.digest()}: estimate it with this one attached"
            )
        shipped.check_name(calibration.spec, self.known_specs)
        return replace(self, calibrations=shipped.joined(self.calibrations, calibration))

    @property
    def known_specs(self) -> list[TaskSpec]:
        """How the tasks read that it was fitted on, and those that it has priors of."""
        return shipped.known_specs(self.description.sources or (), self.calibrations)

    def has_template_of(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Returns whether a tokenizer words chats as those that the router was fitted on.

        It does where there were none, or an earlier version fitted the router, which kept nothing.
        """
        expected = self.description.chat_template
        return expected in (None, digest_of_template(tokenizer))

    def digest(self) -> str:
        """Returns 16 hex digits that identify the router's weights, without its gate's."""
        return artifact.digest(self.pids, self.router)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: object = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes the router to a folder, whole or not at all.

        The mixin's own would take an older config.json away first, whatever it is of.

        Args:
            save_directory: the folder; an older router in it is overwritten.
            config: of no effect, as the artifact has its own; the mixin hands one on.
            repo_id: the hub id to upload to; None is the folder's name.
            push_to_hub: whether to upload it too.
            model_card_kwargs: of no effect, like `config`.
            push_to_hub_kwargs: what `push_to_hub` takes beside.

        Returns:
            The address of the commit on the hub, if there is one.

        Raises:
            ValueError: the folder holds something else under an artifact's names; nothing is
                written.
        """
        folder = Path(save_directory)
        self._save_pretrained(folder)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, **push_to_hub_kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        artifact.save(
            save_directory, self.description, self.pids, self.router, self.folder, self.gate
        )
        shipped.save(save_directory, self.calibrations)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, repo_id: str, **settings: Any
    ) -> str:
        """Uploads the router and returns the commit's address.

        Args:
            repo_id: the hub id; one without an owner is yours.
            settings: the mixin's, `commit_message`, `private`, `token` and `branch` among them.

        Raises:
            ValueError: the repository is that of something else; nothing is uploaded.
        """
        token = settings.get("token")
        repository = HfApi(token=token).create_repo(
            repo_id, private=settings.get("private"), exist_ok=True
        )
        check_place_on_hub(repository.repo_id, settings.get("branch"), token)
        return super().push_to_hub(repository.repo_id, **settings)

    def generate_model_card(self) -> ModelCard:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the card of a router without results."""
        return ModelCard(model_card(self.description, self.digest()))

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, name: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> "InContextRouter":
        """Returns a saved router; reads nothing but its config.json and its model.safetensors.

        The mixin's own would read config.json unchecked first.

        Args:
            name: a folder or a hub id.
            revision: of a hub id, a branch, tag or commit.
            token: gives access to the hub; None is the one you are logged in with.

        Raises:
            ValueError: nothing is there, or it is damaged, of a newer format, or of wrong shapes.
        """
        folder = artifact.locate(str(name), revision, token)
        description, pids, router, gate = artifact.load(folder)
        gate_digest = "" if gate is None else gate.digest
        calibrations = shipped.load(folder, artifact.digest(pids, router), gate_digest)
        return cls(description, pids, router, folder, gate, calibrations)
