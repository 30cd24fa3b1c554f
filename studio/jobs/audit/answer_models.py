"""Loads the forms of a trained model that answer prompts: one at a time, each as its user would load it."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studio.core.errors import BadInput
from studio.core.placement.streaming import BUFFERS
from studio.core.recipe import Method, Recipe
from studio.core.text import plain
from studio.jobs.audit.variants import AdapterForms
from studio.jobs.base.device import free_bytes, job_device
from studio.jobs.base.load import FourBit, base_folder, four_bit_of, load_base
from studio.jobs.base.precision import half_dtype
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.probe.adapter_folder import AdapterFound, find_adapter
from studio.probe.audit import audited_recipe
from studio.probe.models import BaseFound, find_base
from studio.runs.failure import of_the_machine
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest

BASE, TUNED, MERGED = "base", "tuned, 16-bit", "merged, 16-bit"
_WORK_BYTES = 5e8
"""Memory for libraries, keys and values, and activations of one answer; the chat uses the same figure."""


@dataclass(frozen=True, slots=True)
class AnswerModel:
    """A form that answers.

    Attributes:
        name: A short name, unique among the forms.
        title: A description for the report.
        open: Loads the model and returns it.
        needed_bytes: Memory that it takes, estimated from its sizes.
    """

    name: str
    title: str
    open: Callable[[], Any]
    needed_bytes: float


class AnswerModels:
    """Loads the forms of one adapter.

    Attributes:
        device: Where the models are loaded.
        dtype: dtype of the arithmetic, and of weights that are not in 4 bits.
        rounded: Name of the form whose base is in 4 bits.
        trained: Name of the form that is base and adapter as they were trained.
    """

    def __init__(
        self, base: BaseFound, adapter: AdapterFound, recipe: Recipe, *, dtype: torch.dtype | None = None
    ) -> None:
        """Work out sizes; nothing is loaded yet.

        Args:
            base: The base in 16 bit.
            adapter: The adapter that was trained on it.
            recipe: The recipe of the training.
            dtype: dtype of the arithmetic. None means a card's 16-bit format; on a CPU fp32 if the whole model fits
                into memory so, else bf16.

        Raises:
            BadInput: The adapter does not fit the base.
        """
        self._base, self._adapter, self._recipe = base, adapter, recipe
        self._quant: FourBit = four_bit_of(recipe.model)
        self._folder = base_folder(base)
        skeleton = build_skeleton(self._folder, adapter)
        weights = FolderWeights.of(self._folder, skeleton.vocabulary)
        self._vocabulary = skeleton.vocabulary
        self._forms = AdapterForms(weights, skeleton, self._quant)
        self._whole = sum(parameter.numel() for parameter in weights.clean.parameters())
        self.device = job_device("auto")
        self._streamed = recipe.model.stream if isinstance(recipe.model.stream, int) else 0
        self._on_device = self._whole - self._waiting(weights.clean)
        self.dtype = dtype or _dtype(self.device, self._whole)
        self.rounded = f"tuned, {self._forms.form.name}"
        self.trained = self.rounded if recipe.method == "qlora" else TUNED

    @classmethod
    def of(cls, request: AuditRequest) -> "AnswerModels":
        """Return the forms of the run that a request is about.

        Raises:
            BadInput: The run or its base cannot be used.
        """
        trained = RunPaths(Path(request.run))
        recipe = audited_recipe(trained)
        base = find_base(request.model or recipe.model.base, request.revision or recipe.model.revision)
        return cls(base, find_adapter(trained.adapter), recipe)

    def forms(self, merged: Sequence[str]) -> list[AnswerModel]:
        """Return the forms: base, adapter on both bases, merged, and the merged folders that the user names.

        Args:
            merged: Absolute paths of merged folders.

        Raises:
            BadInput: A merged folder is no model.
        """
        whole, form = self._on_device * self.dtype.itemsize, self._forms.form
        rounded = self._forms.rounded_weights
        small = rounded * form.bits / 8 + (self._whole - rounded) * self.dtype.itemsize
        small *= self._on_device / self._whole
        made = [
            AnswerModel(BASE, "the 16-bit base without the adapter", self._opened(self._load, "lora"), whole),
            AnswerModel(TUNED, "adapter on the 16-bit base", self._opened(self._tuned, "lora"), whole),
            AnswerModel(self.rounded, f"adapter on the {form.name} base", self._opened(self._tuned, "qlora"), small),
            AnswerModel(MERGED, "merged into the 16-bit base", self._opened(self._merged), whole),
        ]
        for folder in map(Path, merged):
            found = find_base(str(folder))
            name = plain(folder.name, one_line=True, limit=40)
            title = f"the model in {plain(str(folder), one_line=True)}"
            made.append(AnswerModel(f"given: {name}", title, self._opened(self._load, "lora", found), whole))
        return made

    def why_not(self, form: AnswerModel) -> str:
        """Return why a form cannot be loaded here; empty where it can."""
        needed, free = form.needed_bytes + _WORK_BYTES, free_bytes(self.device)
        if needed <= free:
            return ""
        return f"needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"

    def release(self) -> None:
        """Free the memory of a form that is no longer used."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _waiting(self, clean: nn.Module) -> int:
        """Return how many weights a card does not hold, because their layers are streamed."""
        if not self._streamed or self.device.type != "cuda":
            return 0
        from studio.jobs.base.streaming.base import waiting_bytes, waiting_in  # noqa: PLC0415  as below

        waiting = waiting_bytes(clean, waiting_in(clean, self._streamed), 1, 1)
        return int(waiting * max(0.0, 1 - BUFFERS / self._streamed))

    def _opened(self, load: Callable[..., Any], *given: Any) -> Callable[[], Any]:
        """Return what loads a model, its layers streamed as in the training."""

        def opened() -> Any:
            model = load(*given)
            if self._streamed:
                from studio.jobs.base.streaming.base import stream_from_here  # noqa: PLC0415  as below

                stream_from_here(model, self._streamed, self.device)
            return model

        return opened

    def _load(self, method: Method, base: BaseFound | None = None) -> Any:
        section = self._recipe.model
        return load_base(
            base or self._base,
            method=method,
            dtype=self.dtype,
            quant=self._quant,
            attention="sdpa",
            device=self.device,
            trust_remote_code=section.trust_remote_code,
            streamed=self._streamed,
        )

    def _tuned(self, method: Method) -> Any:
        base = self._load(method)
        if self._vocabulary is not None:
            base.resize_token_embeddings(self._vocabulary)
        try:
            from studio.jobs.base.experts.pairs import open_adapter  # noqa: PLC0415  bitsandbytes is 47 MB

            return open_adapter(base, str(self._adapter.folder), str(self.device))
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            if of_the_machine(error):
                raise
            said = plain(str(error), one_line=True, limit=300)
            raise BadInput(f"the adapter does not fit the base: {said}") from error

    @torch.no_grad()
    def _merged(self) -> Any:
        """Return the base with the weights that a merge would write, in the base's own format."""
        model = self._load("lora")
        if self._vocabulary is not None:
            model.resize_token_embeddings(self._vocabulary)
        written = self._forms.merged(self._forms.stored, cast=True)
        for name, parameter in model.named_parameters():
            if name in self._forms.touched:
                parameter.copy_(written(name))
        return model


def _dtype(device: torch.device, parameters: int) -> torch.dtype:
    """Return a card's 16-bit format; on a CPU fp32, the audit's arithmetic, if the whole model fits, else bf16."""
    if device.type == "cuda":
        return half_dtype(device)
    return torch.float32 if parameters * 4 + _WORK_BYTES < free_bytes(device) else torch.bfloat16
