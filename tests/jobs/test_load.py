"""Loading bases: the right formats, frozen, in 4 bits where asked, and every refusal in words."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from studio.core.errors import BadInput
from studio.jobs.base.load import FourBit, base_folder, four_bit_parameters, load_base
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.base.weights.dequantized import quantised_parameters
from studio.jobs.base.weights.skeleton import build_clean
from studio.probe.models import find_base
from tests.fakes.hub import hub

CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model in a folder that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def load(
    folder: Path | str, method: str = "lora", dtype: torch.dtype = torch.bfloat16, **quant: object
) -> torch.nn.Module:
    return load_base(
        find_base(str(folder)),
        method=method,  # type: ignore[arg-type]
        dtype=dtype,
        quant=FourBit(**quant),  # type: ignore[arg-type]
        attention="sdpa",
        device=CPU,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lora_holds_every_weight_in_the_format_asked_for_and_frozen(tiny: Path, dtype: torch.dtype) -> None:
    model = load(tiny, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert four_bit_parameters(model) == 0


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_qlora_holds_the_linear_layers_in_4_bits(tiny: Path, quant_type: str, double_quant: bool) -> None:
    model = load(tiny, "qlora", quant_type=quant_type, double_quant=double_quant)
    quantised = {name: p for name, p in model.named_parameters() if isinstance(p, Params4bit)}
    assert len(quantised) == 2 * 7
    assert all(p.quant_state.quant_type == quant_type for p in quantised.values())
    assert all(p.quant_state.nested == double_quant for p in quantised.values())
    others = {name: p.dtype for name, p in model.named_parameters() if name not in quantised}
    assert set(others.values()) == {torch.bfloat16}, "embeddings, head and norms are not cast up"
    assert "lm_head.weight" in others
    assert four_bit_parameters(model) == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_tokenizer_comes_with_its_template(tiny: Path) -> None:
    assert load_tokenizer(tiny).chat_template


def refusal(folder: Path, method: str = "lora") -> str:
    with pytest.raises(BadInput) as caught:
        load(folder, method)
    return str(caught.value)


def config_with(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_are_missing_would_be_random_and_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights, such as model.layers.1.mlp.up_proj.weight: they would be random" in refusal(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    config_with(copy, intermediate_size=256)
    message = refusal(copy)
    assert "cannot be loaded" in message or "would be random" in message


def test_an_unknown_architecture_says_to_update(copy: Path) -> None:
    config_with(copy, model_type="llama9", architectures=["Llama9ForCausalLM"])
    assert "does not know: update it (pip install -U transformers)" in refusal(copy)


def test_a_model_that_does_not_continue_text_is_refused(copy: Path) -> None:
    config_with(copy, model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "is not a causal language model" in refusal(copy)


def test_code_in_the_folder_is_not_run(copy: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (copy / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Model: pass\nclass Config: pass\n"
    )
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config_with(copy, model_type="evil", auto_map=auto_map)
    message = refusal(copy)
    assert "run only where model.trust_remote_code is true" in message
    assert not ran.exists()


@pytest.mark.parametrize(
    ("how", "method", "wanted"),
    [
        ("gptq", "lora", "the original 16-bit model"),
        ("gptq", "qlora", "the original 16-bit model"),
        ("bitsandbytes", "lora", "or take method qlora"),
    ],
)
def test_weights_that_are_quantised_already(copy: Path, how: str, method: str, wanted: str) -> None:
    config_with(copy, quantization_config={"quant_method": how, "load_in_4bit": how == "bitsandbytes", "bits": 4})
    message = refusal(copy, method)
    assert f"already quantised ({how}, 4 bit)" in message
    assert wanted in message


def test_a_model_saved_in_8_bits_is_loaded_as_it_is(tiny: Path, tmp_path: Path) -> None:
    """To talk to it: training refuses it before it loads anything."""
    made: Any = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    made.save_pretrained(tmp_path / "eight")
    load_tokenizer(tiny).save_pretrained(tmp_path / "eight")
    model: Any = load(tmp_path / "eight", "qlora")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits.argmax(-1), made(input_ids=ids).logits.argmax(-1))


def test_a_base_saved_in_4_bits_is_taken_as_it_is_by_qlora(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny, "qlora", quant_type="fp4")
    folder = tmp_path / "four"
    model.save_pretrained(folder)  # type: ignore[operator]
    load_tokenizer(tiny).save_pretrained(folder)
    again = load(folder, "qlora", quant_type="nf4")
    assert four_bit_parameters(again) == four_bit_parameters(model)
    state = again.model.layers[0].mlp.up_proj.weight.quant_state  # type: ignore[union-attr, index]
    assert state.quant_type == "fp4", "its own quantisation, not ours on top"


def test_a_broken_tokenizer_is_one_message(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"The tokenizer of .* cannot be loaded"):
        load_tokenizer(copy)


def test_running_out_of_memory_is_passed_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(tiny)


HUB_CHILD = """
import torch
from studio.jobs.base.load import FourBit, base_folder, load_base
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.base.weights.skeleton import build_clean
from studio.probe.models import find_base
for turn in range(2):
    base, told = find_base("owner/tiny"), []
    assert base.kind == "hub", base
    tokenizer = load_tokenizer(base_folder(base, lambda stage, fraction: told.append(stage)))
    options = {"attention": "sdpa", "device": torch.device("cpu"), "quant": FourBit()}
    model = load_base(base, method="lora", dtype=torch.float32, **options).eval()
    logits = model(tokenizer("one two", return_tensors="pt").input_ids).logits
    print(logits.double().abs().sum().item(), len({stage for stage in told if "downloading" in stage}))
