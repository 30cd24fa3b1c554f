"""What an estimate says, and the one document of it that `plan --json` prints and that a run keeps as `plan.json`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from studio.core.gpu_catalogue import Gpu
from studio.core.shape import ModelShape
from studio.core.vram.frozen import Held
from studio.core.vram.modules import Kernel
from studio.core.vram.setup import Setup

Verdict = Literal["fits", "tight", "does not fit"]

SCHEMA = 1
_NOT_OURS = {
    "kbit_prepare": False,
    "head_cast_back": False,
    "outputs_kept": False,
    "transformers": "",
    "fused_kernels": "none",
}
"""Fields of a document's `setup` that only stock loops set, with what they say of our loop."""


@dataclass(frozen=True, slots=True)
class Range:
    """A number of bytes as lowest, expected and highest."""

    low: int
    expected: int
    high: int


@dataclass(frozen=True, slots=True)
class Components:
    """What the peak is made of, in bytes; all but `context` add up to the peak of live tensors."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    context: int


class Host(NamedTuple):
    """What waits in the computer's own memory, in bytes.

    Attributes:
        weights: Frozen weights of streamed layers, and an input embedding that is looked up there.
        checkpoints: Inputs of layers that are computed again.
    """

    weights: int = 0
    checkpoints: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.checkpoints


@dataclass(frozen=True, slots=True)
class VramEstimate:
    """What a set-up needs on one device.

    Attributes:
        stage: The stage that peaks.
        stages: Peak of live tensors in each stage, in order.
        components: What the peak is made of.
        allocated: Peak of live tensors (torch.cuda.max_memory_allocated). It may fall where a larger rank lets
            bitsandbytes page a state or keep it in 8 bits, by what that saves.
        reserved: Peak of the allocator's segments (torch.cuda.max_memory_reserved).
        device: What nvidia-smi shows for this process. On a card neither what is expected nor the high end falls when
            rank, batch, length or targets grow; at the low end all pages are on the host.
        trainable_parameters: Trained parameters.
        kernel: Which attention was assumed.
        held: How much of the frozen weights is in 4 bits.
        host: What waits in the computer's own memory.
        notes: What makes the range wide, and what the user should know.
    """

    stage: str
    stages: tuple[tuple[str, int], ...]
    components: Components
    allocated: Range
    reserved: Range
    device: Range
    trainable_parameters: int
    kernel: Kernel
    held: Held
    host: Host = Host()  # noqa: RUF009  a tuple
    notes: tuple[str, ...] = ()

    def verdict(self, budget_bytes: int) -> Verdict:
        """Return whether it fits a budget: `fits` holds at the high end of the range, `tight` only as expected."""
        if self.device.high <= budget_bytes:
            return "fits"
        return "tight" if self.device.expected <= budget_bytes else "does not fit"

    def headroom_bytes(self, budget_bytes: int) -> int:
        """Return what a budget leaves free as expected; negative when it is too small."""
        return budget_bytes - self.device.expected


def plan_to_dict(
    estimate: VramEstimate, shape: ModelShape, setup: Setup, *, gpu: Gpu | None = None, budget_bytes: int | None = None
) -> dict[str, Any]:
    """Return the plan as plain values; every size is in bytes.

    `peak_bytes` is what live tensors hold at most (torch's allocated), `reserved_bytes` what the allocator takes,
    `device_bytes` what nvidia-smi shows for the process. `low_bytes` is the least the tensors alone can be,
    `high_bytes` the most the device may show; `fits` compares the latter with the budget and is null without one.

    Args:
        estimate: What was estimated.
        shape: The model.
        setup: How it is trained.
        gpu: The card, where one is meant.
        budget_bytes: What the run may use of it.
    """
    verdict = None if budget_bytes is None else estimate.verdict(budget_bytes)
    return {
        "schema": SCHEMA,
        "engine": setup.engine,
        "peak_bytes": estimate.allocated.expected,
        "reserved_bytes": estimate.reserved.expected,
        "device_bytes": estimate.device.expected,
        "low_bytes": estimate.allocated.low,
        "high_bytes": estimate.device.high,
        "ranges": {name: asdict(getattr(estimate, name)) for name in ("allocated", "reserved", "device")},
        "budget_bytes": budget_bytes,
        "headroom_bytes": None if budget_bytes is None else estimate.headroom_bytes(budget_bytes),
        "fits": None if verdict is None else verdict == "fits",
        "verdict": verdict,
        "stage": estimate.stage,
        "stages": dict(estimate.stages),
        "components": asdict(estimate.components),
        "trainable_parameters": estimate.trainable_parameters,
        "attention_kernel": estimate.kernel,
        "host_bytes": estimate.host.total,
        "host_parts": estimate.host._asdict(),
        **asdict(estimate.held),
        "model": {
            "family": shape.family,
            "parameters": shape.parameters,
            "tower_parameters": shape.tower_parameters,
            "layers": shape.layers,
            "hidden": shape.hidden,
            "vocabulary": shape.vocabulary,
            "quantisation": None if shape.quantised is None else asdict(shape.quantised),
        },
        "setup": _setup_to_dict(setup),
        "gpu": None if gpu is None else {"name": gpu.name, "total_bytes": gpu.total_bytes},
        "notes": list(estimate.notes),
    }


def _setup_to_dict(setup: Setup) -> dict[str, Any]:
    said = {
        **_NOT_OURS,
        "engine": setup.engine,
        "autocast": setup.autocast,
        "grad_checkpointing": setup.recomputes,
        **asdict(setup),
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}
