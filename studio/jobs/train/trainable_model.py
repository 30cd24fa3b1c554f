"""Loads the base, attaches the adapter and initialises it as the recipe says, at the first start and at every resume.

Two initialisations read the base's weights. W is a weight of the base, s the adapter's scaling and r its rank.

PiSSA (with LoRA) puts the r largest singular directions of W into s*B*A and subtracts them from the base. The base is
then another one than the adapter's users have, so the difference to the initial adapter is saved: an adapter of rank 2r
that any peft loads onto the ordinary base (Meng et al. 2024, appendix C).

LoftQ (with QLoRA) sets s*B*A to the best rank-r approximation of W minus its 4-bit form (Li et al. 2023). It does one
iteration only, so that the base stays the ordinary 4-bit one. peft's own LoftQ leaves s out and so overshoots.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from studio.core.direct_weights import left_out
from studio.core.errors import JobFailed
from studio.core.events import Warned
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.core.value_kinds import ALL_LINEAR
from studio.core.vram.frozen import Held
from studio.jobs.base.experts.forms import experts_in
from studio.jobs.base.experts.pairs import routers
from studio.jobs.base.load import base_folder, family_of, four_bit_of, load_base
from studio.jobs.base.model_class import class_of, is_plain
from studio.jobs.base.precision import Precision
from studio.jobs.base.progress import PhaseTeller
from studio.jobs.base.streaming.base import stream_from_here
from studio.jobs.base.streaming.layers import StreamedLayers
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.train.adapter import AdapterWeights, adapter_weights, attach_adapter, checkpointed
from studio.jobs.train.checkpoint import load_initial
from studio.jobs.train.offload import PinnedCopies, offload_checkpoints
from studio.jobs.train.row_isolation import attends
from studio.jobs.train.served import check_names
from studio.probe.adapter_folder import check_start
from studio.probe.models import BaseFound
from studio.runs.layout import ADAPTER_WEIGHTS
from studio.runs.worker import Worker

_ADAPTER = "default"
_EXACT_UP_TO = 512
"""Matrices whose shorter side is at most so long get a full singular value decomposition; larger ones a randomised."""
_POWER_STEPS = 8
"""Subspace iterations of the randomised decomposition: as many as make its error small enough
(tests/jobs/test_initialisation.py)."""

_MOST_IN_FOUR_BITS = 0.97
"""A share below this is worth a warning: transformers or bitsandbytes could not quantise some layers."""
_LOFTQ_NOTE = (
    "the adapter also carries a repair of the base's 4-bit rounding: use it on the 4-bit base; "
    "on the 16-bit base it would repair what is not broken"
)
_EAGER_NOTE = (
    "this model's attention scores cannot be made by torch's fused attention: it runs eagerly, with matrices of "
    "length x length per head. flash_attention_2, where it is installed, needs none"
)


def trainable_model(
    recipe: Recipe,
    base: BaseFound,
    device: torch.device,
    precision: Precision,
    *,
    worker: Worker,
    tell: PhaseTeller,
    checkpoint: Path | None,
    trained_on: Mapping[str, Any] | None = None,
) -> tuple[PeftModel, AdapterWeights, Held]:
    """Load the base, attach the adapter and give it its first values; a checkpoint's values are loaded elsewhere.

    Args:
        recipe: Says how to load and adapt the base.
        base: The base that the recipe names.
        device: Where the model goes.
        precision: The number format of weights and products.
        worker: Gets the warnings.
        tell: Told what is being done.
        checkpoint: The checkpoint that the run continues after; None at a first start.
        trained_on: The fingerprint of the base; None where it was not taken.

    Returns:
        The model, the adapter that PiSSA subtracted from its base (empty without PiSSA), and how much is in 4 bits.

    Raises:
        JobFailed: A name in the recipe is not in the model, or its initialisation needs weights that are not there.
        BadInput: The base cannot be loaded.
    """
    frozen = load_base(
        base,
        method=recipe.method,
        dtype=precision.dtype,
        quant=four_bit_of(recipe.model),
        attention=recipe.train.attention,
        device=device,
        trust_remote_code=recipe.model.trust_remote_code,
        streamed=streamed_of(recipe),
    )
    if frozen.config.get_text_config()._attn_implementation == "eager" != recipe.train.attention and attends(frozen):
        worker.emit(Warned, topic="attention", message=_EAGER_NOTE)
    if recipe.adapter.targets == ALL_LINEAR:
        names = (name.rpartition(".")[2] for name, module in frozen.named_modules() if isinstance(module, nn.Linear))
        if note := left_out(family_of(frozen), names):
            tell("attaching the adapter", detail=note)
    held = precision_held(frozen)
    if recipe.method == "qlora" and held.four_bit_share + held.eight_bit_share < _MOST_IN_FOUR_BITS:
        eight = f" and {held.eight_bit_share:.0%} in 8" if held.eight_bit_share else ""
        said = f"{held.four_bit_share:.0%} of the weights in this model's layers are in 4 bits{eight}"
        kept = f"{held.kept_16bit_bytes / 2**30:.2f} GiB are not, embedding and head among them"
        worker.emit(Warned, topic="precision", message=f"{said}; {kept}")
    keeps = recipe.train.keep_dequantised is True
    model = attach_adapter(frozen, recipe.adapter, recompute=recipe.train.recompute, keep_dequantised=keeps)
    check_names(model)
    if isinstance(recipe.train.recompute, int):
        again, layers = checkpointed(model)
        tell("attaching the adapter", detail=f"{again} of {layers} layers are computed again on the way back")
    if keeps and recipe.method == "qlora":
        tell("attaching the adapter", detail="what is dequantised to compute a layer again stays for its backward")
    if recipe.train.offload_checkpoints:
        _offload(model, device, worker)
    if recipe.adapter.start and checkpoint is None:
        if trained_on is not None:
            # Again: before the start the base may not have been known as a whole.
            check_start(recipe, Path(), lambda _: trained_on)
        tell("starting the adapter", detail=recipe.adapter.start)
        start_from(model, Path(recipe.adapter.start))
    if recipe.adapter.init == "pissa":
        tell("starting the adapter", detail="pissa")
        return model, _pissa(model, checkpoint), held
    if recipe.adapter.init == "loftq":
        worker.emit(Warned, topic="adapter", message=_LOFTQ_NOTE)
        if checkpoint is None:
            tell("starting the adapter", detail="loftq")
            _loftq(model, base)
    return model, {}, held


def start_from(model: PeftModel, folder: Path) -> None:
    """Give the adapter the values of one in a PEFT folder.

    Raises:
        JobFailed: `other_adapter` when that one has other tensors than this.
    """
    weights = load_file(folder / ADAPTER_WEIGHTS)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in adapter_weights(model).items()}
    if other := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        first = other[0]
        raise JobFailed(
            "other_adapter",
            f"adapter.start has other tensors than this recipe makes: {len(other)} of {len(wanted)} differ, such as "
            f"{plain(first, one_line=True)}: found {found.get(first, 'none')}, wanted {wanted.get(first, 'none')}",
            "give the recipe the targets, layers and ranks of that adapter, or leave adapter.start empty",
        )
    set_peft_model_state_dict(model, weights)


def streamed_of(recipe: Recipe) -> int:
    """Return how many layers of a recipe's base are streamed, at most; a run's own recipe says it as a number."""
    return recipe.model.stream if isinstance(recipe.model.stream, int) else 0


def stream_base(
    recipe: Recipe, model: PeftModel, device: torch.device, *, worker: Worker, tell: PhaseTeller
) -> StreamedLayers | None:
    """Let the layers of the base be streamed, and tell how many and where they wait; return None where none is.

    Args:
        recipe: Says how many.
        model: As `trainable_model` returned it. From now on its streamed weights can only be computed with.
        device: Where it is computed.
        worker: Gets the warnings.
        tell: Told what is being done.
    """
    if not streamed_of(recipe):
        return None
    tell("packing the streamed layers")
    streamed, note = stream_from_here(model, streamed_of(recipe), device)
    said = f"{streamed.count} layers of {streamed.host_bytes / 2**30:.2f} GiB wait in main memory"
    tell("packing the streamed layers", 1.0, detail=said)
    if note:
        worker.emit(Warned, topic="streaming", message=note)
    return streamed


def precision_held(model: Any) -> Held:
    """Return how much of a base is in 4 bits, and the bytes of the weights that are not, counted as the plan does.

    Args:
        model: The loaded base, without an adapter.
    """
    picked, head, aside = class_of(model), model.get_output_embeddings(), set(routers(model))
    weights: list[nn.Parameter] = []
    for name, module in model.named_modules():
        if is_plain(module) and module is not head and name not in aside and picked.speaks(name):
            weights.append(module.weight)
    for name, module, form in experts_in(model):
        if picked.speaks(name):
            weights += [getattr(module, stack) for stack in form.stacks]
    four = sum(weight.quant_state.shape.numel() for weight in weights if hasattr(weight, "quant_state"))
    eight = sum(weight.numel() for weight in weights if hasattr(weight, "SCB"))
    others = sum(weight.numel() for weight in weights if not (hasattr(weight, "quant_state") or hasattr(weight, "SCB")))
    every = max(1, four + eight + others)
    plain = (p for p in model.parameters() if not (hasattr(p, "quant_state") or hasattr(p, "SCB")))
    return Held(sum(parameter.nbytes for parameter in plain), four / every, eight / every)


def _offload(model: PeftModel, device: torch.device, worker: Worker) -> None:
    if device.type != "cuda":
        why = f"on a {device.type} they are in main memory anyway"
    elif offload_checkpoints(model, PinnedCopies(device)) == 0:
        why = "this model has a way of its own to checkpoint its layers"
    else:
        return
    worker.emit(Warned, topic="offload", message=f"train.offload_checkpoints moves no checkpoint: {why}")


def _pissa(model: PeftModel, checkpoint: Path | None) -> AdapterWeights:
    if checkpoint is None:
        return init_pissa(model)
    initial = load_initial(checkpoint)
    if not initial:
        raise JobFailed(
            "checkpoint_mismatch",
            f"checkpoint {checkpoint.name} was not made with adapter.init pissa, which the recipe now asks for",
            "put the recipe back as it was, or start a new run",
        )
    take_out(model, initial)
    return initial


def _loftq(model: PeftModel, base: BaseFound) -> None:
    if base.quantization:
        raise JobFailed(
            "weights_not_found",
            "adapter.init loftq needs the base's 16-bit weights, and this base has only 4-bit ones",
            "use the original 16-bit model as model.base, or adapter.init default",
        )
    init_loftq(model, base_folder(base))


def init_pissa(model: PeftModel) -> AdapterWeights:
    """Move the main directions of every adapted linear weight from the base into the adapter.

    Returns:
        The adapter's first values, fp32 on the host, which `pissa.difference` and `take_out` need later.
    """
    for _, layer in _linear_layers(model):
        weight = _as_linear(layer, _weight(layer).float())
        _set_pair(layer, weight)
    initial = {name: tensor.detach().to("cpu", copy=True) for name, tensor in adapter_weights(model).items()}
    take_out(model, initial)
    return initial


def take_out(model: PeftModel, initial: AdapterWeights) -> None:
    """Subtract the initial adapter from an ordinary base.

    The first start and every resume call this with the same tensors, so that the base is the same to the bit.
    """
    for name, layer in _linear_layers(model):
        weight = _weight(layer)
        first, second = (initial[f"{name}.lora_{part}.weight"].to(weight.device) for part in "AB")
        moved = _as_linear(layer, (second @ first) * layer.scaling[_ADAPTER])
        weight.data.copy_((weight.float() - moved).to(weight.dtype))


def init_loftq(model: PeftModel, folder: Path) -> int:
    """Set the adapter of every 4-bit layer to the best approximation of what quantisation took from that layer.

    Args:
        model: Adapters on a freshly quantised base.
        folder: The base's 16-bit safetensors.

    Returns:
        How many layers were initialised so. Layers that are not in 4 bits have lost nothing and are left alone.

    Raises:
        JobFailed: The folder does not hold the layer's 16-bit weight.
    """
    causal: Any = model.get_base_model()
    # peft's wrappers carry their own names; these are the ones in the base, as the files have them.
    names = {id(module): name for name, module in causal.named_modules()}
    files, prefix = TensorFiles(folder), str(getattr(causal, "base_model_prefix", ""))
    # The files of a multimodal checkpoint name the decoder's layers in their own way.
    renamed = FolderWeights.of(folder) if class_of(causal).decoder else None
    count = 0
    for _, layer in _linear_layers(model):
        weight = _weight(layer)
        if not isinstance(weight, Params4bit):
            continue
        held = dequantize_4bit(weight.data, weight.quant_state).float()
        name = f"{names[id(layer)]}.weight"
        exact = renamed.read(name) if renamed else stored_weight(files, name, tuple(held.shape), prefix=prefix)
        _set_pair(layer, exact.to(held.device, torch.float32) - held)
        count += 1
    return count


def stored_weight(files: TensorFiles, name: str, shape: tuple[int, ...], *, prefix: str) -> Tensor:
    """Return a weight of the base as it is stored.

    Args:
        files: Of the base.
        name: The weight's name in the loaded model.
        shape: The shape that it must have.
        prefix: transformers' `base_model_prefix`, such as `model`. Some files leave it out, some have it in addition.

    Raises:
        JobFailed: `weights_not_found` when no file holds a tensor of this name and shape.
    """
    for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if key in files.tensors and files.shape(key) == shape and files.dtype(key).is_floating_point:
            return files.read(key)
    raise JobFailed(
        "weights_not_found",
        f"the base model's files hold no 16-bit weight {plain(name, one_line=True)} of shape {shape}",
        "use adapter.init default; loftq needs a base whose safetensors name its layers as transformers does",
    )


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A `[rank, in]` and B `[out, rank]` whose product B @ A is the best approximation of a matrix `[out, in]`.

    A rank above the matrix's own is filled up with zeros.
    """
    if min(matrix.shape) <= _EXACT_UP_TO:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.T
    else:
        # Twice as many directions as wanted are computed and the rest dropped: the wanted ones then converge.
        left, values, right = torch.svd_lowrank(matrix, q=min(2 * rank + 8, *matrix.shape), niter=_POWER_STEPS)
    # Each factor gets the square root of the singular values, so that A and B are of the same size.
    root = values[:rank].sqrt()
    first, second = (right[:, :rank] * root).T, left[:, :rank] * root
    missing = rank - first.shape[0]
    return nn.functional.pad(first, (0, 0, 0, missing)), nn.functional.pad(second, (0, missing))


