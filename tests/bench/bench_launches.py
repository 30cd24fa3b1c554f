"""Kernel launches of a decoder layer, forward, computed again and backward: `python -m tests.bench.bench_launches`.

The training job's own step is traced on fake tensors as it would run on a card of compute capability 8.0, and every
operator is counted with the kernels that it launches there (`kernels_of`). Two depths are traced: their difference is
one layer, without embeddings, head and optimizer. No card was there: how many kernels an operator launches is read in
the libraries' sources, and what a driver splits further is not known. Says nothing of seconds.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from studio.jobs.base.swapped import swapped
from studio.jobs.measure.fake import fake_world
from studio.jobs.measure.storages import Storages
from studio.jobs.measure.trace import Target, run_engine
from studio.jobs.measure.weightless import config_of as transformers_config
from tests.bench.trace_settings import config_of, recipe_of

PASSES = ("forward", "again", "backward")

_NONE = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "permute"),
    *("as_strided", "alias", "detach", "split", "split_with_sizes", "unbind", "_reshape_alias", "lift_fresh", "chunk"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_same_size", "device", "unfold"),
    *("_local_scalar_dense", "resolve_conj", "view_as_complex", "view_as_real", "_to_copy_none", "dim", "diagonal"),
}
"""Operators that make views, or take memory and leave it as it is."""

_ONE = {
    *("mm", "bmm", "addmm_", "embedding", "_to_copy", "copy_", "clone", "cat", "stack", "sum", "mean", "pow", "rsqrt"),
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "exp", "exp_", "tanh", "tanh_", "square"),
    *(
        "silu",
        "silu_",
        "silu_backward",
        "gelu",
        "gelu_backward",
        "relu",
        "threshold_backward",
        "sigmoid",
        "tanh_backward",
    ),
    *("sigmoid_backward", "addcmul", "addcmul_", "zeros", "zeros_like", "new_zeros", "fill_", "full", "full_like"),
    *(
        "ones",
        "ones_like",
        "new_ones",
        "arange",
        "scalar_tensor",
        "zero_",
        "where",
        "masked_fill",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
    ),
    *(
        "ge",
        "logical_not",
        "bitwise_and",
        "gather",
        "scatter_add_",
        "native_dropout",
        "native_dropout_backward",
        "amax",
    ),
    *("cos", "sin", "cumsum", "index", "index_add_", "tril", "triu", "native_layer_norm", "_softmax", "log"),
    *("_fused_rms_norm", "reciprocal", "dequantize_blockwise", "dequantize_4bit", "repeat_interleave", "abs", "max"),
    *(
        "optimizer_update_8bit_blockwise",
        "optimizer_update_32bit",
        "_foreach_copy_",
        "_foreach_norm",
        "linalg_vector_norm",
    ),
    *(
        "_foreach_mul_",
        "_fused_adamw_",
        "isfinite",
        "all",
        "any",
        "minimum",
        "maximum",
        "slice_scatter",
        "select_scatter",
    ),
}
"""Operators with one kernel. A `_foreach_` one has one for about a hundred tensors."""

_SOME = {
    "addmm": 2,  # copies what is added, then multiplies into the copy (Blas.cpp addmm_out_cuda_impl); see kernels_of
    "baddbmm": 2,
    "_scaled_dot_product_flash_attention": 1,
    "_scaled_dot_product_flash_attention_backward": 3,  # row sums, gradients, the query's cast
    "_scaled_dot_product_efficient_attention": 1,
    "_scaled_dot_product_efficient_attention_backward": 2,  # delta, gradients (attention_backward.cu)
    "_softmax_backward_data": 2,  # grad * output, then the kernel (SoftMax.cu)
    "native_layer_norm_backward": 3,
    "_fused_rms_norm_backward": 1,  # of the input alone: the weight is frozen (layer_norm_kernel.cu)
    "logsumexp": 6,  # amax, subtract, exp, sum, log, add (ReduceOps.cpp)
    "nonzero": 4,
    "slice_backward": 2,  # zeros of the whole size, then a copy into the slice (FunctionsManual.cpp)
    "select_backward": 2,
    "embedding_dense_backward": 4,
    "nll_loss_forward": 1,
    "nll_loss_backward": 2,
    "_log_softmax": 1,
    "_log_softmax_backward_data": 1,
    "_amp_foreach_non_finite_check_and_unscale_": 1,
}


def kernels_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return how many kernels an operator launches on a card.

    Raises:
        KeyError: The table does not know the operator.
    """
    name = func.overloadpacket.__name__
    if name == "gemm_4bit":
        return _of_four_bits(args, kwargs)
    if name == "addmm" and kwargs.get("beta") == 0:
        return 1  # what is added is not read, so nothing is copied
    if name == "addmm" and args[0].dim() == 1:
        return 1  # a bias is added as the product is written (cublasLt's epilogue)
    if name == "_scaled_dot_product_flash_attention_backward":
        # Where heads share keys, the gradients of a group's keys and values are summed (flash_api.cpp mha_bwd).
        return _SOME[name] + 2 * (args[1].shape[1] != args[2].shape[1])
    if name in _NONE:
        return 0
    return 1 if name in _ONE else _SOME[name]


