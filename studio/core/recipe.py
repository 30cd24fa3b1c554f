"""The recipe: everything a run is made from, frozen, one TOML file that a person can read and diff.

Here each field is declared, once: its type and default, which values it may have, what is said about it, its flag.
A recipe says what is wanted. It does not know the machine, the model's shape or the length of the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from studio.core.chat_options import PARTS, Several, TemplateVariables, Variables
from studio.core.columns import Columns, Pairs
from studio.core.experts import is_of_experts
from studio.core.layer_count import LayerCount, Layers
from studio.core.layer_precision import INT8, Precisions, Table
from studio.core.named_templates import NAMED
from studio.core.recipe_field import Field, Problem, declared, fields_in
from studio.core.sources import Source, Sources
from studio.core.text import plain
from studio.core.value_kinds import (
    ALL_LINEAR,
    ByModule,
    Choice,
    Modules,
    Number,
    Switch,
    Targets,
    Text,
)

Method = Literal["lora", "qlora"]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
QuantType = Literal["nf4", "fp4"]
DataFormat = Literal["auto", "chat", "prompt_completion", "alpaca", "text"]
OnBadRow = Literal["stop", "skip"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Loss = Literal["chunked", "full", "liger"]
Recompute = Literal["all", "none", "auto"] | int
Stream = Literal["off", "auto"] | int
OrAuto = bool | Literal["auto"]
"""A switch, or `auto`, which becomes one of both when a run starts."""
Packing = Literal["auto", "on", "off"]
OnOom = Literal["stop", "shrink"]
WeighBy = Literal["rows", "tokens"]
Objective = Literal["sft", "dpo", "orpo"]
AdapterInit = Literal["default", "gaussian", "pissa", "loftq"]

EMBEDDED = "embedded"
_LONGEST_IN_TABLE = 40

_POWERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_LENGTHS = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384, 32_768)
_STEPS = (0, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000, 5000, 10_000)
_RATES = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 5e-3, 1e-2)
_RANK = Number(int, 1, 1024, stops=(1, 2, 4, 8, 16, 32, 64, 128, 256))
_ALPHA = Number(float, 0.1, 4096, stops=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512))


@dataclass(frozen=True, slots=True)
class ModelSection:
    """The base model: which one, and how its frozen weights are held."""

    base: str = declared(
        EMBEDDED,
        Text(needed=True, place=True),
        "Base",
        "A folder with config.json, a hub id such as owner/name, or embedded.",
        flag="model",
        heading="The run",
        resume="by content",
    )
    dtype: Dtype = declared(
        "auto",
        Choice(get_args(Dtype)),
        "Weights",
        "Type of the frozen 16-bit weights; auto takes what card and model can.",
        flag="dtype",
    )
    quant_type: QuantType = declared(
        "nf4",
        Choice(get_args(QuantType)),
        "4-bit type",
        "NF4 fits normally distributed weights; QLoRA only.",
        four_bit=True,
    )
    double_quant: bool = declared(
        True,
        Switch(),
        "Double quant",
        "Quantises the quantisation constants too: 0.4 bits a weight less.",
        flag="double-quant",
        four_bit=True,
    )
    revision: str = declared(
        "",
        Text(),
        "Revision",
        "Branch, tag or commit of a hub model; empty for its newest.",
        resume="by content",
    )
    precision: Table = declared(
        (),
        Precisions(),
        "Precision",
        "Parts of QLoRA's base in other bits than 4: layers.0-3=16bit, down_proj=int8; the first name that fits "
        "counts. `audit base` finds those worth it.",
        four_bit=True,
    )
    stream: Stream = declared(
        "off",
        LayerCount(("off", "auto"), none="off"),
        "Streamed",
        "Layers whose frozen weights wait in main memory and are copied to the card ahead of their use; auto as few as "
        "make it fit. New, and not yet run on a card: each run first proves its gradients.",
        cost="Main memory instead of card memory. Where the card computes faster than the copies come, it waits.",
        flag="stream",
        resume="free",
    )
    trust_remote_code: bool = declared(
        False,
        Switch(),
        "Remote code",
        "Runs Python that comes with the model. Only for authors you trust.",
    )


@dataclass(frozen=True, slots=True)
class AdapterSection:
    """The trainable part: low-rank pairs beside the chosen linear layers."""

    rank: int = declared(
        16,
        _RANK,
        "Rank",
        "Width of the adapter's low-rank pair on every target module.",
        cost="Memory, file size and trainable parameters grow linearly with it; it is rarely what fills a card.",
        flag="rank",
    )
    alpha: float = declared(
        32.0,
        _ALPHA,
        "Alpha",
        "The adapter's output is scaled by alpha / rank (alpha / sqrt(rank) with rsLoRA).",
        cost="Costs nothing. It trades off against the learning rate; alpha = 2 x rank is a habit, not a law.",
        flag="alpha",
    )
    targets: str | tuple[str, ...] = declared(
        ALL_LINEAR,
        Targets(),
        "Targets",
        "all-linear, or module names with commas between: q_proj, v_proj. experts adapts the routed experts, too.",
        flag="targets",
    )
    dropout: float = declared(
        0.0,
        Number(float, 0, 0.9, stops=(0, 0.01, 0.05, 0.1, 0.2)),
        "Dropout",
        "Share of the adapter's inputs set to zero while training.",
        cost="A mask per adapted layer is kept for the backward pass.",
        flag="dropout",
    )
    rslora: bool = declared(
        False,
        Switch(),
        "rsLoRA",
        "Scales by alpha / sqrt(rank), so that a high rank still learns.",
    )
    dora: bool = declared(
        False,
        Switch(),
        "DoRA",
        "Learns magnitude and direction apart; slower, more memory.",
    )
    init: AdapterInit = declared(
        "default",
        Choice(get_args(AdapterInit)),
        "Init",
        "pissa starts from the base's main directions (LoRA only); loftq from what 4 bits lost (QLoRA only).",
    )
    start: str = declared(
        "",
        Text(place=True),
        "Start from",
        "An earlier run, by its name, or a PEFT folder: the adapter begins as that one ended, in form and base alike.",
    )
    lora_plus_ratio: float = declared(
        1.0,
        Number(float, 1, 256, stops=(1, 2, 4, 8, 16, 32)),
        "LoRA+ ratio",
        "Learning rate of the B matrices over that of the A matrices; 1 is plain LoRA, LoRA+ proposes 16.",
        cost="Costs nothing. With a high ratio lower the learning rate: B then moves faster than the rate says.",
    )
    rank_pattern: tuple[tuple[str, int], ...] = declared(
        (),
        ByModule(_RANK),
        "Rank by module",
        "Other ranks for some modules: down_proj=32, v_proj=8.",
    )
    alpha_pattern: tuple[tuple[str, float], ...] = declared(
        (),
        ByModule(_ALPHA),
        "Alpha by module",
        "Other alphas for some modules: down_proj=64.",
    )
    layers: tuple[int, ...] = declared(
        (),
        Layers(),
        "Layers",
        "Only these layers are trained: 0-7, 12; empty trains all.",
    )
    modules_to_save: tuple[str, ...] = declared(
        (),
        Modules(),
        "Whole modules",
        "Modules trained whole beside the adapter, such as lm_head; empty for none. 16 bytes a weight.",
    )
    whole_rate_ratio: float = declared(
        1.0,
        Number(float, 0.001, 10, stops=(0.05, 0.1, 0.2, 0.5, 1)),
        "Whole rate",
        "Learning rate of whole modules over that of the adapter; Unsloth advises 0.1 to 0.5 for embeddings and head.",
        cost="Costs nothing.",
    )


@dataclass(frozen=True, slots=True)
class TrainSection:
    """The loop."""

    micro_batch: int = declared(
        1,
        Number(int, 1, 4096, "rows", _POWERS),
        "Micro-batch",
        "Rows that go through the model at once.",
        cost="Activations grow linearly with micro-batch x length; speed grows until the card is busy.",
        flag="batch",
        resume="rounded",
    )
    accumulation: int = declared(
        8,
        Number(int, 1, 4096, "micro-batches", _POWERS),
        "Accumulation",
        "Micro-batches summed into one optimizer step.",
        cost="No memory. The step takes that many times longer and sees that many more rows.",
        flag="accumulation",
        resume="rounded",
    )
    seq_len: int = declared(
        1024,
        Number(int, 8, 1_048_576, "tokens", _LENGTHS),
        "Length",
        "Longest row; what is longer is cut on the right, and a plain text becomes several rows.",
        cost="Activations grow linearly with it; attention time grows quadratically.",
        flag="seq",
    )
    steps: int = declared(
        0,
        Number(int, 0, 10_000_000, "optimizer steps", _STEPS),
        "Steps",
        "Optimizer steps; 0 lets the epochs decide.",
        cost="Time, linearly.",
        flag="steps",
    )
    epochs: float = declared(
        1.0,
        Number(float, 0, 1000, "passes", (0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 10)),
        "Epochs",
        "Passes over the training rows when steps is 0.",
        cost="Time, linearly; many passes over few rows memorise them.",
        flag="epochs",
    )
    objective: Objective = declared(
        "sft",
        Choice(get_args(Objective)),
        "Objective",
        "sft learns answers; dpo (against the base) and orpo learn to prefer one answer to another, from pairs.",
        flag="objective",
    )
    beta: float = declared(
        0.1,
        Number(float, 0.001, 10, stops=(0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)),
        "Beta",
        "dpo: how closely the model is held to its base. orpo: weight of the odds ratio (lambda in its paper).",
        cost="Costs nothing. 0.1 is TRL's default for both; Zephyr's QLoRA recipe for dpo takes 0.01.",
        flag="beta",
        pairs=True,
    )
    label_smoothing: float = declared(
        0.0,
        Number(float, 0, 0.49, stops=(0, 0.05, 0.1, 0.2, 0.3, 0.4)),
        "Wrong labels",
        "dpo: share of the pairs that are taken to be the wrong way round (robust DPO); 0 trusts all.",
        cost="Costs nothing. 0.1 is typical of robust DPO (TRL, after Chowdhury et al. 2024).",
        pairs=True,
    )
    learning_rate: float = declared(
        2e-4,
        Number(float, 1e-8, 1, stops=_RATES),
        "Learning rate",
        "Peak learning rate of the adapter.",
        cost="Costs nothing. LoRA's best is about ten times that of full fine-tuning (Thinking Machines, 2025); "
        "TRL's scripts take 5e-6 for dpo and 8e-5 for orpo.",
        flag="lr",
    )
    schedule: Schedule = declared(
        "cosine",
        Choice(get_args(Schedule)),
        "Schedule",
        "How the learning rate falls after the warm-up.",
    )
    warmup_fraction: float = declared(
        0.03,
        Number(float, 0, 1, "of the steps", (0, 0.01, 0.03, 0.05, 0.1, 0.2)),
        "Warm-up",
        "Share of the steps in which the learning rate climbs from 0.",
        cost="Costs nothing.",
    )
    optimizer: Optimizer = declared(
        "adamw_torch",
        Choice(get_args(Optimizer)),
        "Optimizer",
        "8-bit states take a quarter of the memory; paged ones may move to main memory.",
        flag="optimizer",
    )
    recompute: Recompute = declared(
        "all",
        LayerCount(("all", "none", "auto"), none="none"),
        "Recompute",
        "How many layers, from the first, are computed again on the way back instead of keeping their activations; "
        "auto: as few as the card has room for.",
        cost="Time: all take about a third more than none, and the least memory.",
        flag="recompute",
        resume="rounded",
    )
    keep_dequantised: OrAuto = declared(
        False,
        Switch(("auto",)),
        "Keep dequantised",
        "What is dequantised of a layer that is computed again stays until its backward, which else dequantises once "
        "more: two times a step in place of three. Micro-batches of more than 1536 tokens; auto: where there is room.",
        resume="free",
        four_bit=True,
    )
    offload_checkpoints: bool = declared(
        False,
        Switch(),
        "Offload",
        "Checkpointed inputs wait in main memory instead of on the card: long rows in less memory, for copying.",
        resume="free",
    )
    loss: Loss = declared(
        "chunked",
        Choice(get_args(Loss)),
        "Loss",
        "chunked never builds the whole logits: gigabytes less with large vocabularies; liger needs its package.",
        flag="loss",
        resume="rounded",
    )
    packing: Packing = declared(
        "auto",
        Choice(get_args(Packing)),
        "Packing",
        "Rows of a step one behind the other instead of padded, isolated; auto measures which is faster.",
        resume="rounded",
    )
    group_by_length: bool = declared(
        True,
        Switch(),
        "Group by length",
        "Where packing is off, rows of similar length go through the model together: less padding, other steps.",
    )
    attention: Attention = declared(
        "sdpa",
        Choice(get_args(Attention)),
        "Attention",
        "sdpa is fast and frugal; flash_attention_2 needs its package; eager is for models that need it.",
        flag="attention",
        resume="rounded",
    )
    compile: bool = declared(
        False,
        Switch(),
        "Compile",
        "torch.compile of every layer; the run says what that cost at the start.",
        resume="rounded",
    )
    weight_decay: float = declared(
        0.0,
        Number(float, 0, 1, stops=(0, 0.001, 0.01, 0.1)),
        "Weight decay",
        "AdamW's decoupled decay of the adapter weights.",
        cost="Costs nothing.",
    )
    max_grad_norm: float = declared(
        1.0,
        Number(float, 0, 1000, stops=(0, 0.3, 0.5, 1, 2, 5)),
        "Gradient clip",
        "Gradients are scaled down to this norm; 0 never clips.",
        cost="Costs nothing.",
    )
    seed: int = declared(
        17,
        Number(int, 0, 2**32 - 1),
        "Seed",
        "Fixes the held-out split, the order of rows, dropout and the adapter's first values.",
        cost="Costs nothing.",
    )
    checkpoint_every: int = declared(
        100,
        Number(int, 0, 10_000_000, "steps", (0, 10, 20, 50, 100, 200, 500)),
        "Checkpoint every",
        "Optimizer steps between checkpoints; 0 saves by time, at the end and on request.",
        cost="Disk: adapter and optimizer state each time.",
        resume="free",
    )
    checkpoint_minutes: float = declared(
        15.0,
        Number(float, 0, 1_000_000, "minutes", (0, 5, 10, 15, 30, 60)),
        "or after",
        "Minutes after the last checkpoint at which another is saved, whatever the step; 0 counts steps alone.",
        cost="Disk: adapter and optimizer state each time.",
        resume="free",
    )
    track: tuple[str, ...] = declared(
        (),
        Several(("trackio", "wandb", "mlflow"), none=True),
        "Track",
        "Sends figures to trackio, wandb or mlflow, whose library must be installed; empty for none. TensorBoard's "
        "files are written wherever its package is.",
        resume="free",
    )
    keep_checkpoints: int = declared(
        2,
        Number(int, 1, 1000, "checkpoints", (1, 2, 3, 5, 10)),
        "Keep checkpoints",
        "Newest checkpoints kept; older ones are deleted, but for the one with the lowest held-out loss.",
        cost="Disk, linearly.",
        resume="free",
    )
    on_oom: OnOom = declared(
        "stop",
        Choice(get_args(OnOom)),
        "Out of memory",
        "stop, or shrink: the run frees what it can and goes on from its last step with smaller micro-batches and as "
        "much more accumulation, or more layers computed again or streamed: the same rows a step.",
        flag="on-oom",
        resume="free",
    )


@dataclass(frozen=True, slots=True)
class EvalSection:
    """Held-out evaluation."""

    rows: int = declared(
        100,
        Number(int, 0, 1_000_000, "rows", (0, 20, 50, 100, 200, 500)),
        "Held-out rows",
        "Rows kept out of training to measure on; of a held-out file, 0 means all.",
        cost="Fewer rows to train on; time at every evaluation.",
    )
    every: int = declared(
        50,
        Number(int, 0, 10_000_000, "steps", (0, 10, 20, 50, 100, 200, 500)),
        "Evaluate every",
        "Optimizer steps between evaluations; 0 evaluates before the first and after the last.",
        cost="Time.",
        resume="free",
    )
    samples: int = declared(
        3,
        Number(int, 0, 100, "answers", (0, 1, 3, 5, 10)),
        "Samples",
        "Held-out prompts answered before and after training, to read.",
        cost="Time.",
        resume="free",
    )
    sample_tokens: int = declared(
        64,
        Number(int, 1, 4096, "tokens", (16, 32, 64, 128, 256)),
        "Sample length",
        "Longest generated answer.",
        cost="Time.",
        resume="free",
    )


@dataclass(frozen=True, slots=True)
class DataSection:
    """The rows: where they are, how they are read."""

    path: str = declared(
        EMBEDDED,
        Text(needed=True, place=True),
        "Data",
        "A file of rows (JSONL, JSON, CSV, Parquet, Arrow, packed or not) or text, a folder of such files, a hub data "
        "set as owner/name, or embedded.",
        flag="data",
        heading="The run",
        resume="by content",
    )
    format: DataFormat = declared(
        "auto",
        Choice(get_args(DataFormat)),
        "Format",
        "How rows are read; auto recognises it and says so.",
        resume="by content",
    )
    columns: Pairs = declared(
        (),
        Columns(),
        "Columns",
        "What the file calls our columns: prompt=Frage, completion=Antwort.",
        resume="by content",
    )
    prompt: str = declared(
        "",
        Text(),
        "Prompt line",
        "Writes the prompt from columns, in jinja: {{ title }}: {{ body }}.",
        resume="by content",
    )
    sources: tuple[Source, ...] = declared(
        (),
        Sources(get_args(DataFormat)),
        "Mixture",
        "Several files in place of one, each with a weight or a number of rows: a.jsonl=2, b.jsonl=1.",
        resume="by content",
    )
    weigh_by: WeighBy = declared(
        "rows",
        Choice(get_args(WeighBy)),
        "Weights by",
        "Whether a mixture's weights are shares of its rows or of its tokens.",
        resume="by content",
    )
    eval_path: str = declared(
        "",
        Text(place=True),
        "Held-out file",
        "Rows to measure on; empty takes them from the data.",
        heading="Held-out rows",
        resume="by content",
    )
    answers_only: bool = declared(
        True,
        Switch(),
        "Answers only",
        "Loss on the answers alone, not on the prompts.",
    )
    learn: tuple[str, ...] = declared(
        PARTS,
        Several(PARTS),
        "Learn",
        "Parts of an answer that are learnt: reasoning, answer, calls. The others are read, not learnt.",
    )
    last_answer_only: bool = declared(
        False,
        Switch(),
        "Last answer",
        "Learn only the last answer of each conversation; off: every one that the data does not exclude.",
    )
    template_kwargs: Variables = declared(
        (),
        TemplateVariables(),
        "Template's words",
        "Variables for the chat template, in training, audits and chats of the run: enable_thinking=false.",
    )
    config: str = declared(
        "",
        Text(),
        "Configuration",
        "Of a hub data set with several: which one (also called subset).",
        resume="by content",
    )
    split: str = declared(
        "",
        Text(),
        "Split",
        "Of a folder or hub data set with several: which one, or all; empty takes train.",
        resume="by content",
    )
    revision: str = declared(
        "",
        Text(),
        "Data revision",
        "Branch, tag or commit of a hub data set; empty for its newest. A run notes the commit here.",
        resume="by content",
    )
    on_bad_row: OnBadRow = declared(
        "stop",
        Choice(get_args(OnBadRow)),
        "Bad rows",
        "stop: a row that cannot be read keeps the run from starting. skip: it is left out, counted and listed.",
        resume="by content",
    )
    template: str = declared(
        "",
        Text(place=True),
        "Chat template",
        f"{', '.join(NAMED)}, or a jinja file; empty for the model's own. Saved with the adapter's tokenizer.",
    )
    blocks: bool = declared(
        True,
        Switch(),
        "Blocks",
        "A plain text longer than a row becomes several rows, each token learnt once; off: it is cut.",
    )
    stride: int = declared(
        0,
        Number(int, 0, 524_288, "tokens", (0, 16, 32, 64, 128, 256, 512)),
        "Stride",
        "Tokens that a block of a text repeats from the block before it, as context that is not learnt again.",
        cost="Time: so many tokens of each block teach nothing.",
    )
    document_ends: bool = declared(
        True,
        Switch(),
        "Document ends",
        "The end token is learnt after each plain text; off where they are pieces of something longer.",
    )

    @property
    def words(self) -> tuple[str, ...]:
        """The files that are trained on, as the recipe names them: those of the mixture, or the one."""
        return tuple(source.path for source in self.sources) or (self.path,)


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """Where it runs."""

    device: str = declared(
        "auto",
        Text(needed=True, pattern="auto|cpu|cuda(:[0-9]{1,3})?", form="auto, cpu, cuda or cuda:N"),
        "Device",
        "auto: the visible card with the most memory, else the CPU; or cpu, cuda, cuda:1: the second card, as "
        "nvidia-smi or, where it is set, CUDA_VISIBLE_DEVICES lists them.",
        resume="free",
    )
    budget_gib: float = declared(
        0.0,
        Number(float, 0, 100_000, "GiB", (0, 4, 6, 8, 10, 12, 16, 20, 22, 24, 32, 40, 48, 80)),
        "Budget",
        "Most GPU memory the run may take; 0 is the whole card.",
        cost="A run that needs more stops with an out-of-memory error instead of starving your desktop.",
        resume="free",
    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """One fine-tune, completely described. Below each heading of the screens, fields stand in the order from here."""

    name: str = declared(
        "untitled",
        Text(needed=True),
        "Name",
        "Name of the run's folder.",
        resume="free",
    )
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    data: DataSection = field(default_factory=DataSection)
    method: Method = declared(
        "qlora",
        Choice(get_args(Method)),
        "Method",
        "LoRA keeps the base in 16 bits: faster, exact. QLoRA holds it in 4 bits: about a quarter of its memory, "
        "slower, and the base itself loses a little.",
        flag="method",
    )
    device: DeviceSection = field(default_factory=DeviceSection)

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step sees on one device (the effective batch)."""
        return self.train.micro_batch * self.train.accumulation

    def get(self, path: str) -> Any:
        """Return the value at a dotted path such as `train.learning_rate`.

        Raises:
            KeyError: No field has this path.
        """
        if path not in FIELDS:
            raise KeyError(path)
        section, _, name = path.rpartition(".")
        return getattr(getattr(self, section) if section else self, name)

    def with_(self, path: str, value: Any) -> "Recipe":
        """Return a copy with the value at a dotted path replaced, in the field's own type where it means the same.

        So 4.0 becomes 4 in a field of whole numbers, a list a tuple, and the list `["all-linear"]` that word. A value
        that is wrong for the field is kept as it is, so that `problems` can report it.

        Raises:
            KeyError: No field has this path.
        """
        value = FIELDS[path].kind.shaped(value)
        section, _, name = path.rpartition(".")
        if not section:
            return replace(self, **{name: value})
        return replace(self, **{section: replace(getattr(self, section), **{name: value})})

    def to_dict(self) -> dict[str, Any]:
        """Return plain tables and values, ready for TOML or JSON: fields outside tables first, as TOML demands."""
        table: dict[str, Any] = {}
        for path in sorted(FIELDS, key=lambda path: "." in path):
            section, _, name = path.rpartition(".")
            target = table.setdefault(section, {}) if section else table
            target[name] = FIELDS[path].kind.stored(self.get(path))
        return table

    def problems(self) -> tuple[Problem, ...]:
        """Return everything that is wrong with this recipe: field by field, then between fields that are sound."""
        found = [problem for path, place in FIELDS.items() for problem in place.problems(self.get(path))]
        wrong = {problem.path for problem in found}
        # What stands between fields is looked at with defaults for the wrong ones: those may be of any type.
        sound = self
        for path in wrong:
            sound = sound.with_(path, FIELDS[path].default)
        return (*found, *(problem for problem in _between(sound) if problem.path not in wrong))


