"""Which layers a base holds in which bits: names, what is refused before anything is loaded, and what follows."""

from dataclasses import replace

import pytest

from studio.core.errors import BadInput
from studio.core.layer_precision import Table, layers_held_in, precision_at
from studio.core.placement.fidelity import Effects, LayerEffect, more_bits, proposals, steps_of, table_of
from studio.core.quantised_base import QuantisedBase
from studio.core.recipe import Recipe
from studio.core.recipe_parse import recipe_from_dict
from studio.core.shape import ModelShape
from studio.core.step_work import step_work
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.precision_check import check_precision
from studio.core.vram.setup import Setup
from tests.core.published_rows import shapes

LLAMA = shapes()["Llama-3.2-1B"]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("model.layers.3.self_attn.q_proj", "16bit"),
        ("model.language_model.layers.3.self_attn.q_proj", "16bit"),
        ("transformer.h.3.attn.c_attn", "16bit"),
        ("model.layers.30.self_attn.q_proj", "nf4"),
        ("model.layers.30.mlp.down_proj", "int8"),
        ("model.layers.2.mlp.down_proj", "nf4"),
        ("model.layers.9.mlp.experts.3.up_proj", "nf4"),
        ("lm_head", "nf4"),
    ],
)
def test_the_first_name_that_fits_counts(path: str, word: str) -> None:
    table = (("layers.2.mlp", "nf4"), ("layers.0-3", "16bit"), ("down_proj", "int8"))
    assert precision_at(table, path) == word


def test_neighbours_are_written_as_a_range() -> None:
    assert layers_held_in("int8", [7, 1, 0, 2, 9]) == (
        ("layers.0-2", "int8"),
        ("layers.7", "int8"),
        ("layers.9", "int8"),
    )


@pytest.mark.parametrize(
    ("model", "table", "says"),
    [
        ("Llama-3.2-1B", (("layers.99", "16bit"),), r"16 layers, numbered from 0 to 15"),
        ("Llama-3.2-1B", (("w2", "int8"),), r"a llama model does not have.*gate_proj"),
        ("Llama-3.2-1B", (("lm_head", "int8"),), r"always stays in 16 bit"),
        ("Mixtral-8x7B", (("mlp", "int8"),), r"routed experts in int8\. .*put experts=nf4"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_it_is_loaded(model: str, table: Table, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        check_precision(shapes()[model], Setup(precision=table))
    check_precision(shapes()[model], Setup(method="lora", precision=table))


def test_what_models_have_is_not_refused() -> None:
    kept: Table = (("lm_head", "16bit"), ("visual", "16bit"), ("layers.0-3.self_attn", "int8"), ("up_proj", "nf4"))
    for shape in shapes().values():
        if any(linear.name == "up_proj" for _, linear in shape.all_linears()):
            check_precision(shape, Setup(precision=kept))
    check_precision(shapes()["Mixtral-8x7B"], Setup(precision=(("experts", "nf4"), ("*", "int8"))))


def test_a_prequantised_base_is_planned_as_it_lies_and_asked_for_nothing_else() -> None:
    laid = QuantisedBase("bitsandbytes", 4, "nf4", double_quant=True, skipped=("model.layers.1", "lm_head"))
    base = replace(LLAMA, quantised=laid)
    agrees, not_so = Setup(precision=(("layers.1", "16bit"),)), Setup(precision=(("layers.1-2", "16bit"),))
    check_precision(base, agrees)
    with pytest.raises(BadInput, match=r"layers\.2\.\S+ in 16bit, but the base's files hold it in 4 bits already"):
        check_precision(base, not_so)
    assert estimate_vram(base, not_so) == estimate_vram(base, agrees)


@pytest.mark.parametrize(
    ("changes", "path", "allowed"),
    [
        ({"model": {"precision": {"mlp": "int8"}, "stream": 2}}, "model.stream", "not streamed yet"),
        ({"model": {"precision": {"mlp": "int8"}, "stream": "auto"}}, "model.stream", "not streamed yet"),
        ({"model": {"precision": {"mlp": "int8"}}, "train": {"compile": True}}, "train.compile", "not compiled yet"),
        ({"model": {"precision": {"mlp": "nf4"}, "quant_type": "fp4"}}, "model.precision", "one 4-bit type"),
        ({"model": {"skip_modules": ["lm_head"]}}, "model.skip_modules", "model.precision, a table"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, object], path: str, allowed: str) -> None:
    with pytest.raises(BadInput, match=rf"{path}: .*{allowed}"):
        recipe_from_dict({"method": "qlora", **changes})
    if path != "model.skip_modules":
        assert recipe_from_dict({"method": "lora", **changes}).model.precision


def test_only_what_is_rounded_is_dequantised_in_a_step() -> None:
    def moved(**fields: object) -> float:
        return step_work(LLAMA, Setup(seq_len=2048, **fields)).dequantised_bytes  # type: ignore[arg-type]

    assert moved(precision=(("*", "16bit"),)) == moved(method="lora") == 0
    assert moved(precision=layers_held_in("16bit", range(8))) == pytest.approx(moved() / 2)
    assert moved(precision=(("*", "int8"),)) == pytest.approx(moved() * 3 / 2.5)


def test_the_steps_buy_the_most_for_a_byte_first_and_cost_what_the_estimate_says() -> None:
    shape: ModelShape = LLAMA
    effects = Effects(tuple(LayerEffect(n, (3 if n == 5 else 1) / 18, 0.005) for n in range(16)), "here")
    steps = more_bits(shape, Setup(), effects)
    assert (steps[0].number, steps[0].precision) == (5, "int8")
    assert [step.worth for step in steps] == sorted((step.worth for step in steps), reverse=True)
    assert sum(step.buys for step in steps) == pytest.approx(1)
    assert {step.precision for step in steps[:16]} == {"int8"}
    for count in (1, 7, 20, len(steps)):
        held = estimate_vram(shape, Setup(precision=table_of(steps[:count]))).components.base
        more = held - estimate_vram(shape, Setup()).components.base
        assert more == sum(step.bytes for step in steps[:count])
    best = proposals(steps)
    assert best[0].extra_bytes < best[-1].extra_bytes
    assert best[-1].precision == (("layers.0-15", "int8"),)
    costs = {"int8": 100, "16bit": 300}
    alone = steps_of(effects, lambda number, word: costs[word], int8=False)
    assert {step.precision for step in alone} == {"16bit"}


def test_bits_alone_count_where_nothing_was_measured() -> None:
    steps = more_bits(LLAMA, Setup(), None)
    assert table_of(steps[:16]) == (("layers.0-15", "int8"),)
    assert table_of(steps) == (("layers.0-15", "16bit"),)
    assert Recipe().with_("model.precision", dict(table_of(steps))).problems() == ()
