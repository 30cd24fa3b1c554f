"""One engine, one process: trains a few steps on the embedded model and prints what it saw as JSON. Run by bench_train.

Every engine gets the same rows in the same order, the same micro-batches, adapter, learning rate and arithmetic (bf16
where the processor has it), without gradient checkpointing. `studio` may pack rows: it is part of the engine.
"""

import json
import resource
import sys

if sys.argv[1:2] == ["unsloth"]:
    # It changes transformers and torch and wants to be imported before them; where it is missing, `main` says so.
    from contextlib import suppress

    with suppress(ImportError):
        import unsloth  # noqa: F401
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from studio.core.recipe import AdapterSection, TrainSection
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.rows import Example
from studio.jobs.base.load import FourBit, base_folder, load_base
from studio.jobs.base.precision import choose_precision
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.measure.weightless import frozen_tensors
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.batches import Batcher, StepBatches
from studio.jobs.train.checkpoint import TrainState
from studio.jobs.train.loop import LoopParts, train
from studio.jobs.train.memory import MemoryWatch
from studio.jobs.train.optimizer import build_optimizer
from studio.jobs.train.packing import can_pack
from studio.jobs.train.step_model import StepModel
from studio.probe.data import read_data
from studio.probe.models import find_base
from tests.fakes.live_bytes import LiveBytes

LONGEST = 256


@dataclass(frozen=True, slots=True)
class Work:
    """What is trained.

    Attributes:
        method: lora or qlora.
        steps: Optimizer steps.
        micro_batch: Rows at once.
        accumulation: Micro-batches of a step.
        joined: Rows are joined until they have 256 tokens each, instead of being taken as they are.
        memory: Count the bytes of all tensors that are made; the times then mean nothing.
        device: `cpu` or `cuda`.
        base: The model, as in a recipe.
    """

    method: str
    steps: int
    micro_batch: int
    accumulation: int
    joined: bool = False
    memory: bool = False
    device: str = "cpu"
    base: str = "embedded"

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch * self.accumulation


class Clock:
    """Wall and processor seconds of every step, and the peak of tensor bytes made since the model stood."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []
        self._began = (0.0, 0.0)

    def start(self) -> None:
        _settle()
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        _settle()
        self.wall.append(time.perf_counter() - self._began[0])
        self.processor.append(time.process_time() - self._began[1])


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def model_and_rows(work: Work) -> tuple[PeftModel, Any, list[Example]]:
    base = find_base(work.base)
    tokenizer = load_tokenizer(base_folder(base))
    precision = choose_precision("auto", work.place)
    torch.manual_seed(17)
    frozen = load_base(
        base,
        method=work.method,  # type: ignore[arg-type]
        dtype=precision.dtype,
        quant=FourBit(),
        attention="sdpa",
        device=work.place,
    )
    model = attach_adapter(frozen, AdapterSection(rank=16, alpha=32.0), recompute="none")
    return model, tokenizer, rows_of(work, tokenizer)


def rows_of(work: Work, tokenizer: Any) -> list[Example]:
    wanted = work.steps * work.rows_per_step
    data = list(read_data(Path("embedded")).rows)
    encoded, _ = encode_rows(data, tokenizer, seq_len=LONGEST, answers_only=True, warn=lambda text: None)
    rows = _joined(encoded) if work.joined else list(encoded)
    return [rows[index % len(rows)] for index in range(wanted)]


def _joined(rows: list[Example]) -> list[Example]:
    ids, labels = (np.concatenate([getattr(row, name) for row in rows]) for name in ("input_ids", "labels"))
    return [
        Example(ids[start : start + LONGEST], labels[start : start + LONGEST])
        for start in range(0, len(ids) - LONGEST, LONGEST)
    ]


def step_tokens(work: Work) -> list[int]:
    """Return the tokens of every step, without padding: the same for all engines."""
    lengths = [len(row.input_ids) for row in rows_of(work, load_tokenizer(base_folder(find_base(work.base))))]
    starts = range(0, len(lengths), work.rows_per_step)
    return [sum(lengths[start : start + work.rows_per_step]) for start in starts]


class TensorBytes:
    """The peak of bytes of tensors made above a loaded model; as a context, counts what is made within it.

    On a card torch's own counter tells it, on a CPU every storage is followed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storages = LiveBytes()
        self._loaded = 0

    def above(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Take the model's weights as the ground: an operator that returns a view of one has made nothing."""
        if self._device.type == "cuda":
            self._loaded = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return nullcontext()
        for tensor in (*frozen_tensors(model), *model.buffers()):
            self._storages.track(tensor)
        self._loaded = self._storages.peak = self._storages.live
        return self._storages

    @property
    def peak(self) -> int:
        on_card = self._device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self._device) if on_card else self._storages.peak) - self._loaded


