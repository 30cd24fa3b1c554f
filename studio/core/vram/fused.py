"""Fused kernels as sizes: what they make, what they keep for the backward, and what they write their gradients over.

`liger` are liger-kernel's (ops/rms_norm.py, rope.py, swiglu.py), which the Trainer's `use_liger_kernel` puts in;
`foak` are fms-acceleration's "fused ops and kernels", taken from early Unsloth (fms_acceleration_foak:
fused_ops/unsloth_lora/bnb/fast_lora.py, kernels/unsloth/rms_layernorm.py and rope_embedding.py). foak fuses adapters on
4-bit weights alone (framework_plugin_fast_kernels.py: "fused_lora only required for quant-peft").
"""

from collections.abc import Mapping

from studio.core.errors import BadInput
from studio.core.shape import Linear, ModelShape
from studio.core.vram.modules import FusedKernels, Run
from studio.core.vram.operators import node_of
from studio.core.vram.polynomial import Polynomial, total
from studio.core.vram.tape import Node, Tensor

KERNEL_FAMILIES: Mapping[str, frozenset[str]] = {
    "foak": frozenset({"gpt_bigcode", "granite", "granitemoe", "llama", "mistral", "mixtral"}),
    "liger": frozenset(
        {"gemma", "gemma2", "gemma3_text", "glm4", "granite", "hunyuan_v1_dense", "llama", "ministral", "mistral"}
        | {"mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
    ),
}
"""Model types that each has kernels for (fms_acceleration_foak/models, liger_kernel/transformers/monkey_patch.py)."""


def check_kernels(shape: ModelShape, kernels: FusedKernels, *, fused_loss: bool) -> None:
    """Raise where there are no such kernels for a model.

    Args:
        shape: The model.
        kernels: Which kernels.
        fused_loss: Whether the loss is to be fused with the head.

    Raises:
        BadInput: There are none.
    """
    if kernels != "none" and shape.family not in KERNEL_FAMILIES[kernels]:
        known = ", ".join(sorted(KERNEL_FAMILIES[kernels]))
        raise BadInput(
            f"{kernels} has no kernels for {shape.family}; leave --fused-kernels out. It has some for {known}"
        )
    if kernels == "liger" and shape.family == "granite" and fused_loss:
        raise BadInput("liger has no fused loss for granite, which scales its logits; add --loss full")


def rms_norm(x: Tensor, groups: float, *, over_gradient: bool) -> Tensor:
    """Return an RMS norm in one kernel: it saves its input and one fp32 number per row.

    Args:
        x: What is normed.
        groups: Norms per token.
        over_gradient: Whether its gradient is written over the one that comes in; a norm after a block, whose incoming
            gradient the residual still needs, gets a new one.
    """
    inverse = Tensor(x.tape, Polynomial(per_token=groups), 4)
    gradient = None if over_gradient else (x.elements, x.itemsize)
    return Tensor(x.tape, x.elements, x.itemsize, node_of(x.tape, (x,), (gradient,), (x, inverse)))


def rotate(x: Tensor) -> Tensor:
    """Return rotary positions applied in place; so is their gradient."""
    return Tensor(x.tape, x.elements, x.itemsize, node_of(x.tape, (x,), (None,)), base=x)


def gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return `act(gate) * up`: both are saved, and their gradients are written over them."""
    return Tensor(gate.tape, gate.elements, gate.itemsize, node_of(gate.tape, (gate, up), (0, 1), (gate, up)))


def fuses_adapters(run: Run, maps: tuple[Linear, ...]) -> bool:
    """Whether one function holds the adapters of these linear maps: foak's, on 4-bit weights, where all are targets."""
    form = run.form
    return (
        form.fused_kernels == "foak"
        and form.quantised in ("nf4", "fp4")
        and not form.adapter.dora
        and all(linear.name in form.adapter.targets for linear in maps)
    )


def _product(run: Run, linear: Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x @ W + dropout(x) @ A @ B`, added in place, and what the adapter saw of x.

    The weight is dequantised whole for its product; each map drops x anew, and its copy is kept.
    """
    tape, compute = run.tape, run.form.arithmetic.compute
    weight = Polynomial(fixed=compute * linear.inputs * linear.outputs)
    out = Polynomial(per_token=linear.outputs)
    dequantised = Tensor(tape, weight, 1)
    result = Tensor(tape, out, x.itemsize)
    del dequantised
    seen = Tensor(tape, x.elements, x.itemsize) if run.form.adapter.dropout else x
    tape.passing(result.bytes)
    return result, seen


def _trained_node(
    run: Run,
    maps: tuple[Linear, ...],
    gradient: tuple[Polynomial, float] | int,
    saved: tuple[Tensor, ...],
    works: tuple[Polynomial, ...],
) -> Node | None:
    """Return a node that makes the adapters' gradients, and the input's, which it saves first, where that wants one."""
    tape = run.tape
    if not tape.records:
        return None
    tape.saving()
    trained = total(Polynomial(per_rank=linear.inputs + linear.outputs) for linear in maps), run.gradients
    return Node(tape.next_sequence(), (saved[0].node,), (gradient,), list(saved), works, trained=trained, unpacks=True)


def adapted_linears(run: Run, maps: tuple[Linear, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Return the outputs of one function over the adapted maps of one input (LoRA_QKV, LoRA_W).

    It saves its input and what each adapter saw of it. The gradient is summed over the maps beside a mask of what was
    dropped and two products; LoRA_QKV writes it over its own input, LoRA_W makes a new one.
    """
    pairs = [_product(run, linear, x) for linear in maps]
    outs = tuple(out for out, _ in pairs)
    seen = tuple(dropped for _, dropped in pairs if dropped is not x)
    shared = len(maps) > 1
    gradient = 0 if shared else (x.elements, x.itemsize)
    node = _trained_node(run, maps, gradient, (x, *seen), (x.elements, x.bytes, x.bytes))
    for out in outs:
        out.node = node
    if node is not None:
        node.apart = shared
    return outs


def adapted_mlp(run: Run, maps: tuple[Linear, ...], x: Tensor) -> Tensor:
    """Return `down(act(gate(x)) * up(x))` as one function with all three adapters (LoRA_MLP).

    It saves gate, up, the input, and what the three adapters saw. Its backward makes the inner gradient, twice while
    the adapter's part is added, and writes all else over what was saved.
    """
    (gate, seen_gate), (up, seen_up) = (_product(run, linear, x) for linear in maps[:2])
    inner = Tensor(run.tape, gate.elements, gate.itemsize)
    out, seen_inner = _product(run, maps[2], inner)
    del inner
    seen = tuple(dropped for dropped in (seen_gate, seen_up) if dropped is not x)
    works = (gate.elements, gate.bytes, gate.bytes)
    out.node = _trained_node(run, maps, 0, (x, gate, up, seen_inner, *seen), works)
    return out
