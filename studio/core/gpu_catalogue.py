"""Cards by name: how much memory NVML reports in total, and how fast they compute.

A card's box says 24 GB; NVML reports less, since firmware and error correction take some. The totals are those that
nvidia-smi shows (in MiB) in many people's public listings with drivers of 2023 and later. Bandwidths and peaks are the
maker's own: from the data sheets of data-centre and workstation cards, and from the architecture papers (Turing, GA102,
Ada, Blackwell) of the others. A peak is dense, without sparsity, in 16 bit with fp32 sums, as training does it: GeForce
cards from Turing on reach half of what is printed for 16-bit sums. For a card without tensor cores the peak is that of
its other cores; for a laptop it is that at the highest clock, which its power limit may not allow. The peaks were
entered from memory of these papers and were not looked up again; tests hold only the ratios between cards.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from studio.core.errors import BadInput
from studio.core.text import plain

MIB, GIB = 2**20, 2**30

_BF16_FROM = (8, 0)
"""The first compute capability with bf16 in hardware, Ampere's (CUDA C++ Programming Guide, tensor cores)."""


def sixteen_bit(capability: tuple[int, int] | None) -> Literal["bf16", "fp16"]:
    """Return the 16-bit format in which a card trains and serves: bf16 where the card has it in hardware.

    This is the one place that decides it. torch's `is_bf16_supported()` says yes for older cards too, which emulate
    bf16. It comes before fp16 because the QLoRA authors' README says that only 80 % of 7B runs with fp16 finish without
    error.

    Args:
        capability: The card's compute capability; None without a card, or where it is unknown.
    """
    return "bf16" if capability is None or capability >= _BF16_FROM else "fp16"


