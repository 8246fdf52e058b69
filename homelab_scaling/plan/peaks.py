"""What a card can do at most: dense bf16 FLOP/s with fp32 accumulation, memory and rated power, by name.

GeForce cards run tensor cores with fp32 accumulation at half the advertised "tensor" rate; the advertised rate also
counts sparsity. This table is the dense fp32-accumulate rate, the only one that training can approach.

Source: NVIDIA's Ampere, Ada, Hopper and Blackwell white papers and data sheets; other cards of a generation by tensor
cores x boost clock (llm.c's mfu.h does the same: RTX 4080 = 165.2 * 304/512 * 2505/2520 = 97.5).
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """One model of card."""

    name: str
    bf16_tflops: float | None
    """None where the card has no bf16 tensor cores."""
    vram_gib: int
    board_watts: int
    """The maker's rated board power."""


def _cards(rows: str) -> tuple[CardFacts, ...]:
    found = []
    for line in rows.strip().splitlines():
        name, tflops, gib, watts = (cell.strip() for cell in line.split("|"))
        peak = None if tflops == "-" else float(tflops)
        found.append(CardFacts(name=name, bf16_tflops=peak, vram_gib=int(gib), board_watts=int(watts)))
    return tuple(found)


# name | dense bf16 TFLOP/s, fp32 accumulate (- = no bf16 tensor cores) | GiB | rated W
CARDS = _cards("""
    RTX 5090               | 209.5 |  32 |  575
    RTX 5080               | 112.6 |  16 |  360
    RTX 5070 Ti            |  87.9 |  16 |  300
    RTX 5070               |  61.7 |  12 |  250
    RTX 5060 Ti            |  47.4 |  16 |  180
    RTX 5060               |  38.4 |   8 |  145
    RTX 4090               | 165.2 |  24 |  450
    RTX 4080 SUPER         | 104.4 |  16 |  320
    RTX 4080               |  97.5 |  16 |  320
    RTX 4070 Ti SUPER      |  88.2 |  16 |  285
    RTX 4070 Ti            |  80.2 |  12 |  285
    RTX 4070 SUPER         |  71.0 |  12 |  220
    RTX 4070               |  58.3 |  12 |  200
    RTX 4060 Ti            |  44.1 |   8 |  160
    RTX 4060               |  30.2 |   8 |  115
    RTX 3090 Ti            |  80.0 |  24 |  450
    RTX 3090               |  71.0 |  24 |  350
    RTX 3080 Ti            |  68.2 |  12 |  350
    RTX 3080 12GB          |  61.3 |  12 |  350
    RTX 3080               |  59.5 |  10 |  320
    RTX 3070 Ti            |  43.5 |   8 |  290
    RTX 3070               |  40.6 |   8 |  220
    RTX 3060 Ti            |  32.4 |   8 |  200
    RTX 3060               |  25.5 |  12 |  170
    RTX 3050               |  18.2 |   8 |  130
    RTX PRO 6000           | 503.8 |  96 |  600
    RTX 6000 Ada           | 364.2 |  48 |  300
    RTX 5000 Ada           | 261.1 |  32 |  250
    RTX 4500 Ada           | 158.5 |  24 |  210
    RTX 4000 Ada           | 106.9 |  20 |  130
    RTX 2000 Ada           |  48.0 |  16 |   70
    RTX A6000              | 154.8 |  48 |  300
    RTX A5500              | 136.4 |  24 |  230
    RTX A5000              | 111.1 |  24 |  230
    RTX A4500              |  94.6 |  20 |  200
    RTX A4000              |  76.7 |  16 |  140
    RTX A2000              |  31.9 |   6 |   70
    GH200                  | 989.4 |  96 |  700
    H200 NVL               | 835.5 | 141 |  600
    H200                   | 989.4 | 141 |  700
    H100 NVL               | 835.5 |  94 |  400
    H100 PCIe              | 756.0 |  80 |  350
    H100                   | 989.4 |  80 |  700
    A100 80GB              | 312.0 |  80 |  400
    A100                   | 312.0 |  40 |  400
    A40                    | 149.7 |  48 |  300
    A30                    | 165.0 |  24 |  165
    A10G                   |  70.0 |  24 |  300
    A10                    | 125.0 |  24 |  150
    A2                     |  18.0 |  16 |   60
    L40S                   | 362.1 |  48 |  350
    L40                    | 181.1 |  48 |  300
    L4                     | 121.0 |  24 |   72
    T4                     |     - |  16 |   70
    V100                   |     - |  16 |  300
    P100                   |     - |  16 |  250
    TITAN RTX              |     - |  24 |  280
    RTX 2080 Ti            |     - |  11 |  250
    RTX 2080 SUPER         |     - |   8 |  250
    RTX 2080               |     - |   8 |  215
    RTX 2070 SUPER         |     - |   8 |  215
    RTX 2070               |     - |   8 |  175
    RTX 2060               |     - |   6 |  160
    GTX 1080 Ti            |     - |  11 |  250
""")

