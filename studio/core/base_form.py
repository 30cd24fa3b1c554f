"""The form of a base's frozen weights: in which one a method holds them, and from which ones it can train.

Training starts from 16-bit weights, from MXFP4, which is brought into another form while it is loaded, or from 4-bit
weights of bitsandbytes under QLoRA.
"""

from typing import Literal

from studio.core.quantised_base import BITSANDBYTES, GGUF, MXFP4, QuantisedBase
from studio.core.recipe import FIELDS, Method, Recipe

SIXTEEN = "16-bit"
_OWN_LINEARS = frozenset({"falcon"})
"""Families whose linear layers are a class of their own: transformers hands bitsandbytes nothing but `nn.Linear` itself
(integrations/bitsandbytes.py replace_with_bnb_linear)."""
_ORIGINAL = "the original 16-bit model that it was made from, or a copy written out in 16 bit"


def base_form(recipe: Recipe) -> str:
    """Return the format of the base's linear layers, as in `16-bit` or `nf4+dq`."""
    if recipe.method == "lora":
        return SIXTEEN if recipe.model.dtype == "auto" else recipe.model.dtype
    return f"{recipe.model.quant_type}{'+dq' if recipe.model.double_quant else ''}"


def precision_words(recipe: Recipe) -> str:
    """Return what of a QLoRA base is held in other bits than the rest, as a recipe says it; empty where nothing is."""
    return FIELDS["model.precision"].kind.written(recipe.model.precision) if recipe.method == "qlora" else ""


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