_ARGUMENTS = [argument.name for argument in torch.ops.bitsandbytes.gemm_4bit.default._schema.arguments]


def _of_four_bits(args: Any, kwargs: Any) -> int:
    """Return the kernels of a product with a 4-bit weight (bitsandbytes/backends/cuda/ops.py, 0.50).

    Above 1536 rows the weight is dequantised, after its scales and their offset where these are quantised, too.
    """
    rows = args[0].numel() // args[0].shape[-1]
    if rows <= 1536:  # one kernel at best: between 5 and 1536 rows it depends on the card
        return 1
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    return 2 + 2 * (given.get("absmax_8bit") is not None)


class Launches(TorchDispatchMode):
    """Counts kernels by pass and operator.

    Attributes:
        counts: Kernels by operator, for each pass of the step that is counted.
        dequantised: How many 4-bit weights were dequantised in all passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in PASSES}
        self.dequantised = 0
        self.stage = ""
        self.again = False
        self._unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count its kernels."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.stage in ("forward", "backward") and not _on_meta(out):
            name = func.overloadpacket.__name__
            try:
                count = kernels_of(func, args, kwargs, out)
            except KeyError:
                self._unknown.add(name)
                return out
            self.counts["again" if self.again else self.stage][name] += count
            self.dequantised += name == "dequantize_4bit" or (name == "gemm_4bit" and count > 1)
        return out

    def known(self) -> dict[str, Counter[str]]:
        """Return the counts.

        Raises:
            KeyError: The table lacks operators that ran.
        """
        if self._unknown:
            raise KeyError(f"no kernels are known for {', '.join(sorted(self._unknown))}")
        return self.counts


def _on_meta(out: Any) -> bool:
    return isinstance(out, Tensor) and out.is_meta


class _Stages(Storages):
    """Tells the counter which stage of the first step runs."""

    def __init__(self, launches: Launches) -> None:
        super().__init__(block_bytes=512)
        self._launches, self._steps = launches, 0

    def stage(self, name: str) -> None:
        """Begin a stage."""
        super().stage(name)
        self._steps += name == "forward"
        self._launches.stage = name if self._steps == 1 else ""


@contextmanager
def _told_of_recomputation(launches: Launches) -> Iterator[None]:
    hook: Any = checkpoint._recomputation_hook

    class Told(hook):  # type: ignore[misc]
        def __enter__(self) -> Any:
            launches.again = True
            return super().__enter__()

        def __exit__(self, *error: Any) -> Any:
            launches.again = False
            return super().__exit__(*error)

    # Nothing else in torch tells that a checkpoint computes its function again.
    with swapped(checkpoint, "_recomputation_hook", Told):
        yield


def launches_of(values: dict[str, Any], settings: dict[str, Any]) -> tuple[dict[str, Counter[str]], int]:
    """Return the kernels of a step's passes by operator, and its dequantisations; head, loss and optimizer left out."""
    recipe, launches = recipe_of(settings), Launches()
    with fake_world() as numbers, torch.random.fork_rng(devices=[]), launches, _told_of_recomputation(launches):
        storages = _Stages(launches)
        run_engine(transformers_config(values), recipe, Target("cuda", recipe.model.dtype), storages, numbers)
    return launches.known(), launches.dequantised


def of_a_layer(model: str, settings: dict[str, Any]) -> tuple[dict[str, Counter[str]], int]:
    """Return the kernels of one layer's passes by operator, and its dequantisations: what a third layer adds to two."""
    (two, before), (three, after) = (launches_of(config_of(model, depth), settings) for depth in (2, 3))
    return {name: three[name] - two[name] for name in PASSES}, after - before


SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA bf16": {"method": "lora", "seq_len": 2048},
    "QLoRA NF4": {"method": "qlora", "seq_len": 2048},
    "QLoRA NF4, dequantised weights kept": {"method": "qlora", "seq_len": 2048, "keep_dequantised": True},
    "LoRA bf16, not computed again": {"method": "lora", "seq_len": 2048, "recompute": "none"},
    "QLoRA NF4, dropout": {"method": "qlora", "seq_len": 2048, "dropout": 0.05},
}
MODELS = ("Llama-3.1-8B", "Qwen3-4B", "gemma-2-2b")


def main() -> None:
    """Print launches by pass for some models and settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--by-operator", action="store_true")
    asked = parser.parse_args()
    print("| model | settings | forward | again | backward | all | dequantised |\n" + "|---" * 7 + "|")
    for model in asked.model or MODELS:
        for name, settings in SETTINGS.items():
            found, dequantised = of_a_layer(model, settings)
            sums = [found[one].total() for one in PASSES]
            print(f"| {model} | {name} | {' | '.join(map(str, (*sums, sum(sums), dequantised)))} |", flush=True)
            for one in PASSES if asked.by_operator else ():
                print(f"  {one}: " + ", ".join(f"{word} {count}" for word, count in found[one].most_common() if count))


if __name__ == "__main__":
    main()
