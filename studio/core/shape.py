"""What a model is made of, as numbers: layers, linear maps, norms, vocabulary.

A shape comes from a model's config, never from its name. This module knows no files and no formats:
`studio.core.families` says how families differ, `studio.core.shape_from_config` makes shapes from configs, and
`studio.probe.shape` finds the configs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

from studio.core.layer_parts import Heads, Latent, Linear, Mixer
from studio.core.quantised_base import QuantisedBase

Wiring = Literal["pre", "post", "sandwich", "parallel", "single"]
Norm = Literal["rms", "rms_wide", "layer", "layer_plain", "layer_wide", "centred"]


EXPERTS_UP, EXPERTS_DOWN = "experts.gate_up_proj", "experts.down_proj"
"""The two stacks of routed experts, as most families call them."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture-of-experts part of a layer.

    Attributes:
        count: Experts in the layer.
        per_token: Experts that each token goes through.
        inner: Width inside one expert.
        shared_inner: Width of the expert that every token goes through, 0 without one.
        biases: Bias terms of one expert.
        shared_gate: Whether a learnt gate weighs the shared expert.
        chooser: The router or the shared gate, where peft's all-linear adapts it: it must be a linear module, or peft
            must treat it as one.
        adapted_by_all: Whether peft's all-linear adapts the fused experts themselves (peft 0.21: it does for some).
        gated: Whether an expert has a gate beside up and down.
        width: Width that an expert reads and writes; 0 for the layer's own.
        around: The linear maps into that width and back, where it is another.
        given_all: Whether each expert is given all tokens, zeros for those that did not choose it (Llama 4).
    """

    count: int
    per_token: int
    inner: int
    shared_inner: int = 0
    biases: int = 0
    shared_gate: bool = False
    chooser: Linear | None = None
    adapted_by_all: bool = False
    gated: bool = True
    width: int = 0
    around: tuple[Linear, ...] = ()
    given_all: bool = False

    @property
    def products(self) -> int:
        """Experts whose products transformers makes for each token."""
        return self.count if self.given_all else self.per_token

    def weights(self, hidden: int) -> int:
        """Weights of all routed experts: gate, up and down each, or up and down alone."""
        return sum(stack.weights for stack in self.stacks(hidden))

    def stacks(self, hidden: int) -> tuple[Linear, Linear]:
        """The two tensors that hold all routed experts: gate and up joined, or up alone, and down; a copy an expert."""
        width = self.width or hidden
        wide = Linear(EXPERTS_UP, width, (1 + self.gated) * self.inner, copies=self.count)
        return wide, Linear(EXPERTS_DOWN, self.inner, width, copies=self.count)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    Attributes:
        wiring: Where the norms stand: before each block (`pre`), after it (`post`), on both sides (`sandwich`), one or
            two before attention and MLP side by side (`parallel`), or one before the layer's only block (`single`).
        norm: Which norm. `rms_wide` multiplies by its weight in fp32, before it casts back; `layer_plain` keeps its
            input's format under autocast (Nemotron); `layer_wide` casts to fp32 and back; `centred` is a layer norm
            written in Python, in fp32 (Cohere). Each keeps other tensors for the backward pass.
        norm_parameters: Parameters of all norms of the layer, and of other small tensors: sinks, a router's biases.
        heads: How its attention is divided.
        input_norms: Norms of the layer's input in a parallel layer: 1 shared or 2.
        query_key_norm: The norm of queries and keys: `head` for each head, `whole` over all heads, `plain` for each
            head without a weight and after it is turned (Llama 4), empty for none.
        qkv: The projections to queries, keys and values: three, or one fused. With latent attention those to the
            queries, one or two, then the narrow one of keys and values and the one from it.
        qkv_split: Whether a fused projection is split or chunked, one gradient for all parts; else it is sliced.
        out: The projection back; None in a layer without attention.
        mlp: gate, up, down; or a fused gate_up, down; or up, down without a gate. Empty where experts stand instead.
        gated: Whether the activation gates a second projection.
        activation: Which activation (transformers' name).
        latent: The narrow vectors of latent attention, where it has that.
        rotary: Fraction of each head that carries rotary positions.
        rotary_wide: Whether queries and keys are rotated in fp32.
        rotary_form: What is turned against each other: a head's two halves (`halves`; `parts` where each is computed by
            itself and both are joined, gpt-oss), neighbouring numbers (`pairs`), or these as complex numbers in fp32
            (`complex`).
        tempered: Whether queries are multiplied by a number for each position (Llama 4's layers without positions).
        rotary_joined: Whether the rotated and the other part of queries and keys are joined again. They then lie head
            by head in memory, and so does what fused attention makes of them.
        scaled_residual: Whether block outputs are multiplied by a number before they are added (Granite).
        residual_dropout: Whether block outputs are dropped in training.
        attention_dropout: Whether attention weights are dropped in training.
        expert_maps: The routed experts' gate, up and down where they are modules of their own, one set per expert.
        output_gate: Whether the first projection gives, beside each query, a gate of the attention's output.
        keys_from: Where keys and values come from: each from a projection of its own (empty), values from that of the
            keys (`values`), or both from a layer before it (`before`). There `qkv` lacks those projections.
        value_norm: Whether values are normed too, and queries made ready before keys (Gemma 3n).
        per_layer: The linear maps through which the layer's own part of the input goes: gate and projection (Gemma 3n).
        sparse_gate: Whether all but the largest numbers of the MLP's gate are set to zero (Gemma 3n).
        streams: Copies of the residual stream that the layer predicts and corrects (AltUp of Gemma 3n); 1 without.
        beside: Linear maps whose part in the layer is not known.
        mixer: What mixes tokens instead of attention; beside it where the layer has both.
        wide_residual: Whether it keeps the residual stream in fp32 (Mamba).
        window: Keys that a token attends to at most; 0 for all.
        experts: The mixture of experts, where the layer has one.
    """

    wiring: Wiring
    norm: Norm
    norm_parameters: int
    heads: Heads
    qkv: tuple[Linear, ...]
    out: Linear | None
    mlp: tuple[Linear, ...]
    gated: bool
    activation: str
    input_norms: int = 1
    qkv_split: bool = False
    query_key_norm: Literal["", "head", "whole", "plain"] = ""
    tempered: bool = False
    latent: Latent | None = None
    rotary: float = 1.0
    rotary_form: Literal["halves", "parts", "pairs", "complex"] = "halves"
    rotary_wide: bool = False
    rotary_joined: bool = False
    scaled_residual: bool = False
    residual_dropout: bool = False
    attention_dropout: bool = False
    window: int = 0
    experts: Experts | None = None
    expert_maps: tuple[Linear, ...] = ()
    output_gate: bool = False
    mixer: Mixer | None = None
    wide_residual: bool = False
    keys_from: Literal["", "values", "before"] = ""
    value_norm: bool = False
    per_layer: tuple[Linear, ...] = ()
    sparse_gate: bool = False
    streams: int = 1
    beside: tuple[Linear, ...] = ()

    @property
    def attention(self) -> tuple[Linear, ...]:
        """The linear maps of its attention, none in a layer without it."""
        return (*self.qkv, self.out) if self.out else ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linear maps that are modules of their own (fused experts are not)."""
        mixer = self.mixer.linears if self.mixer else ()
        around = self.experts.around if self.experts else ()
        return (*self.attention, *mixer, *self.mlp, *around, *self.per_layer, *self.beside, *self.expert_maps)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one kind."""

    count: int
    layer: Layer


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model. Its counts and its hash are computed once, since every estimate asks for them.

    Attributes:
        family: transformers' `model_type`.
        hidden: Width of the residual stream.
        vocabulary: Rows of the embedding and of the head.
        groups: Its layers, kind by kind.
        order: Of each layer the number of its kind among the groups; empty where the kinds follow each other.
        tied: Whether the head is the embedding.
        head_bias: Whether the head has a bias.
        outer: Linear maps outside the layers that are not the head.
        other_parameters: Everything else outside layers, embedding and head: final norm, learnt positions.
        alters_embedding: Whether the embedding module's output is changed before it enters the first layer.
        embedding_norm: Whether the embedding is normed.
        embedding_dropout: Whether the first layer's input is dropped in training.
        scaled_logits: Whether it multiplies or divides its logits by a number.
        logit_softcap: Whether logits go through `cap * tanh(logits / cap)`.
        attention_softcap: Whether attention scores go through the same.
        fused_attention: Whether our loop runs it with fused attention; capped scores and ALiBi rule it out.
        sinks: Whether its heads have sinks: transformers alone then runs it eagerly.
        own_attention: Whether its layers call attention themselves and broadcast a key to the heads that share it.
        repeats_heads: Whether they repeat keys and values for every query head, even where the kernel need not have it.
        positions: Positions that its config allows; 0 where it does not say.
        buffers: Elements of tables that it holds beside its parameters, in the format in which it computes.
        mask_bytes: Bytes of a causal mask that it holds, a byte per pair of positions; 0 without one.
        doubts: Why the estimate for this model is less certain than usual; empty where it is not.
        readings: What else its config may mean, the least and the most, where it is not understood.
        notes: What the user should know of it that makes nothing less certain.
        tower_parameters: Parameters of its checkpoint that are no language model's: towers for images or sound. They
            are on disk, and not in the memory of a training on text.
        quantised: How its weights lie on disk, for a prequantised model.
        origin: Where the config comes from, in words, if it is not the model's own file; else empty.
    """

    family: str
    hidden: int
    vocabulary: int
    groups: tuple[LayerGroup, ...]
    tied: bool
    order: tuple[int, ...] = ()
    head_bias: bool = False
    outer: tuple[Linear, ...] = ()
    other_parameters: int = 0
    alters_embedding: bool = False
    embedding_norm: bool = False
    embedding_dropout: bool = False
    scaled_logits: bool = False
    logit_softcap: bool = False
    attention_softcap: bool = False
    fused_attention: bool = True
    sinks: bool = False
    own_attention: bool = False
    repeats_heads: bool = False
    positions: int = 0
    buffers: int = 0
    mask_bytes: int = 0
    doubts: tuple[str, ...] = ()
    readings: tuple["ModelShape", ...] = ()
    notes: tuple[str, ...] = ()
    tower_parameters: int = 0
    quantised: QuantisedBase | None = None
    origin: str = ""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.family, self.hidden, self.vocabulary, self.heads, self.groups, self.other_parameters))

    @cached_property
    def layers(self) -> int:
        """Number of decoder layers."""
        return sum(group.count for group in self.groups)

    @property
    def stream(self) -> int:
        """Width of what goes from layer to layer: of all residual streams."""
        return self.hidden * self.groups[0].layer.streams

    @property
    def per_layer_width(self) -> int:
        """Width of what the layers have as inputs of their own, all layers together; 0 without."""
        return sum(group.count * group.layer.per_layer[0].outputs for group in self.groups if group.layer.per_layer)

    @property
    def stored_heads_width(self) -> int:
        """Width of the keys and values that one layer of each kind of attention hands to later ones; 0 without."""
        handed = {g.layer.heads for g in self.groups if g.layer.value_norm and g.layer.keys_from != "before"}
        return sum(2 * heads.keys * heads.width for heads in handed)

    @property
    def each_heads(self) -> tuple[Heads, ...]:
        """How attention is divided in each kind of layer."""
        return tuple(group.layer.heads for group in self.groups)

    @cached_property
    def heads(self) -> int:
        """Most query heads of a layer."""
        return max(heads.queries for heads in self.each_heads)

    @cached_property
    def kv_heads(self) -> int:
        """Most key and value heads of a layer."""
        return max(heads.keys for heads in self.each_heads)

    @cached_property
    def head_dim(self) -> int:
        """Width of the widest head of queries and keys."""
        return max(heads.width for heads in self.each_heads)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """Of each layer, from the first to the last, the number of its kind among the groups."""
        return self.order or tuple(kind for kind, group in enumerate(self.groups) for _ in range(group.count))

    @property
    def embedding_parameters(self) -> int:
        """Weights of the input embedding."""
        return self.vocabulary * self.hidden

    @property
    def head_parameters(self) -> int:
        """Weights of the head that are not the embedding's."""
        bias = self.vocabulary if self.head_bias else 0
        return bias if self.tied else self.vocabulary * self.hidden + bias

    @cached_property
    def parameters(self) -> int:
        """All parameters."""
        layers = sum(group.count * layer_parameters(group.layer, self.hidden) for group in self.groups)
        outer = sum(linear.weights + linear.biases for linear in self.outer)
        return layers + outer + self.embedding_parameters + self.head_parameters + self.other_parameters

    @cached_property
    def mixes_by_state(self) -> bool:
        """Whether any layer mixes tokens by a state or a short convolution."""
        return any(group.layer.mixer for group in self.groups)

    @cached_property
    def shortest_window(self) -> int:
        """The smallest sliding window of any layer, in keys; 0 where no layer has one."""
        return min((group.layer.window for group in self.groups if group.layer.window), default=0)

    @cached_property
    def expert_parameters(self) -> int:
        """Weights of routed experts that are held fused, not as linear modules of their own."""
        return sum(
            group.count
            * (group.layer.experts.weights(self.hidden) + group.layer.experts.biases * group.layer.experts.count)
            for group in self.groups
            if group.layer.experts and not group.layer.expert_maps
        )

    def all_linears(self) -> Iterator[tuple[int, Linear]]:
        """Yield every linear map but the head, with the number of layers that have it; 1 outside of them."""
        for group in self.groups:
            for linear in group.layer.linears:
                yield group.count, linear
        for linear in self.outer:
            yield 1, linear


