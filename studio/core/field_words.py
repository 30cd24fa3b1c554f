"""What is said about every field of a recipe: label, help, cost. Screens, help and README take it from here."""

from dataclasses import dataclass

from studio.core.knobs import KNOBS

SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("name", "model.base", "data.path", "method")),
    (
        "Adapter",
        (
            "adapter.rank",
            "adapter.alpha",
            "adapter.targets",
            "adapter.dropout",
            "adapter.rslora",
            "adapter.dora",
            "adapter.init",
            "adapter.lora_plus_ratio",
            "adapter.rank_pattern",
            "adapter.alpha_pattern",
            "adapter.layers",
            "adapter.modules_to_save",
        ),
    ),
    (
        "Training",
        (
            "train.micro_batch",
            "train.accumulation",
            "train.seq_len",
            "train.steps",
            "train.epochs",
            "train.learning_rate",
            "train.schedule",
            "train.warmup_fraction",
            "train.optimizer",
            "train.grad_checkpointing",
            "train.offload_checkpoints",
            "train.loss",
            "train.packing",
            "train.group_by_length",
            "train.attention",
            "train.compile",
            "train.weight_decay",
            "train.max_grad_norm",
            "train.seed",
            "train.checkpoint_every",
            "train.keep_checkpoints",
        ),
    ),
    ("Held-out rows", ("eval.rows", "eval.every", "eval.samples", "eval.sample_tokens", "data.eval_path")),
    (
        "Base and data",
        (
            "model.dtype",
            "model.quant_type",
            "model.double_quant",
            "model.revision",
            "model.skip_modules",
            "model.trust_remote_code",
            "data.format",
            "data.answers_only",
        ),
    ),
    ("Card", ("device.device", "device.budget_gib")),
)
"""Headings and the paths below them, in the order of screens and README."""

_WORDS: dict[str, tuple[str, str]] = {
    "name": ("Name", "Name of the run's folder."),
    "method": (
        "Method",
        "LoRA keeps the base in 16 bits: faster, exact. QLoRA holds it in 4 bits: about a quarter of its memory, "
        "slower, and the base itself loses a little.",
    ),
    "model.base": ("Base", "A folder with config.json, a hub id such as owner/name, or embedded."),
    "model.revision": ("Revision", "Branch, tag or commit of a hub model; empty for its newest."),
    "model.dtype": ("Weights", "Type of the frozen 16-bit weights; auto takes what card and model can."),
    "model.quant_type": ("4-bit type", "NF4 fits normally distributed weights; QLoRA only."),
    "model.double_quant": ("Double quant", "Quantises the quantisation constants too: 0.4 bits a weight less."),
    "model.skip_modules": (
        "Kept in 16 bit",
        "Modules that QLoRA does not quantise, such as model.layers.0; `audit base` finds those worth it.",
    ),
    "model.trust_remote_code": ("Remote code", "Runs Python that comes with the model. Only for authors you trust."),
    "adapter.targets": ("Targets", "all-linear, or module names with commas between: q_proj, v_proj."),
    "adapter.rslora": ("rsLoRA", "Scales by alpha / sqrt(rank), so that a high rank still learns."),
    "adapter.dora": ("DoRA", "Learns magnitude and direction apart; slower, more memory."),
    "adapter.init": (
        "Init",
        "pissa starts from the base's main directions (LoRA only); loftq from what 4 bits lost (QLoRA only).",
    ),
    "adapter.rank_pattern": ("Rank by module", "Other ranks for some modules: down_proj=32, v_proj=8."),
    "adapter.alpha_pattern": ("Alpha by module", "Other alphas for some modules: down_proj=64."),
    "adapter.layers": ("Layers", "Only these layers are trained: 0-7, 12; empty trains all."),
    "adapter.modules_to_save": (
        "Whole modules",
        "Modules trained whole beside the adapter, such as lm_head; empty for none. 16 bytes a weight.",
    ),
    "data.path": ("Data", "A JSONL, JSON or Parquet file of rows, or embedded."),
    "data.format": ("Format", "How rows are read; auto recognises it and says so."),
    "data.eval_path": ("Held-out file", "Rows to measure on; empty takes them from the data."),
    "data.answers_only": ("Answers only", "Loss on the answers alone, not on the prompts."),
    "train.schedule": ("Schedule", "How the learning rate falls after the warm-up."),
    "train.optimizer": ("Optimizer", "8-bit states take a quarter of the memory; paged ones may move to main memory."),
    "train.grad_checkpointing": ("Checkpointing", "Recomputes activations: far less memory, about a third slower."),
    "train.offload_checkpoints": (
        "Offload",
        "Checkpointed inputs wait in main memory instead of on the card: long rows in less memory, for copying.",
    ),
    "train.attention": (
        "Attention",
        "sdpa is fast and frugal; flash_attention_2 needs its package; eager is for models that need it.",
    ),
    "train.loss": (
        "Loss",
        "chunked never builds the whole logits: gigabytes less with large vocabularies; liger needs its package.",
    ),
    "train.packing": (
        "Packing",
        "Rows of a step one behind the other instead of padded, isolated; auto measures which is faster.",
    ),
    "train.group_by_length": (
        "Group by length",
        "Where packing is off, rows of similar length go through the model together: less padding, other steps.",
    ),
    "train.compile": ("Compile", "torch.compile of every layer; the run says what that cost at the start."),
    "device.device": (
        "Device",
        "auto: the visible card with the most memory, else the CPU; or cpu, cuda, cuda:1: the second card, as "
        "nvidia-smi or, where it is set, CUDA_VISIBLE_DEVICES lists them.",
    ),
}


@dataclass(frozen=True, slots=True)
class FieldWords:
    """What is said about a field.

    Attributes:
        label: Its name on the screen.
        help: What it is.
        cost: What turning it up costs or buys; empty where it is no knob.
    """

    label: str
    help: str
    cost: str = ""


def words_of(path: str) -> FieldWords:
    """Return what is said about a field.

    Raises:
        KeyError: No field has this path.
    """
    knob = KNOBS.get(path)
    if knob is not None:
        return FieldWords(knob.label, knob.help, knob.cost)
    return FieldWords(*_WORDS[path])