def emulated(dtype: str, name: str, capability: tuple[int, int] | None) -> str:
    """Return a warning for a card that would emulate the format it computes in; empty where it has the format."""
    if dtype != "bf16" or capability is None or sixteen_bit(capability) == "bf16":
        return ""
    number = ".".join(map(str, capability))
    return (
        f"{name or 'this card'} (compute capability {number}) has no bf16 of its own, which begins with 8.0: torch "
        "emulates it, slowly. model.dtype auto takes fp16 there"
    )


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card, or what is known of one.

    Attributes:
        name: What NVML calls it, without the maker; empty for a card of which only the size is known.
        total_bytes: Total memory as NVML reports it.
        compute_capability: Major and minor.
        kind: consumer, laptop, workstation or data-centre.
        bandwidth_gb_per_second: Memory bandwidth by data sheet, 0 where unknown.
        context_bytes: What a CUDA context takes outside the allocator, 0 where it was not measured.
        half_tflops: Peak of 16-bit matrix products with fp32 sums, dense, in 10^12 a second; 0 where unknown.
        single_tflops: The same of fp32 products (torch leaves TF32 off), 0 where unknown.
        share: The fraction of the card that computes: less than 1 for an instance of a card that is divided (MIG).
    """

    name: str
    total_bytes: int
    compute_capability: tuple[int, int] = (8, 0)
    kind: str = ""
    bandwidth_gb_per_second: float = 0.0
    context_bytes: int = 0
    half_tflops: float = 0.0
    single_tflops: float = 0.0
    share: float = 1.0

    @property
    def bf16(self) -> bool:
        """Whether it has bf16 in hardware."""
        return sixteen_bit(self.compute_capability) == "bf16"

    @property
    def rated(self) -> bool:
        """Whether its peaks and its bandwidth are known."""
        return min(self.half_tflops, self.single_tflops, self.bandwidth_gb_per_second) > 0


_T4_CONTEXT = 141 * MIB
"""Process use minus reserved on a T4, in 25 measured runs of the fitcheck-llm archive."""

_TABLE = """
consumer     GTX 1080                   8192   6.1   320     8.9    8.9
consumer     GTX 1080 Ti               11264   6.1   484    11.3   11.3
consumer     GTX 1660 Ti                6144   7.5   288    10.9    5.4
consumer     RTX 2060                   6144   7.5   336    25.8    6.5
consumer     RTX 2070                   8192   7.5   448    29.9    7.5
consumer     RTX 2080                   8192   7.5   448    40.3   10.1
consumer     RTX 2080 Ti               11264   7.5   616    53.8   13.4
consumer     TITAN RTX                 24576   7.5   672   130.5   16.3
consumer     RTX 3050                   8192   8.6   224    18.2    9.1
consumer     RTX 3060                  12288   8.6   360    25.5   12.7
consumer     RTX 3060 Ti                8192   8.6   448    32.4   16.2
consumer     RTX 3070                   8192   8.6   448    40.6   20.3
consumer     RTX 3070 Ti                8192   8.6   608    43.5   21.7
consumer     RTX 3080                  10240   8.6   760    59.5   29.8
consumer     RTX 3080 12GB             12288   8.6   912    61.3   30.6
consumer     RTX 3080 Ti               12288   8.6   912    68.2   34.1
consumer     RTX 3090                  24576   8.6   936    71.2   35.6
consumer     RTX 3090 Ti               24564   8.6  1008    80.0   40.0
consumer     RTX 4060                   8188   8.9   272    30.2   15.1
consumer     RTX 4060 Ti                8188   8.9   288    44.1   22.1
consumer     RTX 4060 Ti 16GB          16380   8.9   288    44.1   22.1
consumer     RTX 4070                  12282   8.9   504    58.3   29.1
consumer     RTX 4070 SUPER            12282   8.9   504    71.0   35.5
consumer     RTX 4070 Ti               12282   8.9   504    80.2   40.1
consumer     RTX 4070 Ti SUPER         16376   8.9   672    88.2   44.1
consumer     RTX 4080                  16376   8.9   717    97.5   48.7
consumer     RTX 4080 SUPER            16376   8.9   736   104.4   52.2
consumer     RTX 4090                  24564   8.9  1008   165.2   82.6
consumer     RTX 5060                   8151  12.0   448    38.4   19.2
consumer     RTX 5060 Ti                8151  12.0   448    47.4   23.7
consumer     RTX 5060 Ti 16GB          16311  12.0   448    47.4   23.7
consumer     RTX 5070                  12227  12.0   672    61.7   30.9
consumer     RTX 5070 Ti               16303  12.0   896    87.9   43.9
consumer     RTX 5080                  16303  12.0   960   112.6   56.3
consumer     RTX 5090                  32607  12.0  1792   209.5  104.8
laptop       RTX 3060 Laptop            6144   8.6   336    26.2   13.1
laptop       RTX 3070 Laptop            8192   8.6   448    33.2   16.6
laptop       RTX 3080 Laptop            8192   8.6   448    42.0   21.0
laptop       RTX 3080 Ti Laptop        16384   8.6   512    47.2   23.6
laptop       RTX 4060 Laptop            8188   8.9   256    29.1   14.6
laptop       RTX 4070 Laptop            8188   8.9   256    40.1   20.0
laptop       RTX 4080 Laptop           12282   8.9   432    67.7   33.9
laptop       RTX 4090 Laptop           16376   8.9   576    79.4   39.7
laptop       RTX 5070 Laptop            8151  12.0   384    43.3   21.6
laptop       RTX 5070 Ti Laptop        12227  12.0   672    52.3   26.1
laptop       RTX 5080 Laptop           16303  12.0   896    70.3   35.1
laptop       RTX 5090 Laptop           24463  12.0   896    90.7   45.3
workstation  Quadro RTX 6000           24576   7.5   672   130.5   16.3
workstation  Quadro RTX 8000           49152   7.5   672   130.5   16.3
workstation  RTX A2000 12GB            12282   8.6   288    31.9    8.0
workstation  RTX A4000                 16376   8.6   448    76.7   19.2
workstation  RTX A5000                 24564   8.6   768   111.1   27.8
workstation  RTX A6000                 49140   8.6   768   154.8   38.7
workstation  RTX 4000 Ada              20475   8.9   360   106.9   26.7
workstation  RTX 5000 Ada              32760   8.9   576   261.1   65.3
workstation  RTX 6000 Ada              49140   8.9   960   364.2   91.1
workstation  RTX PRO 6000 Blackwell    97887  12.0  1792   503.8  125.0
data-centre  Tesla P40                 24576   6.1   347    11.8   11.8
data-centre  Tesla P100                16384   6.0   732    18.7    9.5
data-centre  Tesla V100 16GB           16384   7.0   900   112.0   14.0
data-centre  Tesla V100 32GB           32768   7.0   900   112.0   14.0
data-centre  Tesla T4                  15360   7.5   320    65.0    8.1
data-centre  A2                        15356   8.6   200    18.0    4.5
data-centre  A10                       23028   8.6   600   125.0   31.2
data-centre  A10G                      23028   8.6   600    70.0   31.5
data-centre  A30                       24576   8.0   933   165.0   10.3
data-centre  A40                       46068   8.6   696   149.7   37.4
data-centre  A100 40GB                 40960   8.0  1555   312.0   19.5
data-centre  A100 80GB                 81920   8.0  2039   312.0   19.5
data-centre  L4                        23034   8.9   300   121.0   30.3
data-centre  L40                       46068   8.9   864   181.0   90.5
data-centre  L40S                      46068   8.9   864   362.0   91.6
data-centre  H100 80GB                 81559   9.0  3350   989.4   67.0
data-centre  H100 NVL                  95830   9.0  3938   835.0   60.0
data-centre  GH200 96GB                97871   9.0  4000   989.4   67.0
data-centre  H200                     143771   9.0  4800   989.4   67.0
data-centre  B200                     183359  10.0  8000  2250.0   75.0
"""


def _read_table() -> dict[str, Gpu]:
    cards = {}
    for line in _TABLE.strip().splitlines():
        kind, *words, mebibytes, capability, bandwidth, half, single = line.split()
        name = " ".join(words)
        major, _, minor = capability.partition(".")
        context = _T4_CONTEXT if name == "Tesla T4" else 0
        cards[name] = Gpu(
            name=name,
            total_bytes=int(mebibytes) * MIB,
            compute_capability=(int(major), int(minor)),
            kind=kind,
            bandwidth_gb_per_second=float(bandwidth),
            context_bytes=context,
            half_tflops=float(half),
            single_tflops=float(single),
        )
    return cards


CATALOGUE: dict[str, Gpu] = _read_table()
"""Every known card by name."""

_NOISE = frozenset(
    [
        "nvidia",
        "geforce",
        "tesla",
        "quadro",
        "gpu",
        "generation",
        "sxm",
        "sxm2",
        "sxm4",
        "sxm5",
        "pcie",
        "hbm2",
        "hbm2e",
        "hbm3",
        "hbm3e",
        "edition",
        "server",
        "workstation",
        "max",
        "q",
        "design",
    ]
)
_SIZE = re.compile(r"\d+gb")


def find_gpu(name: str) -> Gpu:
    """Return the card that a name means, written as NVML does or short (`4090`, `a100-80gb`, `t4`).

    A name that fits several sizes of one card means the smallest: a plan for the larger one would promise too much.

    Raises:
        BadInput: No card is called that; the message has the nearest names.
    """
    wanted = _words(name)
    named = any(not _SIZE.fullmatch(word) for word in wanted)
    fitting = [gpu for gpu in CATALOGUE.values() if named and wanted <= _words(gpu.name) | {_size(gpu)}]
    if not fitting:
        near = difflib.get_close_matches(name.lower(), [known.lower() for known in CATALOGUE], n=3, cutoff=0.5)
        names = ", ".join(known for known in CATALOGUE if known.lower() in near) or "RTX 4090, A100 80GB, T4"
        shown = plain(name, one_line=True, limit=60)
        raise BadInput(f"no card called {shown!r} is known; perhaps {names}. Any other: plan and fit take --vram-gib X")
    return min(fitting, key=lambda gpu: (len(_words(gpu.name) - wanted - {_size(gpu)}), gpu.total_bytes))


def card_of_size(gib: float) -> Gpu:
    """Return a card of a size in GiB of which nothing else is known; it is taken to be Ampere or newer."""
    return Gpu("", int(gib * GIB))


def _words(name: str) -> set[str]:
    """Split a name into words; `rtx4090` is two, `80 GB`, `80GiB` and `80G` are all `80gb`."""
    text = re.sub(r"(\d+)\s*g(i?b)?\b", r" \1gb ", name.lower())
    text = re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", text)
    return set(re.findall(r"[a-z0-9]+", text)) - _NOISE


def _size(gpu: Gpu) -> str:
    """Return the size on the card's box, such as `24gb`: the next usual size from what NVML reports."""
    gibibytes = gpu.total_bytes / GIB
    return f"{next(size for size in _BOX_SIZES if size >= gibibytes - 0.01)}gb"


_BOX_SIZES = (6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80, 94, 96, 141, 180, 192)
