"""Device names as drivers print them, against the dense bf16 rate with fp32 accumulation."""

import pytest

from homelab_scaling.errors import SpecError
from homelab_scaling.plan.peaks import CARDS, box_with, find_card, peak_bf16_flops, why_no_peak


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 4080 SUPER", 104.4),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 4070 Ti", 80.2),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("rtx4080", 97.5),
    ],
)
def test_the_longest_matching_name_wins(device: str, tflops: float) -> None:
    assert peak_bf16_flops(device) == tflops * 1e12


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("NVIDIA GeForce RTX 4080 Laptop GPU", "not in the table"),
        ("NVIDIA GeForce RTX 5090 D", "not in the table"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "not in the table"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "not in the table"),
        ("Quadro RTX 6000", "not in the table"),
        ("Radeon RX 7900 XTX", "not in the table"),
        ("Tesla T4", "no bf16 tensor cores"),
        ("Tesla V100-SXM2-32GB", "no bf16 tensor cores"),
        ("cpu (AMD EPYC, 2 threads)", "a CPU has no tabled peak"),
    ],
)
def test_unknown_is_none_with_a_reason(device: str, why: str) -> None:
    assert peak_bf16_flops(device) is None
    assert why in why_no_peak(device)


def test_the_4080_follows_from_the_4090_by_cores_and_clock() -> None:
    derived = 165.2 * (304 / 512) * (2505 / 2520)
    assert peak_bf16_flops("RTX 4080") == pytest.approx(derived * 1e12, rel=1e-3)


def test_every_row_finds_itself() -> None:
    assert len(CARDS) > 50
    assert [card.name for card in CARDS if find_card(card.name) is not card] == []


def test_a_machine_that_is_not_here() -> None:
    box = box_with("RTX 4080", 2)
    assert (box.n_gpus, box.vram_bytes, box.computes_bf16) == (2, 16 * 2**30, True)
    assert not box_with("Tesla T4", 1).computes_bf16
    with pytest.raises(SpecError, match="did you mean 'RTX 4080'"):
        box_with("4080", 1)
    with pytest.raises(SpecError, match="wants 1 or more"):
        box_with("RTX 4080", 0)
