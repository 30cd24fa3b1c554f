"""Tokens a second and hours from a roofline: the work of a micro-batch over what a card sustains.

All of 132 published speeds lie in the range, of a T4, an A100, an L40S and three GeForce cards, and the median error is
7 % (`python -m tests.core.published_speed` prints all). The constants were chosen on these speeds. Constants fitted on
one source and tried on another, on other models or another card, are 6 to 10 % off in the median and 31 % at worst
(`python -m tests.bench.bench_speed`). A kind of card without published rows gets a wide range.
"""

from dataclasses import dataclass, replace

from studio.core.gpu_catalogue import Gpu
from studio.core.shape import ModelShape
from studio.core.step_work import StepWork, step_work
from studio.core.vram.setup import Setup

_TERA, _GIGA = 1e12, 1e9
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Sustained:
    """How much of the rates in a card's data sheet training reaches.

    Attributes:
        products: Share of the peak rate in matrix products.
        attention: Share of it in attention's products.
        bandwidth: Share of the memory bandwidth in everything between the products.
        dequantising: Share of the memory bandwidth while 4-bit weights are dequantised.
        spread: The seconds of a step lie within this factor of what is expected, up or down.
        basis: Where these numbers come from, in words for a user.
    """

    products: float
    attention: float
    bandwidth: float
    dequantising: float
    spread: float
    basis: str


_SERVER = Sustained(0.90, 0.50, 0.65, 0.30, 1.5, "a roofline fitted to 51 published speeds of an A100 and an L40S")
_LOW_POWER = Sustained(0.55, 0.16, 0.42, 0.30, 1.5, "a roofline fitted to 61 published speeds of a T4")
_OTHER = Sustained(
    0.70, 0.30, 0.55, 0.30, 1.8, "a roofline between what a T4 and an A100 sustain; not compared with such a card"
)

_AMPERE = Sustained(0.90, 0.50, 0.60, 0.60, 1.5, "a roofline fitted to 4 published speeds of an RTX 3090")
_LARGE_CACHE = Sustained(
    0.90, 0.50, 1.20, 0.60, 1.5, "a roofline fitted to 16 published speeds of an RTX 4090 and an RTX 5090"
)
"""GeForce cards from the RTX 40 on: a second-level cache of 24 to 96 MB, where an RTX 3090 has 6, holds what one kernel
leaves for the next, so that more moves than the memory's bandwidth."""

_GEFORCES = {(8, 6): _AMPERE, (8, 9): _LARGE_CACHE, (12, 0): _LARGE_CACHE}
"""By compute capability. Laptops and workstation cards share chips with them, but not their power: no row tells."""

_LOW_POWER_BANDWIDTH, _SERVER_BANDWIDTH = 320.0, 800.0
"""Memory bandwidths, GB/s, that divide data-centre cards. Those up to the first have 60 to 75 W (T4, L4, A2) and cannot
hold their peak; those from the second on are built and cooled like the A100 and the L40S. The rest (A10, A40 ...) lies
between."""

_SINGLE, _SINGLE_ATTENTION = 0.7, 0.5
"""Share of the fp32 peak that products and attention reach (from the T4 rows without autocast)."""

_LAUNCH_SECONDS = (16e-6, 22e-6, 42e-6)
"""Host seconds to launch one kernel from transformers with peft, best, usual, worst: 17 to 21 us in the rows of small
steps on an A100 (Qwen's README at 256 and 512 tokens), 34 on an L40S, 41 on the host of a T4 (SmolLM2-135M). A step
cannot be faster than its launches, on any card."""

_DEQUANTISING = (2.0, 1.0, 0.5)
"""How many times as fast as usual a card dequantises, best, usual, worst: the spread of single fits to the published
rows."""

_LAUNCH_4BIT = (0.95, 1.0, 1.1)
"""How many times as long it takes to launch a kernel where weights are dequantised first, best, usual, worst: a layer
took 1.33 and 1.49 times as long in the T4 rows of SmolLM2-135M at 2 x 512, 1.4 in Qwen's README (1.8 B at 256 tokens,
GPTQ kernels), for 1.35 times as many kernels."""


_HOST_BYTES_PER_SECOND = 12e9
"""What a PCIe 3.0 x16 slot moves: 16 GB/s by its specification, less its protocol. Copies run beside the computation
(jobs/train/offload.py), so that their time adds something between nothing and all of it."""


