"""What is refused before a run is made, against what the job itself says when it looks for a class."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from studio.core.errors import BadInput
from studio.jobs.base.model_class import model_class
from studio.probe import architecture
from studio.probe.architecture import class_of, installed_architectures, untrainable_architecture
from studio.probe.models import BaseFound, refuse_untrainable
from studio.probe.shape import find_shape
from tests.fakes.families import FAMILIES, config_of

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 320,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_family_that_trains_is_refused(name: str) -> None:
    config = {**config_of(name).to_dict(), "architectures": [FAMILIES[name].architecture]}
    assert untrainable_architecture(config) == ""


@pytest.mark.parametrize(
    ("kind", "architecture", "more"),
    [
        ("t5", "T5ForConditionalGeneration", {"is_encoder_decoder": True}),
        ("modernbert", "ModernBertForMaskedLM", {}),
        ("nomic_bert", "NomicBertModel", {}),
        ("vit", "ViTModel", {}),
    ],
)
def test_what_the_job_refuses_is_refused_before_it(kind: str, architecture: str, more: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, **({} if kind in ("t5", "vit") else SIZES))
    config.architectures = [architecture]
    with pytest.raises(BadInput, match="causal language model"):
        model_class(config)
    why = untrainable_architecture({"model_type": kind, "architectures": [architecture], **more})
    assert kind in why
    base = BaseFound("folder", "m", None, {"model_type": kind, "architectures": [architecture], **more}, 0)
    with pytest.raises(BadInput, match=kind):
        refuse_untrainable(base, "lora")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "fills gaps"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "embedding model"),
        ({"model_type": "next_year"}, "does not know"),
        ({"model_type": "next_year", "auto_map": {"AutoModelForCausalLM": "m.M"}}, ""),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, ""),
        ({"model_type": "llama"}, ""),
        ({"model_type": None}, ""),
        ({"model_type": "llama", "architectures": [7, None], "text_config": "x"}, ""),
    ],
)
def test_reasons(config: dict[str, Any], found: str) -> None:
    why = untrainable_architecture(config)
    assert found in why if found else not why


def test_a_plan_says_what_a_training_refuses(tmp_path: Path) -> None:
    config = {**SIZES, "model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shape = find_shape(str(tmp_path / "config.json"))
    assert "fills gaps" in shape.notes[0]
    assert "train refuses it" in shape.notes[0]


def test_the_tables_are_read_without_importing_transformers() -> None:
    known = installed_architectures()
    assert known is not None
    assert {"llama", "mistral3", "qwen3_5"} <= known.speaking <= known.kinds | known.speaking
    code = "from studio.probe import architecture as a; import sys; a.installed_architectures()"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "nemotron_h", "mistral3", "gemma3n", "qwen3_5"])
@pytest.mark.parametrize("named", [True, False])
def test_the_class_is_the_one_that_a_job_builds(name: str, named: bool) -> None:
    config = config_of(name)
    config.architectures = [FAMILIES[name].architecture] if named else None
    found = class_of(config.to_dict())
    assert (found.used, found.known) == (model_class(config).kind.__name__, True)
    assert found.named == (FAMILIES[name].architecture if named else "")


@pytest.mark.parametrize("names", [None, "LlamaForCausalLM", [], [3], {"a": 1}])
def test_odd_names_of_classes_are_passed_over(names: Any) -> None:
    found = class_of({"architectures": names, "model_type": "llama"})
    assert (found.named, found.used) == ("", "LlamaForCausalLM")


def test_of_what_is_not_known_no_class_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = class_of({"architectures": ["New\x1b[31mForCausalLM"], "model_type": "new"})
    assert (found.named, found.used, found.known) == ("New\\x1b[31mForCausalLM", "", False)
    assert class_of({"model_type": "t5", "is_encoder_decoder": True}).used == ""

    class Spec:
        origin = str(tmp_path / "__init__.py")

    for spec in (None, Spec()):
        installed_architectures.cache_clear()
        monkeypatch.setattr(architecture, "find_spec", lambda name, spec=spec: spec)
        found = class_of({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
        assert (found.named, found.used, found.known) == ("LlamaForCausalLM", "", None)
    installed_architectures.cache_clear()
