"""Layers of Llama 4: with experts or dense, and with positions or tempered queries in their place.

Sources: transformers 5.24 configuration_llama4.py (`Llama4TextConfig.__post_init__`) and modeling_llama4.py.
"""

from collections.abc import Callable
from dataclasses import replace

from studio.core.config_values import ConfigValues
from studio.core.experts_from_config import sparse_layers
from studio.core.families import Family
from studio.core.shape import Layer, LayerGroup

LLAMA_4 = "llama4_text"


def llama4_groups(
    family: Family, values: ConfigValues, layers: int, layer: Callable[[bool], Layer]
) -> tuple[tuple[LayerGroup, ...], tuple[int, ...]]:
    """Return the layers kind by kind, and of each layer the number of its kind.

    Args:
        family: How Llama 4 is built.
        values: The config.
        layers: Number of layers.
        layer: Returns a layer, with experts or dense, with everything that all layers have.
    """
    sparse = sparse_layers(LLAMA_4, family, values, layers)
    every = values.whole("no_rope_layer_interval", default=4)
    said = values.wholes("no_rope_layers")  # of each layer 1 where it has positions
    kinds = values.words("layer_types")
    chunk = values.whole("attention_chunk_size", default=8192, low=0)
    numbers: dict[Layer, int] = {}
    order = []
    for index in range(layers):
        turned = bool(said[index]) if index < len(said) else (index + 1) % every != 0
        chunked = kinds[index] == "chunked_attention" if index < len(kinds) else turned
        one = replace(
            layer(index in sparse),
            query_key_norm="plain" if turned and values.flag("use_qk_norm", True) else "",
            rotary=1.0 if turned else 0.0,
            tempered=not turned and values.flag("attn_temperature_tuning", True),
            window=chunk if chunked else 0,
        )
        order.append(numbers.setdefault(one, len(numbers)))
    groups = tuple(LayerGroup(order.count(number), one) for one, number in numbers.items())
    return groups, tuple(order) if len(groups) > 1 else ()
