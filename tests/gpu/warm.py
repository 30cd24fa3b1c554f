"""What nearly every check imports: a rehearsal's processes are forked from one that has it, see `processes`."""

import bitsandbytes
import peft
import torch
import transformers

import studio.jobs.audit.job
import studio.jobs.chat.session
import studio.jobs.measure.job
import studio.jobs.train.job
import tests.gpu.child

__all__ = ["bitsandbytes", "peft", "studio", "tests", "torch", "transformers"]