# A word that makes it another card, with other clocks: never taken for the desktop card of the same number.
OTHER_CARD_WORDS = frozenset({"laptop", "mobile", "max", "ti", "super", "d", "sff", "mig", "nvl", "pcie", "x", "grid"})
HARMLESS = {"A100": {"pcie"}, "A100 80GB": {"pcie"}, "V100": {"pcie"}, "P100": {"pcie"}}


def _words(name: str) -> list[str]:
    """`NVIDIA A100-SXM4-80GB` -> nvidia a100 sxm4 80gb; `rtx4080` -> rtx 4080."""
    return re.findall(r"[a-z0-9]+", re.sub(r"(?i)\b([rg]tx)(?=\d)", r"\1 ", name.lower()))


def find_card(device_name: str) -> CardFacts | None:
    """The table's row for a driver's device name; the longest matching name wins; None where the card is not in it."""
    given = set(_words(device_name))
    matches = [card for card in CARDS if set(_words(card.name)) <= given]
    if not matches:
        return None
    best = max(matches, key=lambda card: (len(_words(card.name)), len(card.name)))
    foreign = (given - set(_words(best.name))) & (OTHER_CARD_WORDS - HARMLESS.get(best.name, set()))
    return None if foreign else best


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a card, fp32 accumulate; None where unknown (`why_no_peak` says why)."""
    card = find_card(device_name)
    return None if card is None or card.bf16_tflops is None else card.bf16_tflops * 1e12


def why_no_peak(device_name: str) -> str:
    """The sentence to store beside a peak, an MFU or a prediction that is None."""
    if device_name.startswith("cpu"):
        return "a CPU has no tabled peak"
    if find_card(device_name) is not None:
        return f"{device_name} has no bf16 tensor cores"
    return f"{device_name} is not in the table of cards (homelab_scaling/plan/peaks.py)"


def box_with(card_name: str, n_gpus: int, *, n_cores: int = 16) -> Box:
    """A machine to plan for that is not here: `n_gpus` cards of a tabled model, with a C compiler.

    Raises:
        SpecError: the table does not have the card, or n_gpus is not positive.
    """
    if n_gpus < 1:
        raise SpecError(f"{n_gpus} cards of {card_name}: wants 1 or more")
    card = find_card(card_name)
    if card is None:
        names = {c.name.lower(): c.name for c in CARDS}
        by_number = next((c.name for c in CARDS if card_name.lower() == _words(c.name)[-1]), None)
        close = [by_number] if by_number else [names[n] for n in get_close_matches(card_name.lower(), names, n=1)]
        hint = f"did you mean {close[0]!r}?" if close else "it knows names such as 'RTX 4080', 'RTX 3090 Ti' and 'A100'"
        raise SpecError(f"card {card_name!r} is not in the table; {hint}")
    return Box(
        device=card_name,
        n_gpus=n_gpus,
        vram_bytes=card.vram_gib * 2**30,
        computes_bf16=card.bf16_tflops is not None,
        n_cores=n_cores,
        has_compiler=True,
    )