_LINKS = (((9, 0), 50e9), ((8, 0), 25e9), ((0, 0), 12e9))
"""Bytes a second that come to a card from page-locked memory, by its compute capability: PCIe 5.0, 4.0 and 3.0 x16 less
their protocol. Half of it in a slot with 8 lanes, or in a board of the generation before."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second, as lowest, expected and highest, where the numbers come from, and what limits them."""

    low: float
    expected: float
    high: float
    basis: str
    launch_bound: bool = False
    """Whether a micro-batch lasts as long as the host needs to launch its kernels."""

    def times(self, factor: float) -> "Speed":
        """Return a speed that is so many times as high."""
        return replace(self, low=self.low * factor, expected=self.expected * factor, high=self.high * factor)


@dataclass(frozen=True, slots=True)
class Duration:
    """Hours of training, as shortest, expected and longest; evaluations, samples and loading are not in it."""

    low: float
    expected: float
    high: float


def speed_of(shape: ModelShape, setup: Setup, gpu: Gpu | None) -> Speed | None:
    """Return how fast full rows train on one card; None without a card, or where only its size is known.

    Raises:
        BadInput: A target does not exist in this model.
    """
    if gpu is None or not gpu.rated:
        return None
    sustained = _sustained(gpu)
    work = step_work(shape, setup)
    computing, link = _computing(work, gpu, sustained), _link(gpu)
    least, launching, most = (_launching(work, a_kernel) for a_kernel in _LAUNCH_SECONDS)
    slow, usual, fast = (
        _with_copies(work, max(computing * factor, launches), rate)
        for factor, launches, rate in (
            (sustained.spread, most, link / 2),
            (1.0, launching, link),
            (1 / sustained.spread, least, link),
        )
    )
    bound = computing < launching == usual
    return Speed(work.tokens / slow, work.tokens / usual, work.tokens / fast, sustained.basis, bound)


def careful_speed(shape: ModelShape, setup: Setup, gpu: Gpu) -> float | None:
    """Return tokens a second as expected, were no copy of checkpoints to hide behind the computation; None as above.

    Raises:
        BadInput: A target does not exist in this model.
    """
    if not gpu.rated:
        return None
    work = step_work(shape, setup)
    seconds = _with_copies(work, _seconds(work, gpu, _sustained(gpu)), _link(gpu))
    return work.tokens / (seconds + work.host_bytes / _HOST_BYTES_PER_SECOND)


def duration_of(speed: Speed, tokens: float) -> Duration:
    """Return how long so many tokens take."""
    seconds = (tokens / rate for rate in (speed.high, speed.expected, speed.low))
    return Duration(*(value / _SECONDS_PER_HOUR for value in seconds))


def qlora_slowdown(shape: ModelShape, setup: Setup, gpu: Gpu | None) -> tuple[float, float, float] | None:
    """Return how many times as long a QLoRA step takes as the same LoRA step: least, expected, most.

    The two differ only in dequantising, and how fast a card does that is uncertain. None as for `speed_of`.

    Raises:
        BadInput: A target does not exist in this model.
    """
    if gpu is None or not gpu.rated:
        return None
    sustained = _sustained(gpu)
    # Both from the same set-up, so that all that cancels out does, and only the uncertain share is varied.
    plain, quantised = (step_work(shape, replace(setup, method=method)) for method in ("lora", "qlora"))
    before = _seconds(plain, gpu, sustained)
    low, usual, high = (
        _seconds(quantised, gpu, _dequantising(sustained, times), launch_4bit=launch) / before
        for times, launch in zip(_DEQUANTISING, _LAUNCH_4BIT, strict=True)
    )
    return low, usual, high


def streaming_slowdown(shape: ModelShape, setup: Setup, gpu: Gpu | None) -> tuple[float, float, float] | None:
    """Return how many times as long a step takes as with the whole base on the card: least, expected, most.

    Copies hide behind the computation where it takes longer than they do. None as for `speed_of`, and without streamed
    layers.

    Raises:
        BadInput: A target does not exist in this model.
    """
    if gpu is None or not gpu.rated or not setup.streamed:
        return None
    sustained = _sustained(gpu)
    work = step_work(shape, setup)
    seconds, link = _seconds(work, gpu, sustained), _link(gpu)
    ends = ((sustained.spread, link), (1.0, link), (1 / sustained.spread, link / 2))
    low, usual, high = (_with_copies(work, seconds * factor, rate) / (seconds * factor) for factor, rate in ends)
    return low, usual, high