"""


@pytest.mark.slow
def test_a_hub_id_is_downloaded_once_and_loads_from_the_cache_afterwards(tiny: Path, tmp_path: Path) -> None:
    with hub("owner/tiny", tiny) as (endpoint, asked):
        settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", HUB_CHILD]
        environment = os.environ | settings
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, downloads), (second, again) = (line.split() for line in done.stdout.splitlines())
    model = load(tiny, dtype=torch.float32).eval()
    logits = model(load_tokenizer(tiny)("one two", return_tensors="pt").input_ids).logits
    assert float(first) == pytest.approx(float(logits.double().abs().sum()), rel=1e-5)
    assert (downloads, second, again) == ("1", first, "0")
    assert sum("GET" in request and "model.safetensors" in request for request in asked) == 1


def test_a_folder_needs_no_progress_and_no_network(tiny: Path) -> None:
    assert base_folder(find_base(str(tiny))) == tiny


def test_modules_that_the_recipe_keeps_stay_in_16_bit(tiny: Path) -> None:
    kept = (("model.layers.1", "16bit"), ("layers.0.mlp.up_proj", "16bit"))
    whole, model = (load(tiny, "qlora", precision=precision) for precision in ((), kept))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.layers.1.self_attn.q_proj"] == "Linear"
    assert kinds["model.layers.0.mlp.up_proj"] == "Linear"
    assert kinds["model.layers.0.mlp.down_proj"] == "Linear4bit"
    assert kinds["lm_head"] == "Linear"
    skipped = {f"{name}.weight" for name, kind in kinds.items() if kind == "Linear4bit"}
    assert quantised_parameters(build_clean(tiny), kept) == skipped
    assert four_bit_parameters(model) < four_bit_parameters(whole)


@pytest.mark.parametrize(
    "says", ["CUDA error: no kernel image is available for execution on the device", "CUDA error: GPU is lost"]
)
def test_a_card_that_fails_while_a_model_is_loaded_is_not_blamed_on_the_model(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    def fails(*given: object, **named: object) -> None:
        raise RuntimeError(says)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fails)
    with pytest.raises(RuntimeError, match="CUDA error"):
        load(tiny, "lora")
