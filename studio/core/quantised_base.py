"""What the config of a prequantised model says of its weights.

What that means for training is said by `studio.core.base_form`. This module knows no files: whether the tensors agree
with the config is checked where they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from studio.core.text import plain
from studio.core.value_kinds import is_module

BITSANDBYTES, GGUF, MXFP4, UNNAMED = "bitsandbytes", "gguf", "mxfp4", "unknown"
_BITS = {"mxfp4": 4, "nvfp4": 4, "fp8": 8, "fbgemm_fp8": 8, "mxfp8": 8, "eetq": 8}
"""What the name alone says (transformers 5.24 utils/quantization_config.py QuantizationMethod)."""
_BITS_KEYS = ("bits", "w_bit", "nbits", "num_bits", "wbits")
_MOST_NAMES = 1000


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
    quant_type: Literal["nf4", "fp4"] = "nf4"
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
    code: Literal["nf4", "fp4"] = "nf4" if said.get("bnb_4bit_quant_type") == "nf4" else "fp4"
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
