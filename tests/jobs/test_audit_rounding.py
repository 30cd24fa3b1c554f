"""The audit's rounding is bitsandbytes' own to the bit, and its products in parts are the product of the whole."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch.nn.functional import linear

from studio.jobs.audit import forms
from studio.jobs.audit.forms import FORMS, FourBits, Unrounded, four_bits, squared_norms
from studio.jobs.base.load import FourBit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((256, 512), (65, 64), (3, 192), (7, 30), (5, 33), (1, 1))


def theirs(weight: torch.Tensor, name: str) -> torch.Tensor:
    code, _, nested = name.partition("+")
    codes, state = quantize_4bit(weight.float(), quant_type=code, compress_statistics=bool(nested))
    back: torch.Tensor = dequantize_4bit(codes, state)
    return back


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts in a small weight."""
    monkeypatch.setattr(forms, "_WEIGHTS_AT_ONCE", {"cpu": 2**12})
    monkeypatch.setattr(forms, "AT_ONCE", 2**11)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ["nf4", "nf4+dq", "fp4", "fp4+dq"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits_are_the_librarys_to_the_bit(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(shape)).to(dtype)
    weight[0, 0] = 0.0
    layer: Any = FORMS[name].make(weight, None)
    wanted = theirs(weight, name)
    assert torch.equal(layer.rows(0, shape[0]), wanted)
    x = torch.randn(2, 5, shape[1])
    assert torch.allclose(layer(x), linear(x, wanted), rtol=1e-5, atol=1e-6)
    changed, whole = squared_norms(weight, layer)
    assert changed == pytest.approx(float((wanted - weight.float()).double().square().sum()), rel=1e-5, abs=1e-12)
    assert whole == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


@pytest.mark.usefixtures("small_parts")
def test_eight_bits_are_the_librarys_to_the_bit() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(200, 64).bfloat16(), torch.randn(5, 64)
    x[2, 7] = 9.0  # an outlying activation
    theirs = Linear8bitLt(64, 200, bias=False, has_fp16_weights=False, threshold=forms.OUTLIER)
    theirs.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    layer: Any = FORMS["int8"].make(weight, None)
    assert torch.equal(layer.scales, theirs.weight.SCB)
    assert torch.equal(layer.rows(0, 200), theirs.weight.data.float() * (theirs.weight.SCB.unsqueeze(1) / 127))
    assert torch.equal(layer(x), theirs.eval()(x).to(x.dtype))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_quick_way_is_taken_and_equals_the_slow_one_around_every_bound(quant_type: Any) -> None:
    grid = forms._grid(quant_type)
    bounds = grid.bound[grid.bound < 2]
    assert len(bounds) == 15
    steps = [bounds]
    for far in (-2.0, 2.0):
        nearest = bounds
        for _ in range(3):
            nearest = torch.nextafter(nearest, torch.tensor(far))
            steps.append(nearest)
    values = torch.cat([*steps, torch.linspace(-1, 1, 64 * 200 - 15 * 7)]).view(-1, 64).clone()
    for scale in (1.0, 0.37, 3e-39, 1e37):
        part = torch.cat([values[:, :-1], torch.ones(len(values), 1)], 1) * scale
        codes, scales = forms._quick(part.view(-1), quant_type) or pytest.fail("not finite")
        own, state = quantize_4bit(part, quant_type=quant_type)
        assert torch.equal(codes, own) and torch.equal(scales, state.absmax), scale


def test_another_library_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantize_4bit

    def other(weight: torch.Tensor, **more: Any) -> Any:
        codes, state = real(weight, **more)
        return codes.bitwise_xor(1), state

    monkeypatch.setattr(forms, "quantize_4bit", other)
    forms._is_the_same.cache_clear()
    weight = torch.randn(4, 64)
    codes, _ = forms.codes_of(weight, "nf4")
    forms._is_the_same.cache_clear()
    assert torch.equal(codes, other(weight, quant_type="nf4")[0])


def test_weights_that_are_not_finite_do_not_end_it() -> None:
    weight = torch.randn(4, 64)
    weight[1, 3] = torch.nan
    codes, scales = forms.codes_of(weight, "nf4")
    assert codes.shape == (128, 1)
    assert not torch.isfinite(scales[1])


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_in_parts_has_the_bits_of_the_whole(biased: bool) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(512, 128).bfloat16(), torch.randn(3, 17, 128)
    bias = torch.randn(512) if biased else None
    assert torch.equal(Unrounded(weight, bias)(x), linear(x, weight.float(), bias))
    quant = FourBit("nf4", double_quant=False)
    layer = FourBits(weight, bias, quant)
    assert torch.equal(layer(x), linear(x, theirs(weight, "nf4"), bias))
    assert four_bits("nf4", quant).bits == 4.5
