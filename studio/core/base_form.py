"""How a recipe holds its frozen base: the precision of its weights, in the field's words."""

from studio.core.recipe import Recipe

SIXTEEN = "16-bit"


def base_form(recipe: Recipe) -> str:
    """Return the format of the base's linear layers, as in `16-bit` or `nf4+dq`."""
    if recipe.method == "lora":
        return SIXTEEN if recipe.model.dtype == "auto" else recipe.model.dtype
    return f"{recipe.model.quant_type}{'+dq' if recipe.model.double_quant else ''}"


def kept_modules(recipe: Recipe) -> tuple[str, ...]:
    """Return the modules that stay in 16 bit although the method rounds; none without rounding."""
    return () if recipe.method == "lora" else recipe.model.skip_modules
