"""The one table of fields that a person turns. Sliders, flags, limits, help texts and the README come from it."""

from dataclasses import dataclass
from typing import Literal

Scale = Literal["linear", "log", "stops"]


@dataclass(frozen=True, slots=True)
class Knob:
    """A number of the recipe that a person may turn.

    Attributes:
        path: Dotted path in the recipe.
        label: Short name on a slider.
        unit: What one of it is.
        low: Smallest value allowed.
        high: Largest value allowed.
        scale: How a slider walks from low to high.
        stops: The values that a slider stops at; empty means that the scale decides.
        help: What it is, for a user.
        cost: What turning it up costs or buys.
        flag: The command-line flag, without dashes; empty when only `--set` reaches it.
    """

    path: str
    label: str
    unit: str
    low: float
    high: float
    scale: Scale
    help: str
    cost: str
    stops: tuple[float, ...] = ()
    flag: str = ""

    @property
    def allowed(self) -> str:
        """The limits in words."""
        return f"{_spoken(self.low)} to {_spoken(self.high)} {self.unit}".rstrip()


def _spoken(number: float) -> str:
    """A large whole number with its thousands apart: a reader should not meet 1e+06 where 1,000,000 is meant."""
    return f"{number:,.0f}" if number >= 10_000 else f"{number:g}"


_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_POWERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# fmt: off  one knob is read as a paragraph, not as eleven lines
_TABLE = (
    Knob(
        "adapter.rank",
        "Rank",
        "",
        1,
        1024,
        "stops",
        "Width of the adapter's low-rank pair on every target module.",
        "Memory, file size and trainable parameters grow linearly with it; it is rarely what fills a card.",
        _RANKS,
        "rank",
    ),
    Knob(
        "adapter.alpha",
        "Alpha",
        "",
        0.1,
        4096,
        "stops",
        "The adapter's output is scaled by alpha / rank (alpha / sqrt(rank) with rsLoRA).",
        "Costs nothing. It trades off against the learning rate; alpha = 2 x rank is a habit, not a law.",
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        "alpha",
    ),
    Knob(
        "adapter.dropout",
        "Dropout",
        "",
        0,
        0.9,
        "stops",
        "Share of the adapter's inputs set to zero while training.",
        "A mask per adapted layer is kept for the backward pass.",
        (0, 0.01, 0.05, 0.1, 0.2),
        "dropout",
    ),
    Knob(
        "adapter.lora_plus_ratio",
        "LoRA+ ratio",
        "",
        1,
        256,
        "stops",
        "Learning rate of the B matrices over that of the A matrices; 1 is plain LoRA, LoRA+ proposes 16.",
        "Costs nothing. With a high ratio lower the learning rate: B then moves faster than the rate says.",
        (1, 2, 4, 8, 16, 32),
    ),
    Knob(
        "train.micro_batch",
        "Micro-batch",
        "rows",
        1,
        4096,
        "stops",
        "Rows that go through the model at once.",
        "Activations grow linearly with micro-batch x length; speed grows until the card is busy.",
        _POWERS,
        "batch",
    ),
    Knob(
        "train.accumulation",
        "Accumulation",
        "micro-batches",
        1,
        4096,
        "stops",
        "Micro-batches summed into one optimizer step.",
        "No memory. The step takes that many times longer and sees that many more rows.",
        _POWERS,
        "accumulation",
    ),
    Knob(
        "train.seq_len",
        "Length",
        "tokens",
        8,
        1_048_576,
        "stops",
        "Longest row; what is longer is cut on the right.",
        "Activations grow linearly with it; attention time grows quadratically.",
        (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768),
        "seq",
    ),
    Knob(
        "train.steps",
        "Steps",
        "optimizer steps",
        0,
        10_000_000,
        "stops",
        "Optimizer steps; 0 lets the epochs decide.",
        "Time, linearly.",
        (0, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000),
        "steps",
    ),
    Knob(
        "train.epochs",
        "Epochs",
        "passes",
        0,
        1000,
        "stops",
        "Passes over the training rows when steps is 0.",
        "Time, linearly; many passes over few rows memorise them.",
        (0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 10),
        "epochs",
    ),
    Knob(
        "train.learning_rate",
        "Learning rate",
        "",
        1e-8,
        1,
        "log",
        "Peak learning rate of the adapter.",
        "Costs nothing. LoRA's best is about ten times that of full fine-tuning (Thinking Machines, 2025).",
        (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        "lr",
    ),
    Knob(
        "train.warmup_fraction",
        "Warm-up",
        "of the steps",
        0,
        1,
        "stops",
        "Share of the steps in which the learning rate climbs from 0.",
        "Costs nothing.",
        (0, 0.01, 0.03, 0.05, 0.1, 0.2),
    ),
    Knob(
        "train.weight_decay",
        "Weight decay",
        "",
        0,
        1,
        "stops",
        "AdamW's decoupled decay of the adapter weights.",
        "Costs nothing.",
        (0, 0.001, 0.01, 0.1),
    ),
    Knob(
        "train.max_grad_norm",
        "Gradient clip",
        "",
        0,
        1000,
        "stops",
        "Gradients are scaled down to this norm; 0 never clips.",
        "Costs nothing.",
        (0, 0.3, 0.5, 1, 2, 5),
    ),
    Knob(
        "train.seed",
        "Seed",
        "",
        0,
        2**32 - 1,
        "stops",
        "Fixes the held-out split, the order of rows, dropout and the adapter's first values.",
        "Costs nothing.",
        (),
    ),
    Knob(
        "train.checkpoint_every",
        "Checkpoint every",
        "steps",
        0,
        10_000_000,
        "stops",
        "Optimizer steps between checkpoints; 0 saves only at the end and on request.",
        "Disk: adapter and optimizer state each time.",
        (0, 10, 20, 50, 100, 200, 500),
    ),
    Knob(
        "train.keep_checkpoints",
        "Keep checkpoints",
        "checkpoints",
        1,
        1000,
        "stops",
        "Newest checkpoints kept; older ones are deleted.",
        "Disk, linearly.",
        (1, 2, 3, 5, 10),
    ),
    Knob(
        "eval.rows",
        "Held-out rows",
        "rows",
        0,
        1_000_000,
        "stops",
        "Rows kept out of training to measure on.",
        "Fewer rows to train on; time at every evaluation.",
        (0, 20, 50, 100, 200, 500),
    ),
    Knob(
        "eval.every",
        "Evaluate every",
        "steps",
        0,
        10_000_000,
        "stops",
        "Optimizer steps between evaluations; 0 evaluates before the first and after the last.",
        "Time.",
        (0, 10, 20, 50, 100, 200, 500),
    ),
    Knob(
        "eval.samples",
        "Samples",
        "answers",
        0,
        100,
        "stops",
        "Held-out prompts answered before and after training, to read.",
        "Time.",
        (0, 1, 3, 5, 10),
    ),
    Knob(
        "eval.sample_tokens",
        "Sample length",
        "tokens",
        1,
        4096,
        "stops",
        "Longest generated answer.",
        "Time.",
        (16, 32, 64, 128, 256),
    ),
    Knob(
        "device.budget_gib",
        "Budget",
        "GiB",
        0,
        100_000,
        "stops",
        "Most GPU memory the run may take; 0 is the whole card.",
        "A run that needs more stops with an out-of-memory error instead of starving your desktop.",
        (0, 4, 6, 8, 10, 12, 16, 20, 22, 24, 32, 40, 48, 80),
    ),
)
# fmt: on

KNOBS: dict[str, Knob] = {knob.path: knob for knob in _TABLE}
"""Every knob by its path, in the order in which screens show them."""
