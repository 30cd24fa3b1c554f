"""Reads the mixers of hybrids from a config: Gated DeltaNet, Mamba 2 and 1, short convolutions.

Sources: transformers 5.24 `models/*/configuration_*.py` (keys and defaults) and `modeling_*.py` (modules).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from studio.core.config_values import ConfigValues
from studio.core.errors import BadInput
from studio.core.layer_parts import Linear, Mixer


def separate_delta(values: ConfigValues, hidden: int) -> Mixer:
    """Qwen3_5GatedDeltaNet."""
    return _gated_delta(values, hidden, joined=False)


def joined_delta(values: ConfigValues, hidden: int) -> Mixer:
    """Qwen3NextGatedDeltaNet."""
    return _gated_delta(values, hidden, joined=True)


def _gated_delta(values: ConfigValues, hidden: int, *, joined: bool) -> Mixer:
    key_heads = values.whole("linear_num_key_heads", default=16, high=1 << 16)
    heads = values.whole("linear_num_value_heads", default=32, high=1 << 16)
    state = values.whole("linear_key_head_dim", default=128, high=1 << 16)
    head_dim = values.whole("linear_value_head_dim", default=128, high=1 << 16)
    keys, width = key_heads * state, heads * head_dim
    sizes = {"in_proj_qkv": 2 * keys + width, "in_proj_z": width, "in_proj_b": heads, "in_proj_a": heads}
    if joined:
        sizes = {"in_proj_qkvz": 2 * keys + 2 * width, "in_proj_ba": 2 * heads}
    channels, kernel = 2 * keys + width, values.whole("linear_conv_kernel_dim", default=4)
    return Mixer(
        kind="delta",
        place="linear_attn",
        inputs=tuple(Linear(name, hidden, outputs) for name, outputs in sizes.items()),
        out=Linear("out_proj", width, hidden),
        parameters=channels * kernel + 2 * heads + head_dim,
        channels=channels,
        kernel=kernel,
        heads=heads,
        groups=key_heads,
        head_dim=head_dim,
        state=state,
        chunk=64,
        gate_norm="after",
    )


def short_convolution(values: ConfigValues, hidden: int) -> Mixer:
    """Lfm2ShortConv."""
    bias, kernel = values.flag("conv_bias", False), values.whole("conv_L_cache", default=3)
    return Mixer(
        kind="conv",
        place="conv",
        inputs=(Linear("in_proj", hidden, 3 * hidden, bias),),
        out=Linear("out_proj", hidden, hidden, bias),
        parameters=hidden * (kernel + bias),
        channels=hidden,
        kernel=kernel,
    )


@dataclass(frozen=True, slots=True)
class Mamba2Keys:
    """Where a family's config says how its Mamba 2 is built, with the defaults."""

    place: str = "mamba"
    heads: str = "mamba_n_heads"
    head_dim: str = "mamba_d_head"
    groups: str = "mamba_n_groups"
    state: str = "mamba_d_state"
    kernel: str = "mamba_d_conv"
    expand: str = "mamba_expand"
    chunk: str = "mamba_chunk_size"
    conv_bias: str = "mamba_conv_bias"
    bias: str = "mamba_proj_bias"
    out_bias: str = "mamba_proj_bias"
    inner: str = ""
    default_groups: int = 1
    default_state: int = 256
    default_chunk: int = 256


GRANITE_KEYS = Mamba2Keys()
FALCON_KEYS = Mamba2Keys(inner="mamba_d_ssm", out_bias="projectors_bias")
MAMBA2_KEYS = Mamba2Keys(
    place="mixer",
    heads="num_heads",
    head_dim="head_dim",
    groups="n_groups",
    state="state_size",
    kernel="conv_kernel",
    expand="expand",
    chunk="chunk_size",
    conv_bias="use_conv_bias",
    bias="use_bias",
    out_bias="use_bias",
    default_groups=8,
    default_state=128,
)
NEMOTRON_KEYS = replace(
    MAMBA2_KEYS,
    heads="mamba_num_heads",
    head_dim="mamba_head_dim",
    state="ssm_state_size",
    default_chunk=128,
)