def time_factor(shape: ModelShape, before: Setup, after: Setup, gpu: Gpu | None) -> tuple[float, float] | None:
    """Return how many times as long an optimizer step takes after a change: least and most.

    A data sheet does not say whether a card is limited by its products, its bandwidth or its launches first: the range
    is that over the kinds of `Sustained`. None as for `speed_of`.

    Raises:
        BadInput: A target does not exist in this model.
    """
    if gpu is None or not gpu.rated:
        return None
    old, new = step_work(shape, before), step_work(shape, after)
    ends = (0, 1, 2) if before.quantised != after.quantised else (1,)
    factors = []
    for kind in (_SERVER, _LOW_POWER, _AMPERE, _LARGE_CACHE, _OTHER):
        unchanged = before.accumulation * _with_copies(old, _seconds(old, gpu, kind), _link(gpu))
        for end in ends:
            ended = _dequantising(kind, _DEQUANTISING[end])
            changed = _with_copies(new, _seconds(new, gpu, ended, launch_4bit=_LAUNCH_4BIT[end]), _link(gpu))
            copies = max(0.0, new.host_bytes - old.host_bytes) / _HOST_BYTES_PER_SECOND
            factors += [after.accumulation * seconds / unchanged for seconds in (changed, changed + copies)]
    return min(factors), max(factors)


def _dequantising(sustained: Sustained, times: float) -> Sustained:
    return replace(sustained, dequantising=times * sustained.dequantising)


def _sustained(gpu: Gpu) -> Sustained:
    if gpu.kind == "consumer" and gpu.compute_capability in _GEFORCES:
        return _GEFORCES[gpu.compute_capability]
    if gpu.kind == "data-centre" and gpu.compute_capability >= (7, 5):
        if gpu.bandwidth_gb_per_second <= _LOW_POWER_BANDWIDTH:
            return _LOW_POWER
        if gpu.bandwidth_gb_per_second >= _SERVER_BANDWIDTH:
            return _SERVER
    return _OTHER


def _link(gpu: Gpu) -> float:
    """Return the bytes a second that come to a card from main memory."""
    return next(rate for capability, rate in _LINKS if gpu.compute_capability >= capability)


def _with_copies(work: StepWork, seconds: float, rate: float) -> float:
    """Return the seconds of a micro-batch with its streamed layers: in each pass the slower of computing and copying.

    Args:
        work: What it costs.
        seconds: Of its computation alone.
        rate: Bytes a second that come to the card.
    """
    forward, copies = seconds * work.forward_share, work.copied_bytes / rate
    return max(forward, copies) + max(seconds - forward, copies)


def _seconds(work: StepWork, gpu: Gpu, sustained: Sustained, *, launch_4bit: float = _LAUNCH_4BIT[1]) -> float:
    """Return the seconds of a micro-batch: those of its computation, or those of all launches.

    The larger of the two: the host launches kernels ahead while the card computes, and the slower sets the pace.
    """
    return max(_computing(work, gpu, sustained), _launching(work, _LAUNCH_SECONDS[1], launch_4bit))


def _computing(work: StepWork, gpu: Gpu, sustained: Sustained) -> float:
    """Return the seconds of a micro-batch's products, attention and traffic, which add up."""
    half, single = gpu.half_tflops * _TERA * gpu.share, gpu.single_tflops * _TERA * gpu.share
    bandwidth = gpu.bandwidth_gb_per_second * _GIGA * gpu.share
    products = work.half / (half * sustained.products) + work.single / (single * _SINGLE)
    # With few tokens the products wait for the weights to be read.
    products = max(products, work.weight_bytes / (bandwidth * min(1.0, sustained.bandwidth)))
    attention = work.half_attention / (half * sustained.attention) + work.single_attention / (
        single * _SINGLE_ATTENTION
    )
    moved = work.moved_bytes / (bandwidth * sustained.bandwidth)
    dequantised = work.dequantised_bytes / (bandwidth * sustained.dequantising)
    return products + attention + moved + dequantised


def _launching(work: StepWork, a_kernel: float, launch_4bit: float = _LAUNCH_4BIT[1]) -> float:
    """Return the host's seconds to launch the kernels of a micro-batch."""
    return a_kernel * work.launches * (launch_4bit if work.dequantised_bytes else 1.0)
