"""A loaded model that answers with its adapter and without it, from one copy of the base.

A merged model cannot answer without its adapter, so its base is loaded as well, if there is enough memory.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch import Tensor
from transformers import TextStreamer

from studio.core.errors import BadInput
from studio.core.recipe import QuantType
from studio.core.text import plain
from studio.jobs.base.data.bounded import apply_template
from studio.jobs.base.data.template import ensure_template
from studio.jobs.base.device import free_bytes, job_device
from studio.jobs.base.generation import Watch
from studio.jobs.base.load import FourBit, base_folder, load_base
from studio.jobs.base.precision import DTYPES, half_dtype
from studio.jobs.base.progress import READING
from studio.jobs.base.tokenizer import load_tokenizer, stop_ids
from studio.jobs.base.weights.skeleton import adapter_vocabulary
from studio.probe.adapter_folder import find_adapter, run_of_adapter
from studio.probe.fingerprint import fingerprint, refuse_another_base
from studio.probe.models import BaseFound, find_base
from studio.probe.space import check_memory
from studio.runs.chat import Answered, ChatEvent, ChatRequest, Piece, Sampling, Side
from studio.runs.failure import of_the_machine, ran_out_of_memory

_NF4_SHARE = 0.4
"""Memory of a model in 4 bits over its 16-bit size: 4.5 bits a weight, embeddings and head in 16 bits, and one layer in
both forms while loading."""
_WORK_BYTES = 5e8
"""Memory for libraries, keys and values, and activations of a short conversation."""


class Session:
    """A model ready to answer.

    Attributes:
        sides: `tuned` and `base`; a model alone has only `tuned`.
        tokenizer: The model's tokenizer; it has a chat template.
        device_name: The device that the model computes on.
        dtype_name: The number format that it computes in.
        notes: What the user should know.
    """

    def __init__(self, request: ChatRequest, tell: Callable[[str, float | None], None]) -> None:
        """Load base, adapter and tokenizer.

        Args:
            request: Names the model and says how to load it.
            tell: Told what is being done, and the fraction done or None.

        Raises:
            BadInput: One of them cannot be loaded, the base is not the one that the adapter was trained on, or there is
                not enough memory.
            JobFailed: The card that was chosen or asked for cannot be used.
        """
        self.notes: list[str] = [request.note] if request.note else []
        base = find_base(request.base, request.revision)
        if request.adapter:
            refuse_another_base(
                run_of_adapter(Path(request.adapter)),
                base_folder(base, tell),
                lambda folder: fingerprint(folder, lambda fraction: tell(READING, fraction)),
            )
        device = job_device(request.device)
        dtype = _dtype(request, device)
        if device.type == "cpu":
            _check_memory(base, request.method, dtype, device)
        loaded: Any = load_base(
            base,
            method="qlora" if request.method == "qlora" else "lora",
            dtype=dtype,
            quant=_quant(request),
            attention=request.attention if device.type == "cuda" else "sdpa",  # type: ignore[arg-type]
            device=device,
            trust_remote_code=request.trust_remote_code,
            streamed=request.streamed,
            progress=tell,
        )
        folder = base_folder(base)
        self._adapted: PeftModel | None = None
        if request.adapter:
            tell("loading the adapter", None)
            folder, self._adapted = self._attach(loaded, Path(request.adapter), folder)
        self._model: Any = self._adapted or loaded
        if request.streamed:
            from studio.jobs.base.streaming.base import stream_from_here  # noqa: PLC0415  bitsandbytes is 47 MB

            stream_from_here(self._model, request.streamed, device)
        self._model.eval()
        self.tokenizer = load_tokenizer(folder, trust_remote_code=request.trust_remote_code)
        ensure_template(self.tokenizer, request.data_format, self.notes.append)
        self._stops = stop_ids(self.tokenizer, getattr(loaded, "generation_config", None))
        self._context = int(getattr(loaded.config.get_text_config(), "max_position_embeddings", 0) or 2**31)
        self._beside = self._load_beside(request, device, dtype, tell) if request.beside else None
        self.sides: tuple[str, ...] = ("tuned", "base") if self._adapted or self._beside else ("tuned",)
        self.device_name, self.dtype_name = str(device), str(dtype).removeprefix("torch.")

    def answer(
        self,
        side: Side,
        messages: Sequence[dict[str, str]],
        sampling: Sampling,
        tell: Callable[[ChatEvent], None],
        cancelled: Callable[[], bool],
    ) -> None:
        """Answer the last message of a conversation, piece by piece.

        Args:
            side: Which of `sides` answers.
            messages: The conversation, each message with `role` and `content`.
            sampling: How the next token is chosen, and how many there may be.
            tell: Gets the pieces of the answer, and at the end how it ended.
            cancelled: Asked after every token; True ends the answer there.

        Raises:
            BadInput: The template refuses the messages, or the question alone is longer than the model's context.
        """
        began = time.monotonic()
        ids, dropped = self._fitting(list(messages), sampling.max_new_tokens)
        room = min(sampling.max_new_tokens, self._context - len(ids))
        new = self._generate(
            side,
            ids,
            **_knobs(sampling),
            max_new_tokens=room,
            streamer=Streamer(self.tokenizer, lambda text: tell(Piece(side, text))),
            stopping_criteria=[Watch(cancelled)],
        )
        reason = "stop" if new and new[-1] in self._stops else "cancelled" if cancelled() else "length"
        if reason == "length" and room < sampling.max_new_tokens:
            reason = "context"
        tell(Answered(side, len(new) - (reason == "stop"), time.monotonic() - began, reason, dropped))

    @torch.no_grad()
    def _generate(self, side: Side, ids: list[int], **options: Any) -> list[int]:
        torch.manual_seed(options.pop("seed"))
        model = self._beside if self._beside and side == "base" else self._model
        prompt = torch.tensor([ids], device=model.device)
        pad = self.tokenizer.pad_token_id
        with self._as(side):
            made: Tensor = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                eos_token_id=self._stops or None,
                pad_token_id=0 if pad is None else pad,
                use_cache=True,
                **options,
            )
        return [int(token) for token in made[0, len(ids) :]]

    def _as(self, side: Side) -> Any:
        return self._adapted.disable_adapter() if self._adapted and side == "base" else nullcontext()

    def _fitting(self, messages: list[dict[str, str]], new_tokens: int) -> tuple[list[int], int]:
        """Return the token ids of a conversation that leave room for the answer, and how many turns were dropped.

        The oldest turns, a question with its answer each, are dropped until a quarter of the context, or all tokens of
        the answer if those are fewer, are free. A system prompt stays.

        Raises:
            BadInput: The question alone is too long.
        """
        dropped = 0
        first = 1 if messages[0]["role"] == "system" else 0
        while True:
            ids = token_ids(self.tokenizer, messages)
            if len(ids) + min(new_tokens, self._context // 4) <= self._context:
                return ids, dropped
            if len(messages) - first < 3:
                raise BadInput(
                    f"the question has {len(ids)} tokens; the model's context is {self._context}, a quarter of it kept "
                    "for the answer. Ask something shorter."
                )
            del messages[first : first + 2]
            dropped += 1

    def _load_beside(
        self, request: ChatRequest, device: torch.device, dtype: torch.dtype, tell: Callable[[str, float | None], None]
    ) -> Any:
        """Return the base of a merged model; None, with a note, if it cannot be loaded or lacks added tokens."""
        try:
            base = find_base(request.beside, request.beside_revision)
            _check_memory(base, "lora", dtype, device)
            model: Any = load_base(
                base,
                method="lora",
                dtype=dtype,
                quant=_quant(request),
                attention="sdpa",
                device=device,
                progress=tell,
            )
        except (BadInput, MemoryError, RuntimeError, OSError) as error:
            if not (isinstance(error, BadInput) or ran_out_of_memory(error)):
                raise
            self.notes.append(f"Only the merged model answers. Its base cannot be loaded beside it: {error}")
            return None
        if len(model.get_input_embeddings().weight) < len(self._model.get_input_embeddings().weight):
            self.notes.append("Only the merged model answers: its base does not know the tokens that were added.")
            return None
        return model.eval()

    def _attach(self, loaded: Any, adapter: Path, base: Path) -> tuple[Path, PeftModel]:
        """Attach the adapter to the base; return the folder of the tokenizer, and the adapted model."""
        found = find_adapter(adapter)
        vocabulary = adapter_vocabulary(found)
        if vocabulary and vocabulary != loaded.get_input_embeddings().weight.shape[0]:
            loaded.resize_token_embeddings(vocabulary)
        try:
            from studio.jobs.base.experts.pairs import open_adapter  # noqa: PLC0415  bitsandbytes is 47 MB

            adapted = open_adapter(loaded, str(adapter), str(loaded.device))
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            if of_the_machine(error):
                raise
            name = plain(adapter.name, one_line=True)
            raise BadInput(f"the adapter {name} does not fit this base model: {error}") from error
        own = (adapter / "tokenizer_config.json").is_file()
        return adapter if own else base, adapted


def _knobs(sampling: Sampling) -> dict[str, Any]:
    """Return the sampling settings under transformers' names; None removes a setting of the model's own config."""
    knobs: dict[str, Any] = {"seed": sampling.seed, "repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature == 0:
        return knobs | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    warm = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return knobs | warm | {"do_sample": True}


def _check_memory(base: BaseFound, method: str, dtype: torch.dtype, device: torch.device) -> None:
    """Make sure that a model fits into main memory or the card's memory; its size there is an estimate.

    Raises:
        BadInput: It needs more memory than is free.
    """
    share = _NF4_SHARE if method == "qlora" else dtype.itemsize / 2
    check_memory(
        base.size_bytes * share + _WORK_BYTES,
        "the model needs about",
        "close other programs, or chat with a smaller model or, on a computer with a card, with --device cuda.",
        free_bytes(device),
    )


def _quant(request: ChatRequest) -> FourBit:
    code: QuantType = "fp4" if request.quant_type == "fp4" else "nf4"
    return FourBit(code, request.double_quant, tuple((name, word) for name, word in request.precision))


def _dtype(request: ChatRequest, device: torch.device) -> torch.dtype:
    return half_dtype(device) if request.dtype == "auto" else DTYPES[request.dtype]


class Streamer(TextStreamer):
    """Passes text on as soon as no later token can change it: whole words, never half a character."""

    def __init__(self, tokenizer: Any, give: Callable[[str], None]) -> None:
        """Pass pieces of text to `give`."""
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._give = give

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece of text on; transformers calls this."""
        if text:
            self._give(text)


def token_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the token ids of messages as the chat template writes them, up to where the answer begins, as in training.

    If the template refuses a system turn, its text is put before the first question.

    Raises:
        BadInput: The template refuses the messages.
    """
    try:
        text = _render(tokenizer, messages)
    except (TemplateError, ValueError, TypeError, IndexError) as error:
        if messages[0]["role"] != "system":
            raise BadInput(f"the chat template refuses this: {plain(str(error), one_line=True, limit=200)}") from None
        system, first = messages[0], messages[1]
        folded = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
        return token_ids(tokenizer, [folded, *messages[2:]])
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    return str(apply_template(tokenizer, [messages], tokenize=False, add_generation_prompt=True)[0])