_HEADINGS = {
    "": "The run",
    "adapter": "Adapter",
    "train": "Training",
    "eval": "Held-out rows",
    "model": "Base and data",
    "data": "Base and data",
    "device": "Card",
}
"""Under which heading a table's fields are shown; the headings stand in this order."""

FIELDS: dict[str, Field] = fields_in(Recipe(), _HEADINGS)
"""Every field by its dotted path."""

PLACES = tuple(path for path, place in FIELDS.items() if isinstance(place.kind, Text) and place.kind.place)
"""The fields that may name a file or folder of this computer."""

SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = tuple(
    (heading, tuple(path for path, place in FIELDS.items() if place.heading == heading))
    for heading in dict.fromkeys(_HEADINGS.values())
)
"""Headings and the paths below them, in the order of screens and reference."""


def choices_of(path: str) -> tuple[str, ...]:
    """Return the words that a field allows, or nothing where it is not a choice."""
    kind = FIELDS[path].kind
    return kind.words if isinstance(kind, Choice) else ()


def number_of(path: str) -> Number:
    """Return the limits of a field that is a number.

    Raises:
        KeyError: No field has this path, or it is no number.
    """
    kind = FIELDS[path].kind
    if not isinstance(kind, Number):
        raise KeyError(path)
    return kind


