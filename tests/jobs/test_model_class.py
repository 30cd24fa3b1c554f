"""Which class a checkpoint is built as, and where the language model lies in it."""

from typing import Any

import pytest
import torch
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from studio.core.errors import BadInput
from studio.jobs.base.model_class import ModelClass, empty_model, from_config, model_class, odd_linears
from tests.fakes.families import FAMILIES, config_of


def picked(family: str, architecture: str | None) -> ModelClass:
    return model_class(CONFIG_MAPPING[family](architectures=[architecture] if architecture else None))


@pytest.mark.parametrize(
    ("family", "architecture", "decoder", "unused"),
    [
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", "model.language_model", {"model.visual"}),
        (
            "mistral3",
            "Mistral3ForConditionalGeneration",
            "model.language_model",
            {"model.vision_tower", "model.multi_modal_projector"},
        ),
        # The text passes through the embeddings of images and sound, but not through the towers; timm is not wanted.
        (
            "gemma3n",
            "Gemma3nForConditionalGeneration",
            "model.language_model",
            {"model.vision_tower", "model.audio_tower"},
        ),
        ("llama4", "Llama4ForConditionalGeneration", "language_model", {"vision_model", "multi_modal_projector"}),
    ],
)
def test_the_named_class_and_its_decoder(family: str, architecture: str, decoder: str, unused: set[str]) -> None:
    found = picked(family, architecture)
    assert (found.kind.__name__, found.decoder, set(found.unused)) == (architecture, decoder, unused)
    with torch.device("meta"), no_init_weights():
        model: Any = from_config(found.text_kind(), found.config, dtype=torch.float32)
    assert isinstance(model, found.kind)
    assert type(model).__name__ == architecture
    parameters = [name for name, _ in model.named_parameters()]
    # The rest has the names that it has in the original, and no weight of an unused tower is there.
    assert not [name for name in parameters if name.startswith(tuple(f"{tower}." for tower in found.unused))]
    assert found.speaks(f"{decoder}.x")
    assert found.speaks(found.head)
    assert found.head in dict(model.named_modules())
    assert not any(found.speaks(tower) for tower in found.towers)


def test_no_text_reaches_the_towers_of_gemma_4() -> None:
    config = config_of("gemma4")
    config.architectures = [FAMILIES["gemma4"].architecture]
    found = model_class(config)
    assert found.unused == found.towers != ()


@pytest.mark.parametrize(
    ("family", "architecture", "kind", "config"),
    [
        ("llama", "LlamaForCausalLM", "LlamaForCausalLM", "LlamaConfig"),
        ("llama", None, "LlamaForCausalLM", "LlamaConfig"),
        ("llama", "LlamaModel", "LlamaForCausalLM", "LlamaConfig"),
        ("llama", "LlamaForSequenceClassification", "LlamaForCausalLM", "LlamaConfig"),
        ("qwen3_5", None, "Qwen3_5ForConditionalGeneration", "Qwen3_5Config"),
        ("qwen3_5", "Qwen3_5ForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig"),
        ("gemma3", "Gemma3ForCausalLM", "Gemma3ForCausalLM", "Gemma3TextConfig"),
    ],
)
def test_other_words_in_architectures(family: str, architecture: str | None, kind: str, config: str) -> None:
    found = picked(family, architecture)
    assert (found.kind.__name__, type(found.config).__name__) == (kind, config)
    if "Conditional" not in kind:
        assert found == ModelClass(found.kind, found.config)
        assert found.text_kind() is found.kind
        assert found.speaks("anything")


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("t5", "T5ForConditionalGeneration"), ("whisper", "WhisperForConditionalGeneration"), ("clip", "CLIPModel")],
)
def test_what_does_not_continue_text_is_refused(family: str, architecture: str) -> None:
    with pytest.raises(BadInput, match="is not a causal language model"):
        picked(family, architecture)


@pytest.mark.parametrize(
    ("family", "odd"), [("falcon", None), ("llama4", "feed_forward.router"), ("phimoe", "mlp.router")]
)
def test_linear_layers_that_are_more_than_a_product(family: str, odd: str | None) -> None:
    """Falcon has a subclass that multiplies as any other; the routers return pairs."""
    config = config_of(family)
    config.architectures = [FAMILIES[family].architecture]
    found = odd_linears(empty_model(model_class(config)))
    assert bool(found) == bool(odd)
    assert all(name.endswith(str(odd)) for name in found)


def test_a_class_that_does_not_say_where_its_language_model_is_is_refused() -> None:
    with pytest.raises(BadInput, match="does not say which part of it is its language model"):
        picked("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration")
