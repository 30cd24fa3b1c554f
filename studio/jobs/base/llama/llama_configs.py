"""Corrects what llama.cpp's converter misreads of some families, in its process before it begins.

This file is never imported: `llama_convert.py` runs it once the converter is on the import path. The converter reads
configs through transformers, and version 5 of that has other names for some fields than the converter knows. Writing
the old names into `config.json` would not help. Models with a setting that llama.cpp does not have are refused here,
before anything is merged.

Of Qwen3-Next and Qwen3.5 it expects layers that predict further tokens. A checkpoint that transformers has written has
none, whatever its config says.
"""

import sys
from collections.abc import Callable
from typing import Any


def mend(*, lora: bool) -> None:
    """Change the converter's classes.

    Args:
        lora: Whether an adapter is converted, and not a model.
    """
    from conversion.base import ModelBase  # type: ignore[import-not-found]  # noqa: PLC0415  llama.cpp's own
    from conversion.falcon import FalconModel  # type: ignore[import-not-found]  # noqa: PLC0415
    from conversion.gpt2 import GPT2Model  # type: ignore[import-not-found]  # noqa: PLC0415
    from conversion.gptneox import GPTNeoXModel  # type: ignore[import-not-found]  # noqa: PLC0415
    from conversion.llama import LlamaModel  # type: ignore[import-not-found]  # noqa: PLC0415
    from conversion.qwen import Qwen2MoeModel, _QwenMtpMixin  # type: ignore[import-not-found]  # noqa: PLC0415

    ModelBase.load_hparams = staticmethod(_with_older_names(ModelBase.load_hparams))
    for kind in (FalconModel, GPTNeoXModel):
        kind.set_gguf_parameters = _with_rope_base(kind.set_gguf_parameters)
    _QwenMtpMixin.index_tensors = _with_layers_that_are_there(_QwenMtpMixin.index_tensors)
    if lora:
        _unwrap_mistral3()
        # GPT2Model's own method transposes weights from Conv1D's orientation to Linear's, which A and B have already.
        GPT2Model.modify_tensors = ModelBase.modify_tensors
        for kind in (LlamaModel, Qwen2MoeModel):
            kind.modify_tensors = _with_stacks(kind.modify_tensors, ModelBase.modify_tensors)


def _with_older_names(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def load_renamed(*where: Any, **how: Any) -> dict[str, Any]:
        table = load(*where, **how)
        if lacking := _lacking(table):
            sys.exit(f"this model's config has {lacking}, which llama.cpp cannot do")
        match table.get("model_type"):
            case "gpt2":
                table["n_ctx"] = table["n_positions"]
            case "gpt_neox":
                table["rotary_pct"] = table["rope_parameters"].get("partial_rotary_factor", 1.0)
            case "falcon" if table["multi_query"] and not table["new_decoder_architecture"]:
                table["num_kv_heads"] = 1  # as FalconAttention has it, whatever the config says
        return table

    return load_renamed


def _with_layers_that_are_there(index: Callable[..., Any]) -> Callable[..., Any]:
    """Let a model without tensors for further tokens be one without such layers; the converter would count one."""

    def index_and_look(model: Any, *where: Any, **how: Any) -> Any:
        found = index(model, *where, **how)
        model.no_mtp = model.no_mtp or not type(model).opt_num_mtp_layers
        return found

    return index_and_look


def _unwrap_mistral3() -> None:
    """Let an adapter of Mistral 3 be converted by the class of its text model.

    The converter's class for Mistral 3 hands everything to another object, which knows nothing of adapters: the file
    would hold no tensor.
    """
    from conversion.mistral3 import Mistral3Model  # type: ignore[import-not-found]  # noqa: PLC0415

    for classes in Mistral3Model._model_classes.values():
        for name, kind in classes.items():
            if kind is Mistral3Model:
                classes[name] = Mistral3Model.Ministral3Model


def _lacking(table: dict[str, Any]) -> str:
    """Return the first field of a config that llama.cpp does not support, with its value; empty where there is none."""
    text = table | (table.get("text_config") or {})
    match table.get("model_type"):
        case "gpt2":
            fits = {
                "n_inner": table["n_inner"] in (None, 4 * table["n_embd"]),
                "activation_function": table["activation_function"].startswith("gelu"),
                "scale_attn_weights": table["scale_attn_weights"],
                "scale_attn_by_inverse_layer_idx": not table["scale_attn_by_inverse_layer_idx"],
            }
        case "gpt_neox":
            fits = {"hidden_act": table["hidden_act"].startswith("gelu"), "rope_parameters": _plain_rope(table)}
        case "falcon":
            fits = {
                "alibi": not table["alibi"],
                "parallel_attn": table["parallel_attn"] or table["new_decoder_architecture"],
                "ffn_hidden_size": table["ffn_hidden_size"] == 4 * table["hidden_size"],
                "activation": table["activation"].startswith("gelu"),
                "rope_parameters": _plain_rope(table),
            }
        case "gemma3" | "gemma3_text":
            # Written into llama.cpp: five layers with a window, then one that sees all (llama-model.cpp, GEMMA3).
            kinds = text["layer_types"]
            pattern = ["full_attention" if place % 6 == 5 else "sliding_attention" for place in range(len(kinds))]
            fits = {"layer_types": kinds == pattern}
        case _:
            fits = {}
    return next((f"{name} = {text[name]!r}" for name, does in fits.items() if not does), "")


def _plain_rope(table: dict[str, Any]) -> bool:
    return bool(table["rope_parameters"].get("rope_type", "default") == "default")


def _with_stacks(modify: Callable[..., Any], name_alone: Callable[..., Any]) -> Callable[..., Any]:
    """Let 3-D stacks of all experts pass through as they are.

    The converter expects each expert's matrices one by one, and waits for all of them to stack them itself.
    """

    def modify_or_pass(model: Any, weight: Any, name: str, block: int | None) -> Any:
        return (name_alone if len(weight.shape) == 3 else modify)(model, weight, name, block)

    return modify_or_pass


def _with_rope_base(write: Callable[[Any], None]) -> Callable[[Any], None]:
    """Write the base of the rotary frequencies into the file; without it llama.cpp assumes 10000."""

    def write_base(model: Any) -> None:
        write(model)
        model.gguf_writer.add_rope_freq_base(model.rope_parameters["rope_theta"])

    return write_base
