"""Forward values and gradients against references that share no kernel with what is checked.

The references are computed in fp64 on the CPU, from the same bytes, in the plainest way: whole logits, one row at a
time, weights taken out of their 4 bits. Differences are taken in the largest number of a tensor (`apart`).

The tolerances, and why. fp32 has 24 bits; sums of some thousand products in another order lose up to 1e-5, and 1e-4
leaves room for a card's other blocking (TF32 is off, as torch has it). bf16 has 8 bits and fp16 11; the roundings of
the few layers here add up to 2e-2 and 5e-3 on a CPU, and four times that is allowed: still far from a wrong kernel,
mask, scale or transposition, whose differences are of order 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from studio.core import loss_chunk
from studio.core.recipe import AdapterSection
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.head_form import HeadForm
from studio.jobs.base.precision import Precision
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.batches import Batcher
from studio.jobs.train.head import chunked_loss_sum, shifted
from studio.jobs.train.objectives.supervised import collate, pack
from studio.jobs.train.packing import can_pack
from studio.jobs.train.row_isolation import VARLEN_ATTENTION, packed_attentions
from studio.jobs.train.step_model import StepModel
from tests.fakes.tiny_model import tiny_config
from tests.gpu.bench import Bench, Seen, Skip, capability, need_dtype, replaced, table

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 8e-2}
"""Of a tensor's largest number; see above."""
ROWS = (1, 8, 64, 512, 2048)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of two tensors, as a share of the largest number of the wanted one."""
    assert found.shape == wanted.shape, f"{tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    there = found.detach().double().cpu()
    assert bool(torch.isfinite(there).all()), "NaN or infinity"
    wanted = wanted.detach().double().cpu()
    return float((there - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def within(found: dict[str, float], dtype: str) -> str:
    """Return the worst difference in words.

    Raises:
        AssertionError: It is larger than the format allows.
    """
    name, most = max(found.items(), key=lambda item: item[1])
    assert most <= TOLERANCE[dtype], f"{name} is {most:.1e} apart, allowed {TOLERANCE[dtype]:.0e}; all: {found}"
    return f"{most:.1e} apart at most ({name}), allowed {TOLERANCE[dtype]:.0e}"


def packed_rows(bench: Bench, method: str, dtype: str) -> Seen:
    """Loss and adapter gradients of packed rows against each row alone, whole logits, eager attention, fp64."""
    need_dtype(bench, dtype)
    rows = some_rows(9, 40, 17, 3)
    torch.manual_seed(5)
    model = LlamaForCausalLM(tiny_config(attn_implementation="sdpa")).to(_DTYPES[dtype])
    held = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model = model.to(bench.place)
    if method == "qlora":
        held |= _in_four_bits(model, bench, _DTYPES[dtype])
    step_model = StepModel(_adapted(model), "chunked", Precision(dtype, bench.place.type).autocast)
    causal: Any = step_model.causal
    seen: dict[str, dict[str, float]] = {}
    ways = packed_attentions("sdpa", bench.place)
    if dtype == "fp32":  # torch's flash kernels take half formats only
        ways = tuple(way for way in ways if way != VARLEN_ATTENTION)
    wanted_loss, wanted = _reference(step_model, held, rows)
    for way in ("padded", *ways):
        step_model.zero_grad()
        if way != "padded":
            causal.set_attn_implementation(way)
        batch = collate(rows, 0, bench.place) if way == "padded" else pack(rows, bench.place)
        loss = step_model.train()(batch)
        loss.backward()
        found = {name: p.grad for name, p in step_model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys(), "gradients of other parameters"
        seen[way] = {"loss": abs(float(loss) - wanted_loss) / wanted_loss}
        seen[way]["gradients"] = max(apart(found[name], wanted[name]) for name in wanted)
    causal.set_attn_implementation("sdpa")
    assert can_pack(step_model, rows, bench.place), "rows of this model are not packed here"
    chosen = causal.config._attn_implementation
    every = {f"{way} {name}": value for way, values in seen.items() for name, value in values.items()}
    lines = table(
        ("way", "loss", "gradients"), [(w, f"{v['loss']:.1e}", f"{v['gradients']:.1e}") for w, v in seen.items()]
    )
    return Seen(f"{within(every, dtype)}; a run takes {chosen}", lines, {"apart": every, "chosen": chosen})


def flash_kernel(bench: Bench) -> Seen:
    """That packed rows go through one flash kernel on a card that has it."""
    ways = packed_attentions("sdpa", bench.place)
    if bench.rehearsed:
        assert ways == ("studio_rows",), ways
        return Seen(f"rehearsed: a CPU takes {ways[0]}")
    if len(ways) < 2:
        major, minor = capability(bench)
        raise Skip(f"no flash kernels: compute capability {major}.{minor}, torch's want 8.0; rows are taken one by one")
    return Seen(f"{ways[0]} before {ways[1]}")


def some_rows(*lengths: int, vocabulary: int = 250, seed: int = 4) -> list[Example]:
    """Return random rows whose first third is a prompt."""
    draw = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = draw.integers(3, vocabulary, length).astype(np.int32)
        made.append(Example(ids, np.where(np.arange(length) < length // 3, IGNORED, ids).astype(np.int32)))
    return made


def _adapted(model: Any) -> Any:
    model.requires_grad_(False)
    adapted = attach_adapter(model, AdapterSection(rank=4, alpha=8.0), recompute="none")
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # with zeros no gradient would reach A
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return adapted


def _in_four_bits(model: Any, bench: Bench, dtype: torch.dtype) -> dict[str, Tensor]:
    """Put the linear layers but the head into NF4; return what their weights are now, by the CPU's own unpacking."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    from studio.jobs.base.load import _keep_packing

    held = {}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        layer = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = Params4bit(module.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
        model.set_submodule(name, layer.to(bench.place))
        weight = layer.weight
        held[f"{name}.weight"] = dequantize_4bit(weight.data.cpu(), _on_cpu(weight.quant_state)).cpu()
    _keep_packing(model)
    return held


def _on_cpu(state: Any) -> Any:
    """Return a 4-bit state whose tensors lie in main memory; the one that is given stays where it is."""
    import copy

    moved = copy.copy(state)
    for name in ("absmax", "code", "offset"):
        value = getattr(moved, name, None)
        if isinstance(value, Tensor):
            setattr(moved, name, value.cpu())
    if moved.state2 is not None:
        moved.state2 = _on_cpu(moved.state2)
    return moved


def _reference(
    step_model: StepModel, held: dict[str, Tensor], rows: Sequence[Example]
) -> tuple[float, dict[str, Tensor]]:
    """Return the summed loss and the adapter's gradients of each row alone, in fp64 on the CPU."""
    plain = LlamaForCausalLM(tiny_config(attn_implementation="eager")).double()
    plain.load_state_dict({name: value.double().cpu() for name, value in held.items()})
    adapted = _adapted(plain)
    values = {name: p.detach().cpu().double() for name, p in step_model.model.named_parameters() if p.requires_grad}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = values[name]
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    total = 0.0
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()[None]
        labels = torch.from_numpy(row.labels).long()[None]
        logits = adapted(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED, reduction="sum")
        loss.backward()
        total += float(loss.detach())
    return total, {f"model.{name}": p.grad for name, p in adapted.named_parameters() if p.grad is not None}


def chunked_loss(bench: Bench, dtype: str) -> Seen:
    """The chunked loss and its gradients against whole logits in fp64: plain, capped and scaled, a trained head."""
    need_dtype(bench, dtype)
    # On a card as large as fp64 on a CPU allows in a minute; a workspace for 64 tokens at once makes many chunks of it.
    hidden_size, vocabulary = (128, 1000) if bench.rehearsed else (512, 32_768)
    cases = {
        "plain": (HeadForm(), False),
        "soft cap and scale": (HeadForm(softcap=30.0, scale=0.5), False),
        "trained head": (HeadForm(), True),
    }
    seen: dict[str, float] = {}
    for tokens in (1, 7, 600):
        for name, (form, trained) in cases.items():
            torch.manual_seed(tokens)
            hidden = torch.randn(1, tokens + 1, hidden_size).to(_DTYPES[dtype])
            head = nn.Linear(hidden_size, vocabulary, bias=False)
            head.weight.data.normal_(std=hidden_size**-0.5)
            head.to(_DTYPES[dtype]).requires_grad_(trained)
            labels = torch.randint(0, vocabulary, (1, tokens + 1))
            labels[0, 0 : tokens // 3] = IGNORED
            wanted = _whole_logits(hidden, head, labels, form, trained=trained)
            there = hidden.to(bench.place).detach().requires_grad_(True)
            copied = nn.Linear(hidden_size, vocabulary, bias=False, device=bench.place, dtype=_DTYPES[dtype])
            copied.weight.data.copy_(head.weight.data)
            copied.requires_grad_(trained)
            with replaced(loss_chunk, "WORKSPACE_BYTES", 64 * loss_chunk.LOGIT_BYTES * vocabulary):
                loss = chunked_loss_sum(there, copied, shifted(labels.to(bench.place)), form)
                loss.backward()
            found = [loss, there.grad, *([copied.weight.grad] if trained else [])]
            for what, one, other in zip(("loss", "hidden", "head"), found, wanted, strict=False):
                key = f"{name} {what}"
                assert one is not None
                seen[key] = max(seen.get(key, 0.0), apart(one, other))
    return Seen(f"1, 7 and 600 tokens, {vocabulary:,} words: {within(seen, dtype)}", (), {"apart": seen})


def _whole_logits(hidden: Tensor, head: nn.Linear, labels: Tensor, form: HeadForm, *, trained: bool) -> list[Tensor]:
    states = hidden.double().detach().requires_grad_(True)
    weight = head.weight.detach().double().requires_grad_(trained)
    logits = states[0, :-1] @ weight.T * form.scale
    if form.softcap:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    loss = nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum")
    loss.backward()
    assert states.grad is not None
    return [loss.detach(), states.grad, *([weight.grad] if weight.grad is not None else [])]


def four_bit_products(bench: Bench, rows: str, dtype: str) -> Seen:
    """A product with a 4-bit weight and its gradient, against the CPU's unpacking of the same bytes and fp64.

    With one row and no gradient bitsandbytes takes another kernel (gemv) than with one: both are checked.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    need_dtype(bench, dtype)
    count, width, out = int(rows), *((128, 192) if bench.rehearsed else (1024, 2816))
    seen: dict[str, float] = {}
    for code in ("nf4", "fp4"):
        for nested in (False, True):
            torch.manual_seed(count)
            weight = torch.randn(out, width).to(_DTYPES[dtype]) * width**-0.5
            layer = Linear4bit(
                width, out, bias=False, compute_dtype=_DTYPES[dtype], quant_type=code, compress_statistics=nested
            )
            layer.weight = Params4bit(weight, requires_grad=False, quant_type=code, compress_statistics=nested)
            layer = layer.to(bench.place)
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
            state = layer.weight.quant_state
            plain = dequantize_4bit(layer.weight.data.cpu(), _on_cpu(state)).double()
            name = f"{code}{' twice' if nested else ''}"
            unpacked = dequantize_4bit(layer.weight.data, state)
            # One rounding to the format at most: the same bytes times the same scale.
            seen[f"{name} unpacked"] = apart(unpacked, plain)
            values = torch.randn(count, width).to(_DTYPES[dtype])
            upstream = torch.randn(count, out).to(_DTYPES[dtype])
            inputs = values.to(bench.place).requires_grad_(True)
            made = layer(inputs)
            made.backward(upstream.to(bench.place))
            seen[f"{name} forward"] = apart(made, values.double() @ plain.T)
            assert inputs.grad is not None
            seen[f"{name} gradient"] = apart(inputs.grad, upstream.double() @ plain)
            with torch.no_grad():
                seen[f"{name} without gradient"] = apart(layer(values.to(bench.place)), values.double() @ plain.T)
    return Seen(f"{count} x {width} times {out} x {width}: {within(seen, dtype)}", (), {"apart": seen})


def batcher_of(bench: Bench, tokens: int = 0) -> Batcher:
    """Return a batcher of four rows, packed where a number of tokens is given."""
    return replace(Batcher(4, 0, bench.place), packed_tokens=tokens)
