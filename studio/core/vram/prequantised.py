"""A set-up on weights that are quantised already: bitsandbytes keeps them as they lie, whatever a recipe asks for."""

from dataclasses import replace
from functools import lru_cache

from studio.core.quantised_base import BITSANDBYTES, QuantisedBase
from studio.core.vram.setup import Setup


@lru_cache(maxsize=256)
def as_it_lies(setup: Setup, base: QuantisedBase | None) -> Setup:
    """Return the set-up with the form that a quantised base already has; itself where the base has none of its own.

    transformers lets a model's own quantization_config win (quantizers/auto.py merge_quantization_configs). Our engine
    refuses 8-bit weights, and any others: for them the plan is for the 16-bit original.
    """
    if base is None or base.method != BITSANDBYTES or not setup.quantised:
        return setup
    if base.in_four_bits:
        skipped = base.skipped or setup.skip_modules
        return replace(setup, quant_type=base.quant_type, double_quant=base.double_quant, skip_modules=skipped)
    return replace(setup, quant_type="int8") if base.bits == 8 and setup.engine == "hf" else setup