def mamba2(keys: Mamba2Keys) -> Callable[[ConfigValues, int], Mixer]:
    """GraniteMoeHybridMambaLayer, BambaMixer, FalconH1Mixer, NemotronHMamba2Mixer, Mamba2Mixer."""

    def made(values: ConfigValues, hidden: int) -> Mixer:
        heads = values.whole(keys.heads, default=128, high=1 << 16)
        inner = values.whole(keys.expand, default=2) * hidden
        if keys.inner in values:
            inner = values.whole(keys.inner)
        if values.word(keys.head_dim) == "auto" or keys.head_dim not in values:
            head_dim = 64 if keys is NEMOTRON_KEYS or keys is MAMBA2_KEYS else max(1, inner // heads)
        else:
            head_dim = values.whole(keys.head_dim, high=1 << 16)
        inner = heads * head_dim if keys is NEMOTRON_KEYS else inner
        if heads * head_dim != inner:
            raise BadInput(f"the model's config has {heads} Mamba heads of {head_dim}, which do not make {inner}")
        groups = values.whole(keys.groups, "mamba_n_groups", default=keys.default_groups, high=heads)
        state = values.whole(keys.state, default=keys.default_state)
        channels = inner + 2 * groups * state
        kernel = values.whole(keys.kernel, "mamba_d_conv", default=4)
        norm = keys is not FALCON_KEYS or values.flag("mamba_rms_norm", False)
        before = keys is not FALCON_KEYS or not values.flag("mamba_norm_before_gate", True)
        projected = inner + channels + heads
        return Mixer(
            kind="mamba2",
            place=keys.place,
            inputs=(Linear("in_proj", hidden, projected, values.flag(keys.bias, False)),),
            out=Linear("out_proj", inner, hidden, values.flag(keys.out_bias, False)),
            parameters=channels * (kernel + values.flag(keys.conv_bias, True)) + 3 * heads + inner * norm,
            channels=channels,
            kernel=kernel,
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            state=state,
            chunk=values.whole(keys.chunk, "mamba_chunk_size", default=keys.default_chunk),
            gate_norm=("before" if before else "after") if norm else "",
            scales=keys is FALCON_KEYS,
            buffers=projected if keys is FALCON_KEYS else 0,
        )

    return made


def mamba(values: ConfigValues, hidden: int) -> Mixer:
    """MambaMixer."""
    return _mamba(values, hidden, jamba=False)


def jamba(values: ConfigValues, hidden: int) -> Mixer:
    """JambaMambaMixer."""
    return _mamba(values, hidden, jamba=True)


def _mamba(values: ConfigValues, hidden: int, *, jamba: bool) -> Mixer:
    expand, state = (
        values.whole("expand", "mamba_expand", default=2),
        values.whole("state_size", "mamba_d_state", default=16),
    )
    key = "mamba_dt_rank" if jamba else "time_step_rank"
    inner = expand * hidden if jamba else values.whole("intermediate_size", default=expand * hidden)
    rank = -(-hidden // 16) if values.word(key) == "auto" else values.whole(key, default=-(-hidden // 16))
    bias = values.flag("mamba_proj_bias" if jamba else "use_bias", False)
    kernel = values.whole("conv_kernel", "mamba_d_conv", default=4)
    conv = inner * (kernel + values.flag("mamba_conv_bias" if jamba else "use_conv_bias", True))
    return Mixer(
        kind="mamba",
        place="mamba" if jamba else "mixer",
        inputs=(
            Linear("in_proj", hidden, 2 * inner, bias),
            Linear("x_proj", inner, rank + 2 * state),
            Linear("dt_proj", rank, inner, True),
        ),
        out=Linear("out_proj", inner, hidden, bias),
        parameters=conv + inner * (state + 1) + (rank + 2 * state) * jamba,
        channels=inner,
        kernel=kernel,
        heads=inner,
        groups=1,
        head_dim=1,
        state=state,
        gate_norm="",
    )
