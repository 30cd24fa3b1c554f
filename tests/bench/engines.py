"""One engine, one process: trains a few steps on the embedded model, prints step times and peak resident set as JSON.

`python -m tests.bench.engines studio|hf lora|qlora STEPS`. Both get the same rows in the same order, the same
micro-batches, adapter, learning rate and arithmetic (bf16 where the processor has it). Run by bench_train.
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from studio.core.recipe import AdapterSection, TrainSection
from studio.jobs.base.load import FourBit, base_folder, load_base, load_tokenizer
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.batches import Batcher, StepBatches
from studio.jobs.train.checkpoint import Progress
from studio.jobs.train.choose_batching import can_pack
from studio.jobs.train.loop import Hooks, LoopParts, train
from studio.jobs.train.memory import MemoryWatch
from studio.jobs.train.optimizer import build_optimizer
from studio.jobs.train.precision import choose_precision
from studio.jobs.train.rows import Example, encode_rows
from studio.jobs.train.step_model import StepModel
from studio.probe.data import read_data
from studio.probe.models import find_base

MICRO_BATCH = 8
CPU = torch.device("cpu")
WARM_UP_STEPS = 2


def parts(method: str, rows: int) -> tuple[PeftModel, Any, list[Example]]:
    base = find_base("embedded")
    tokenizer = load_tokenizer(base_folder(base))
    precision = choose_precision("auto", CPU)
    torch.manual_seed(17)
    frozen = load_base(
        base,
        method=method,  # type: ignore[arg-type]
        dtype=precision.dtype,
        quant=FourBit(),
        attention="sdpa",
        device=CPU,
    )
    model = attach_adapter(frozen, AdapterSection(rank=16, alpha=32.0), grad_checkpointing=False)
    data = read_data(Path("embedded"))
    encoded, _ = encode_rows(list(data.rows)[:rows], tokenizer, seq_len=256, answers_only=True, warn=lambda text: None)
    return model, tokenizer, list(encoded)


def run_studio(method: str, steps: int, *, packed: bool = True) -> tuple[list[float], list[float]]:
    model, tokenizer, rows = parts(method, steps * MICRO_BATCH)
    section = TrainSection(
        micro_batch=MICRO_BATCH, accumulation=1, learning_rate=2e-4, schedule="constant", warmup_fraction=0
    )
    optimizer = build_optimizer(
        model.named_parameters(), kind="adamw_torch", learning_rate=2e-4, weight_decay=0.0, device=CPU, warn=print
    )
    precision = choose_precision("auto", CPU)
    step_model = StepModel(model, "chunked", precision.autocast)
    batcher = Batcher(MICRO_BATCH, tokenizer.pad_token_id, CPU)
    if packed and can_pack(step_model, rows, CPU):
        batcher = replace(batcher, packed_tokens=MICRO_BATCH * max(len(row.input_ids) for row in rows))
    losses: list[float] = []
    seconds: list[float] = []

    def emit(kind: type, **fields: Any) -> None:
        if kind.__name__ == "StepDone":
            losses.append(fields["loss"])

    class InOrder(StepBatches):
        def rows_of(self, step: int) -> list[Example]:
            return rows[(step - 1) * MICRO_BATCH : step * MICRO_BATCH]

    began = [time.perf_counter()]

    def after(progress: Progress) -> bool:
        seconds.append(time.perf_counter() - began[0])
        began[0] = time.perf_counter()
        return False

    loop = LoopParts(
        step_model=step_model,
        optimizer=optimizer,
        scaler=precision.scaler(),
        batches=InOrder(rows, batcher, rows_per_step=MICRO_BATCH, seed=0),
        device=CPU,
        memory=MemoryWatch(emit, CPU),
        emit=emit,
    )
    train(loop, section, steps, Progress(step=0, tokens=0, seconds=0.0, scaler={}), Hooks(after))
    return losses, seconds


def run_hf(method: str, steps: int) -> tuple[list[float], list[float]]:
    model, tokenizer, rows = parts(method, steps * MICRO_BATCH)
    table = Dataset.from_list([{"input_ids": list(r.input_ids), "labels": list(r.labels)} for r in rows])
    precision = choose_precision("auto", CPU)
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(table)

    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=MICRO_BATCH,
                max_steps=steps,
                learning_rate=2e-4,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                bf16=precision.name == "bf16",
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                optim="adamw_torch",
            ),
            train_dataset=table,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[Clock()],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, seconds


def main() -> None:
    engine, method, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    losses, seconds = (run_studio if engine == "studio" else run_hf)(method, steps)
    report = {
        "engine": engine,
        "method": method,
        "seconds_per_step": statistics.median(seconds[WARM_UP_STEPS:]),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses,
    }
    print("RESULT " + json.dumps(report))


if __name__ == "__main__":
    main()