def field_text(path: str, value: Any) -> str:
    """Return a field's value for a table; None is shown as missing."""
    if value is None:
        return "-"
    return plain(FIELDS[path].kind.written(value) or "(empty)", one_line=True, limit=_LONGEST_IN_TABLE)


def _between(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong between fields, each of which may be sound by itself."""
    train = recipe.train
    if train.steps == 0 and train.epochs == 0:
        yield Problem("train.steps", "0 steps and 0 epochs", "at least one of train.steps and train.epochs above 0")
    if recipe.eval.rows == 0 and recipe.eval.samples > 0 and not recipe.data.eval_path:
        yield Problem(
            "eval.samples", f"{recipe.eval.samples} with no held-out rows", "eval.rows above 0, or eval.samples 0"
        )
    if train.offload_checkpoints and train.recompute == "none":
        yield Problem("train.offload_checkpoints", "true without checkpoints", "train.recompute all or a number")
    if train.compile and recipe.model.stream != "off":
        # Compiled layers hold on to the weights that they were compiled with, and streamed ones get others at each use.
        yield Problem("train.compile", "true with model.stream", "false, or model.stream off")
    yield from _between_bits(recipe)
    if not recipe.data.answers_only:
        with_all = "with data.answers_only false, which learns every token"
        if recipe.data.learn != PARTS:
            yield Problem("data.learn", f"{', '.join(recipe.data.learn)} {with_all}", "all parts, or answers_only true")
        if recipe.data.last_answer_only:
            yield Problem("data.last_answer_only", f"true {with_all}", "false, or data.answers_only true")
    if recipe.data.stride > train.seq_len // 2:
        most = f"{train.seq_len // 2} at most, half of train.seq_len"
        yield Problem("data.stride", f"{recipe.data.stride} tokens in rows of {train.seq_len}", most)
    if recipe.data.prompt and (named := dict(recipe.data.columns).get("prompt")):
        found = f"prompt = {field_text('data.prompt', named)} beside data.prompt"
        yield Problem("data.columns", found, "one of the two: data.prompt writes the prompt from the file's columns")
    for name in ("config", "split", "revision") if recipe.data.sources else ():
        if getattr(recipe.data, name):
            found = f"{field_text(f'data.{name}', getattr(recipe.data, name))} beside data.sources"
            yield Problem(f"data.{name}", found, "it in the source's path: owner/name#configuration@revision:split")
    if recipe.data.sources and recipe.data.path != EMBEDDED:
        found = f"{field_text('data.path', recipe.data.path)} beside data.sources"
        yield Problem("data.path", found, "one of the two: name this file in data.sources too, or leave it out")
    yield from _between_objective(recipe)
    yield from _between_adapter(recipe)


def _between_bits(recipe: Recipe) -> Iterator[Problem]:
    """Yield what does not go together with the precision of a QLoRA base, by layer."""
    model = recipe.model
    words = {word for _, word in model.precision} if recipe.method == "qlora" else set()
    if "nf4" in words and model.quant_type != "nf4":
        found = f"nf4 with model.quant_type {model.quant_type}"
        yield Problem("model.precision", found, "model.quant_type nf4: a base has one 4-bit type")
    if INT8 in words and model.stream != "off":
        yield Problem("model.stream", f"{model.stream} with int8 in model.precision", "off: int8 is not streamed yet")
    if INT8 in words and recipe.train.compile:
        yield Problem("train.compile", "true with int8 in model.precision", "false: int8 is not compiled yet")


def _between_objective(recipe: Recipe) -> Iterator[Problem]:
    """Yield what does not go together with an objective that learns from pairs."""
    train, init = recipe.train, recipe.adapter.init
    if train.objective == "sft":
        return
    with_it = f"with train.objective {train.objective}"
    if train.loss == "liger":
        # One gradient for all tokens is what the kernel makes while it computes the loss.
        yield Problem("train.loss", f"liger {with_it}", "chunked or full: liger's kernel weighs all tokens alike")
    if train.objective == "orpo" and train.label_smoothing:
        yield Problem("train.label_smoothing", f"{train.label_smoothing:g} {with_it}", "0, or train.objective dpo")
    if train.objective == "dpo" and init in ("pissa", "loftq"):
        yield Problem(
            "adapter.init", f"{init} {with_it}", "default or gaussian: with others the base alone is not the reference"
        )
    if train.objective == "dpo" and not recipe.data.answers_only:
        yield Problem("data.answers_only", f"false {with_it}", "true: what both sides share cancels out")


def _between_adapter(recipe: Recipe) -> Iterator[Problem]:
    """Yield what does not go together in an adapter: its start, method, targets, DoRA and dropout."""
    init, targets = recipe.adapter.init, recipe.adapter.targets
    names = targets if isinstance(targets, tuple) else (targets,)
    if any(isinstance(name, str) and is_of_experts(name) for name in names):
        # What peft refuses of pairs beside a parameter (tuners/lora/layer.py ParamWrapper), and what needs a matrix.
        asked = {
            "dropout": recipe.adapter.dropout > 0,
            "dora": recipe.adapter.dora,
            f"init {init}": init in ("loftq", "pissa"),
        }
        for name in (name for name, wanted in asked.items() if wanted):
            yield Problem("adapter.targets", f"experts with {name}", f"experts without it: peft has no {name} for them")
    if init == "loftq" and recipe.method != "qlora":
        yield Problem("adapter.init", "loftq with method lora", "method qlora: loftq repairs the loss of 4-bit weights")
    if init == "pissa" and recipe.method == "qlora":
        yield Problem(
            "adapter.init", "pissa with method qlora", "loftq, which is made for 4-bit weights, or method lora"
        )
    if recipe.adapter.start and init in ("loftq", "pissa"):
        yield Problem("adapter.init", f"{init} with adapter.start", "default: an adapter that goes on has its values")
    if recipe.adapter.start and recipe.train.objective == "dpo":
        # With the adapter switched off the base alone would be the reference, and not what the run starts from.
        yield Problem(
            "adapter.start", "an adapter with train.objective dpo", "nothing: merge that adapter and name it model.base"
        )
    if init in ("loftq", "pissa") and recipe.adapter.dora:
        yield Problem("adapter.init", f"{init} with dora", "adapter.dora false, or init default or gaussian")
