"""What the estimate says of 8-bit weights under checkpointing, seen in bitsandbytes itself."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

TOKENS = 96


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_iter(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return out


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def kept(tiny: Path, *, bits: int, reentrant: bool) -> tuple[int, Any]:
    """Return the bytes that are alive after a checkpointed forward, and the model's config."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    quantised = four if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    base: Any = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).train()
    ids = torch.randint(0, 20, (1, TOKENS))
    with Alive() as alive:
        out = model(input_ids=ids, labels=ids)
    assert out.loss.requires_grad
    return sum(alive.sizes.values()), model.config


def test_inputs_of_eight_bit_products_stay_under_newer_checkpoints(tiny: Path) -> None:
    old, new = (kept(tiny, bits=8, reentrant=reentrant)[0] for reentrant in (True, False))
    config = kept(tiny, bits=8, reentrant=True)[1]
    a_token = 4 * (3 * config.hidden_size + config.intermediate_size)  # fp32 after peft's upcast, without autocast
    assert new - old == pytest.approx(config.num_hidden_layers * TOKENS * a_token, rel=0.03)


def test_four_bit_products_leave_their_inputs_to_the_checkpoint(tiny: Path) -> None:
    old, new = (kept(tiny, bits=4, reentrant=reentrant)[0] for reentrant in (True, False))
    assert new == pytest.approx(old, rel=0.03)
