"""Cards are found by whatever people call them."""

import pytest

from studio.core.errors import BadInput
from studio.core.gpu_catalogue import CATALOGUE, GIB, MIB, card_of_size, find_gpu


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("T4", "Tesla T4"),
        ("Tesla T4 16GB", "Tesla T4"),
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("a100-80gb", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("A100-SXM4-80G", "A100 80GB"),
        ("A100 80 GiB", "A100 80GB"),
        ("H100", "H100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("A10G 24GB", "A10G"),
        ("4060 ti 16gb", "RTX 4060 Ti 16GB"),
        ("RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
    ],
)
def test_find(said: str, name: str):
    assert find_gpu(said).name == name


def test_every_card_is_found_by_its_own_name():
    assert all(find_gpu(name) is gpu for name, gpu in CATALOGUE.items())


def test_a_name_of_several_sizes_means_the_smallest():
    assert find_gpu("A100").name == "A100 40GB"
    assert find_gpu("V100").total_bytes == 16384 * MIB
    assert find_gpu("RTX 3080").total_bytes == 10240 * MIB


@pytest.mark.parametrize("said", ["", "   ", "RTX 9999", "24gb", "nvidia geforce", "\x1b[31m4090x", "💥"])
def test_an_unknown_card_is_refused_with_a_way_out(said: str):
    with pytest.raises(BadInput, match="--vram-gib") as caught:
        find_gpu(said)
    assert "\x1b" not in str(caught.value)


def test_the_table_is_plausible():
    assert len(CATALOGUE) >= 60
    assert {gpu.kind for gpu in CATALOGUE.values()} == {"consumer", "laptop", "workstation", "data-centre"}
    for gpu in CATALOGUE.values():
        assert 4 * GIB < gpu.total_bytes < 200 * GIB
        assert 100 < gpu.bandwidth_gb_per_second < 10_000
        assert gpu.bf16 == (gpu.compute_capability[0] >= 8)
        assert 4 < gpu.single_tflops <= gpu.half_tflops < 3000
        if gpu.kind in ("consumer", "laptop") and gpu.bf16:
            assert gpu.half_tflops == pytest.approx(2 * gpu.single_tflops, rel=0.02), "fp32 sums run at half rate"
        elif gpu.kind == "workstation" and gpu.bf16:
            assert gpu.half_tflops == pytest.approx(4 * gpu.single_tflops, rel=0.02)


def test_a_card_of_a_size():
    assert card_of_size(11.5).total_bytes == int(11.5 * GIB)