@lru_cache(maxsize=64)
def with_separate_experts(shape: ModelShape) -> ModelShape:
    """Return the shape as transformers before 5 builds it, where every expert's maps are linear modules."""

    def separate(layer: Layer) -> Layer:
        experts = layer.experts
        if experts is None:
            return layer
        # Mixtral has names of its own; the other families use those of a dense layer.
        names = ("w1", "w3", "w2") if shape.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        sizes = (shape.hidden, experts.inner), (shape.hidden, experts.inner), (experts.inner, shape.hidden)
        maps = tuple(Linear(name, *size, copies=experts.count) for name, size in zip(names, sizes, strict=True))
        return replace(layer, expert_maps=maps)

    groups = tuple(LayerGroup(group.count, separate(group.layer)) for group in shape.groups)
    return replace(shape, groups=groups)


def layer_parameters(layer: Layer, hidden: int) -> int:
    """Return the parameters of one layer, router included."""
    linears = sum(linear.weights + linear.biases for linear in layer.linears)
    experts = layer.experts
    routed = 0
    if experts:
        fused = 0 if layer.expert_maps else experts.weights(hidden)
        routed = fused + experts.biases * experts.count + hidden * (experts.count + experts.shared_gate)
    mixed = layer.mixer.parameters if layer.mixer else 0
    return linears + routed + mixed + layer.norm_parameters