def run_studio(work: Work, clock: Clock, counted: TensorBytes | None) -> list[float]:
    model, tokenizer, rows = model_and_rows(work)
    section = TrainSection(learning_rate=2e-4, schedule="constant", warmup_fraction=0)
    optimizer = build_optimizer(
        model.named_parameters(),
        kind="adamw_torch",
        learning_rate=2e-4,
        weight_decay=0.0,
        device=work.place,
        warn=print,
    )
    precision = choose_precision("auto", work.place)
    step_model = StepModel(model, "chunked", precision.autocast)
    batcher = Batcher(work.micro_batch, tokenizer.pad_token_id, work.place)
    if can_pack(step_model, rows, work.place):
        batcher = replace(batcher, packed_tokens=work.micro_batch * LONGEST)
    losses: list[float] = []

    def emit(kind: type, **fields: Any) -> None:
        if kind.__name__ == "StepDone":
            losses.append(fields["loss"])

    class InOrder(StepBatches):
        def rows_of(self, step: int) -> list[Example]:
            clock.start()
            return rows[(step - 1) * work.rows_per_step : step * work.rows_per_step]

    def after(progress: TrainState) -> bool:
        clock.stop()
        return False

    loop = LoopParts(
        step_model=step_model,
        optimizer=optimizer,
        scaler=precision.scaler(),
        batches=InOrder(rows, batcher, rows_per_step=work.rows_per_step, seed=0),
        device=work.place,
        memory=MemoryWatch(emit, work.place),
        emit=emit,
    )
    with counted.above(model) if counted else nullcontext():
        train(loop, section, work.steps, TrainState(step=0, tokens=0, seconds=0.0, scaler={}), after)
    return losses


def unsloth_model(work: Work) -> tuple[Any, Any, list[Example]]:
    """Return what `model_and_rows` does, made by Unsloth; from its documented interface, not yet run on a card.

    Raises:
        ImportError: It is not installed.
    """
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base_folder(find_base(work.base))),
        max_seq_length=LONGEST,
        dtype=None,
        load_in_4bit=work.method == "qlora",
    )
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False,
        random_state=17,
    )
    return adapted, tokenizer, rows_of(work, tokenizer)


def run_trainer(work: Work, clock: Clock, counted: TensorBytes | None, *, engine: str) -> list[float]:
    """Train with HF Trainer, with TRL's SFTTrainer, or with HF Trainer on Unsloth's model.

    Raises:
        ImportError: The engine is not installed.
    """
    kind: Any = Trainer
    arguments: Any = TrainingArguments
    trl = engine == "trl"
    if trl:
        from trl import SFTConfig, SFTTrainer

        kind, arguments = SFTTrainer, SFTConfig
    model, tokenizer, rows = unsloth_model(work) if engine == "unsloth" else model_and_rows(work)
    table = Dataset.from_list([{"input_ids": list(r.input_ids), "labels": list(r.labels)} for r in rows])

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.stop()

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(table)

    half = choose_precision("auto", work.place).name
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(
            output_dir=folder,
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=work.accumulation,
            gradient_checkpointing=False,
            max_steps=work.steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=half == "bf16",
            fp16=half == "fp16",
            use_cpu=work.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            optim="adamw_torch",
            **({"max_length": LONGEST} if trl else {}),
        )
        extra = {"processing_class": tokenizer} if trl else {}
        extra |= {} if trl else {"data_collator": DataCollatorForSeq2Seq(tokenizer, padding=True)}
        trainer = InOrder(model=model, args=settings, train_dataset=table, callbacks=[Timer()], **extra)
        with counted.above(model) if counted else nullcontext():
            trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(engine: str, words: str) -> None:
    work, clock = Work(**json.loads(words)), Clock()
    counted = TensorBytes(work.place) if work.memory else None
    try:
        if engine == "studio":
            losses = run_studio(work, clock, counted)
        else:
            losses = run_trainer(work, clock, counted, engine=engine)
    except ImportError as error:
        print("RESULT " + json.dumps({"engine": engine, "missing": str(error)}))
        return
    report = {
        "engine": engine,
        **asdict(work),
        "wall_seconds": clock.wall,
        "processor_seconds": clock.processor,
        "peak_tensor_bytes": counted.peak if counted else None,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses,
        "step_tokens": step_tokens(work),
    }
    print("RESULT " + json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:3])