def _set_pair(layer: LoraLayer, matrix: Tensor) -> None:
    """Make the adapter's contribution `scaling * B @ A` the best approximation of a matrix `[out, in]`."""
    first, second = low_rank(matrix / layer.scaling[_ADAPTER], layer.r[_ADAPTER])
    for module, value in ((layer.lora_A[_ADAPTER], first), (layer.lora_B[_ADAPTER], second)):
        module.weight.data.copy_(value)


def _linear_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield adapted linear layers with their names in a PEFT file, without those that share the embeddings' weight.

    Changing a shared weight would change the embeddings, too.
    """
    embedding = cast(Any, model.get_base_model()).get_input_embeddings()
    shared = getattr(getattr(embedding, "base_layer", embedding), "weight", None)
    for name, module in model.named_modules():
        is_linear = isinstance(module, LoraLayer) and _ADAPTER in module.lora_A
        if is_linear and _weight(module) is not shared and _weight(module).dim() == 2:
            yield name, module


def _weight(layer: LoraLayer) -> Any:
    return layer.get_base_layer().weight


def _as_linear(layer: LoraLayer, weight: Tensor) -> Tensor:
    """Turn a weight between `[in, out]` (GPT-2's Conv1D) and `[out, in]`; it is its own inverse."""
    return weight.T if layer.fan_in_fan_out else weight
