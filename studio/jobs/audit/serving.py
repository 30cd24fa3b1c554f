"""What it takes to serve an adapter's forms: memory on a card, estimated, and tokens a second, measured here.

Speed depends on the format of the weights and on whether an unmerged adapter is used with them, but not on their
values, so four measurements are enough for all forms. Each is one conversation, of which a prompt is read and some
tokens are written, with transformers and bitsandbytes as in the chat. GGUF files are timed in llama.cpp (`gguf.py`).
"""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from studio.core.errors import BadInput
from studio.core.events import Phase
from studio.core.text import plain
from studio.core.vram.reserve import CONTEXT_BYTES, LEAST_CONTEXT_BYTES, MOST_CONTEXT_BYTES
from studio.jobs.audit.answer_models import TUNED, AnswerModels
from studio.jobs.audit.rows import AuditRows
from studio.jobs.base.device import wait_for
from studio.jobs.base.progress import heed
from studio.runs.failure import ran_out_of_memory
from studio.runs.worker import Worker

CONTEXT_TOKENS = 2048
_KEY_BYTES = 2
_WORKSPACE_SHARE = 0.1
"""Activations and allocator at the high end, as a share of weights and cache. Chosen, not measured."""
TRANSFORMERS, LLAMA = "transformers", "llama.cpp"
NOT_ASKED = "speed was not asked for"
PROMPT_TOKENS, NEW_TOKENS = 128, 32
_MOST_SECONDS = 10.0
"""Longest that writing is timed; a slow model writes fewer tokens."""


_WITHOUT_KEYS = frozenset(("linear_attention", "conv", "mlp", "moe"))
"""Kinds of layers, as transformers names them, that keep nothing that grows with the conversation."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Memory on a CUDA card for one conversation; an estimate.

    Attributes:
        context_tokens: Length of the conversation.
        cache_bytes: Keys and values of that length in 16 bit.
        low_bytes: Weights, cache and the smallest CUDA context seen.
        expected_bytes: The same with a usual context.
        high_bytes: The same with the largest context seen, and a tenth more for activations and allocator.
        read_bytes_per_token: What must be read from memory for each new token: weights and, at full length, the cache.
            A card's bandwidth divided by it is the most tokens per second that one conversation can get.
    """

    context_tokens: int
    cache_bytes: int
    low_bytes: int
    expected_bytes: int
    high_bytes: int
    read_bytes_per_token: int


def serving(config: Any, weight_bytes: int) -> Serving:
    """Return the estimate of the memory for a model of this config and size.

    Args:
        config: The model's config.
        weight_bytes: Bytes of all weights, in the form in which they are held.
    """
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0))
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * int(text.num_hidden_layers)
    attending = sum(kind not in _WITHOUT_KEYS for kind in kinds) if heads else 0
    cache = 2 * attending * keys * width * _KEY_BYTES * CONTEXT_TOKENS
    held = weight_bytes + cache
    return Serving(
        CONTEXT_TOKENS,
        cache,
        held + LEAST_CONTEXT_BYTES,
        held + CONTEXT_BYTES,
        int(held * (1 + _WORKSPACE_SHARE)) + MOST_CONTEXT_BYTES,
        held,
    )


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a form is served to one conversation.

    Attributes:
        how: `measured`, or `not measured`.
        prefill_tokens_per_second: Speed of reading a prompt; None where not measured.
        decode_tokens_per_second: Speed of writing tokens after it; None where not measured.
        prompt_tokens: How many tokens were read.
        tokens: How many tokens were written.
        device: `cpu` or `cuda`.
        threads: Threads on a CPU; 0 on a card.
        runtime: `transformers` or `llama.cpp`.
        why: Why there is no measurement.
    """

    how: str
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    device: str = ""
    threads: int = 0
    runtime: str = TRANSFORMERS
    why: str = ""


def unmeasured(why: str, runtime: str = TRANSFORMERS) -> Speed:
    """Return a `Speed` without figures, and with the reason."""
    return Speed("not measured", runtime=runtime, why=plain(why, one_line=True, limit=200))


def prompt_of(rows: AuditRows) -> list[int]:
    """Return a prompt of real tokens: held-out rows one after another, then the neutral text."""
    ids = [int(token) for example in rows.all for token in example.input_ids[:PROMPT_TOKENS]]
    return ids[:PROMPT_TOKENS]


def measured_speeds(
    worker: Worker, models: AnswerModels, prompt: Sequence[int], four: str
) -> dict[tuple[str, bool], Speed]:
    """Return the speed of each form of the weights, with and without an adapter beside them.

    Args:
        worker: Told the progress, asked whether to stop.
        models: Loads base and adapter.
        prompt: Token ids.
        four: Name of the 4-bit form.

    Raises:
        Cancelled: The user asked for it.
    """
    made: dict[tuple[str, bool], Speed] = {}
    names = {TUNED: "16-bit", f"tuned, {four}": four}

    go_on = partial(heed, worker, "stopped; resuming goes on after the last whole block")
    for form in models.forms(()):
        if form.name not in names:
            continue
        go_on()
        held = names[form.name]
        worker.emit(Phase, name="measuring speed", detail=held)
        why = models.why_not(form)
        try:
            if not why:
                made |= _both(held, form.open().eval(), prompt, go_on)
        except BadInput as error:
            why = str(error)
        except (MemoryError, RuntimeError, OSError) as error:
            if not ran_out_of_memory(error):
                raise
            why = "there was not enough memory"
        models.release()
        if why:
            made |= dict.fromkeys(((held, True), (held, False)), unmeasured(why))
    return made


def _both(held: str, model: Any, prompt: Sequence[int], heed: Callable[[], None]) -> dict[tuple[str, bool], Speed]:
    with_adapter = timed(model, prompt, heed)
    with model.disable_adapter():
        return {(held, True): with_adapter, (held, False): timed(model, prompt, heed)}


@torch.no_grad()
def timed(model: Any, prompt: Sequence[int], heed: Callable[[], None] = lambda: None) -> Speed:
    """Return how fast a loaded causal model reads a prompt and greedily writes after it, past stop tokens too.

    Args:
        model: In evaluation mode.
        prompt: Token ids, one or more.
        heed: Called between tokens; may raise.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    # As `generate` does it: only the prompt's last token needs logits.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    cache = "cache" if "cache" in known else "past_key_values"  # the old name, which transformers 5.40 drops
    model(input_ids=ids, use_cache=True, **last)  # not timed: libraries set things up at the first call
    wait_for(device)
    began = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, **last)
    token: Tensor = out.logits[:, -1:].argmax(-1)
    wait_for(device)
    read = time.perf_counter()
    done = 0
    while done < NEW_TOKENS and time.perf_counter() - read < _MOST_SECONDS:
        heed()
        out = model(input_ids=token, use_cache=True, **{cache: out[cache]})
        token, done = out.logits[:, -1:].argmax(-1), done + 1
        wait_for(device)
    return Speed(
        "measured",
        len(prompt) / (read - began),
        done / (time.perf_counter() - read),
        len(prompt),
        done,
        device.type,
        torch.get_num_threads() if device.type == "cpu" else 0,
    )
