"""What the config of a prequantised model says of its weights, and what that means for training.

Training starts from 16-bit weights, from MXFP4, which is brought into another form while it is loaded, or from 4-bit
weights of bitsandbytes under QLoRA. This module knows no files:
whether the tensors agree with the config is checked where they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from studio.core.recipe import Method, QuantType
from studio.core.text import plain
from studio.core.value_kinds import is_module

BITSANDBYTES, GGUF, MXFP4, UNNAMED = "bitsandbytes", "gguf", "mxfp4", "unknown"
_BITS = {"mxfp4": 4, "nvfp4": 4, "fp8": 8, "fbgemm_fp8": 8, "mxfp8": 8, "eetq": 8}
"""What the name alone says (transformers 5.24 utils/quantization_config.py QuantizationMethod)."""
_BITS_KEYS = ("bits", "w_bit", "nbits", "num_bits", "wbits")
_MOST_NAMES = 1000
_OWN_LINEARS = frozenset({"falcon"})
"""Families whose linear layers are a class of their own: transformers hands bitsandbytes nothing but `nn.Linear` itself
(integrations/bitsandbytes.py replace_with_bnb_linear)."""
_ORIGINAL = "the original 16-bit model that it was made from, or a copy written out in 16 bit"


@dataclass(frozen=True, slots=True)
class QuantisedBase:
    """How the weights of a prequantised model lie on disk.

    Attributes:
        method: What quantised them: `gptq`, `bitsandbytes`, `mxfp4`, ...; `unknown` where the config does not name it.
        bits: Bits of a weight; 0 where the config does not say.
        quant_type: The code of 4-bit bitsandbytes weights.
        double_quant: Whether their scales are quantised too.
        skipped: Modules left out by bitsandbytes, as its config names them.
    """

    method: str
    bits: int = 0
    quant_type: QuantType = "nf4"
    double_quant: bool = False
    skipped: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The form in a few words that a terminal may show: `gptq, 4 bit`."""
        name = "in a way that its config does not name" if self.method == UNNAMED else self.method
        return f"{plain(name, one_line=True, limit=40)}{f', {self.bits} bit' if self.bits else ''}"

    @property
    def in_four_bits(self) -> bool:
        """Whether these are 4-bit bitsandbytes weights, on which QLoRA can train as they are."""
        return self.method == BITSANDBYTES and self.bits == 4


def quantised_base(config: Mapping[str, Any]) -> QuantisedBase | None:
    """Return how the weights of a config.json are quantised, None where they are not.

    What cannot be understood in its table is left out; the weights count as quantised all the same.
    """
    mlx = _table(config, "quantization")
    if mlx is not None and "bits" in mlx:
        return QuantisedBase("mlx", _bits(mlx))
    for key in ("quantization_config", "compression_config"):
        said = _table(config, key)
        if said is not None:
            return _from_table(said)
    return None


def refusal(base: QuantisedBase | None, method: Method) -> str:
    """Return why a method cannot train on a base, and what to take instead; empty where it can."""
    if base is None or base.method == MXFP4 or (base.in_four_bits and method == "qlora"):
        return ""
    found = "a GGUF file, made to run models with" if base.method == GGUF else f"already quantised ({base.words})"
    if base.in_four_bits:
        return f"{found}, and method lora wants 16-bit weights: name {_ORIGINAL}, or take method qlora"
    return f"{found}, and training starts from 16-bit weights: name {_ORIGINAL}"


def four_bit_refusal(family: str, method: Method) -> str:
    """Return why QLoRA cannot hold a family's 16-bit weights in 4 bits; empty where it can, or for another method."""
    if method != "qlora" or family not in _OWN_LINEARS:
        return ""
    return f"a {family} model, whose linear layers transformers does not hand to bitsandbytes: take method lora"


def note_on(base: QuantisedBase, method: Method, engine: Literal["studio", "hf"]) -> str:
    """Return what an estimate for a prequantised base stands for, as a note to it."""
    if base.in_four_bits and method == "qlora":
        kept = f", {len(base.skipped)} modules in 16 bit" if base.skipped else ""
        form = f"{base.quant_type}{' with double quantisation' if base.double_quant else ''}{kept}"
        return f"this base is already quantised ({base.words}): planned as it is, {form}; a merge wants its original"
    if base.method == MXFP4 and engine == "studio":
        into = "brought into another 4-bit code" if method == "qlora" else "written out in 16 bit"
        return f"this base is already quantised ({base.words}): it is {into} while it is loaded; a merge wants 16 bit"
    if engine == "studio":
        return f"this base is {refusal(base, method)}. The plan is for that; train refuses this one"
    if base.method == BITSANDBYTES and method == "qlora":
        return f"this base is already quantised ({base.words}): planned as it is"
    return f"this base is already quantised ({base.words}): the plan is for its 16-bit original, without these kernels"


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """Return a config's own table, or its text model's (transformers looks in both)."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, Mapping) else {}):
        found = place.get(key)
        if isinstance(found, Mapping):
            return found
    return None


def _from_table(said: Mapping[str, Any]) -> QuantisedBase:
    four, eight = (said.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    name = said.get("quant_method")
    # bitsandbytes wrote no quant_method before transformers 4.36: the switches win (quantizers/auto.py from_dict).
    method = BITSANDBYTES if four or eight else name if isinstance(name, str) and name.strip() else UNNAMED
    bits = 4 if four else 8 if eight else _bits(said) or _BITS.get(method, 0)
    if method != BITSANDBYTES or bits != 4:
        return QuantisedBase(method, bits)
    names = said.get("llm_int8_skip_modules")
    skipped = _modules(names[:_MOST_NAMES]) if isinstance(names, list) else ()
    code: QuantType = "nf4" if said.get("bnb_4bit_quant_type") == "nf4" else "fp4"
    return QuantisedBase(method, 4, code, said.get("bnb_4bit_use_double_quant") is True, skipped)


def _modules(names: list[Any]) -> tuple[str, ...]:
    """Return the names that a recipe could hold, each once.

    A model that also reads pictures has its text model one level deeper, as `language_model`.
    """
    texts = (name.replace("language_model.", "") for name in names if isinstance(name, str))
    return tuple(dict.fromkeys(filter(is_module, texts)))


def _bits(said: Mapping[str, Any]) -> int:
    """Return the bits that a table names, or its first group does (compressed-tensors); 0 where none does."""
    groups = said.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) and groups else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    for table in (said, weights if isinstance(weights, Mapping) else {}):
        for key in _BITS_KEYS:
            value = table.get(key)
            if type(value) is int and 1 <= value <= 16:
                return value
    return 0
