"""Seconds, launches and bytes of a layer of experts in 4 bits: `python -m tests.bench.bench_experts`.

Beside it the same layer with dequantised weights, as transformers computes it. Measured on this machine's CPU; a launch
is an operator that torch dispatches, which on a card is one or more kernels. Says nothing of a card's speed.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from studio.core.experts import EXPERT_GROUP_BYTES
from studio.jobs.base.experts.forms import form_of
from studio.jobs.base.experts.product import take_over
from studio.jobs.base.experts.stacks import Packing, four_bit_stack

_VIEWS = {
    *("view", "t", "transpose", "slice", "select", "unsqueeze", "detach", "alias", "expand", "permute", "as_strided"),
}


class Launches(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in _VIEWS
        return func(*args, **(kwargs or {}))


def experts(count: int, hidden: int, inner: int, per_token: int) -> Any:
    """Return random experts in bf16."""
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=count, num_experts_per_tok=per_token
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    module = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    return module


def packed(module: Any) -> Any:
    """Return the same module with its stacks in 4 bits."""
    form = form_of(module)
    assert form is not None
    for name in form.stacks:
        weights = getattr(module, name).data
        packing = Packing(weights.shape, quant_type="nf4", double_quant=True)
        for number in range(weights.shape[0]):
            packing.add(weights[number : number + 1])
        module._parameters[name] = four_bit_stack(*packing.packed())
    take_over(module, form)
    return module


def measured(module: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> tuple[float, int]:
    """Return seconds (the fastest of three) and launches of a pass there and back."""
    seconds, launches = [], 0
    for attempt in range(4):
        given = x.clone().requires_grad_()
        began = time.perf_counter()
        if attempt:
            module(given, chosen, shares).sum().backward()
            seconds.append(time.perf_counter() - began)
        else:
            with Launches() as counted:
                module(given, chosen, shares).sum().backward()
            launches = counted.count
    return min(seconds), launches


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    print(f"groups of at most {EXPERT_GROUP_BYTES / 2**20:.0f} MiB; one thread of a CPU, bf16, there and back")
    names = ("experts", "hidden", "inner", "tokens", "held", "bytes", "launches", "seconds")
    print(" ".join(f"{name:>12}" for name in names))
    for count, hidden, inner, per_token, tokens in ((32, 512, 256, 4, 256), (64, 1024, 512, 8, 256)):
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        chosen = torch.stack([torch.randperm(count)[:per_token] for _ in range(tokens)])
        shares = torch.rand(tokens, per_token, dtype=torch.bfloat16)
        module = experts(count, hidden, inner, per_token)
        for held in ("16 bit", "4 bits"):
            module = packed(module) if held == "4 bits" else module
            seconds, launches = measured(module, x, chosen, shares)
            size = sum(parameter.nbytes for parameter in module.parameters())
            cells = (count, hidden, inner, tokens, held, f"{size:,}", launches, f"{seconds:.3f}")
            print(" ".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    main()
