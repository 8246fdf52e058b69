"""What follows from the facts about the cards: what they are, what they may, and whether they do it."""

from homelab_scaling.doctor.driver import DriverCard, Link
from homelab_scaling.doctor.facts import GIB, Facts
from homelab_scaling.doctor.measure import Matmul
from homelab_scaling.doctor.report import Finding
from homelab_scaling.plan.peaks import peak_bf16_flops, why_no_peak
from homelab_scaling.watch.p2p import claims_untruly

REINSTALL = "run `bash tools/quickstart.sh` or `pip install -c constraints.txt -e .`"
MATMUL_LEAST_SHARE = 0.60
"""Of the tabled peak; large products of a healthy card reach 70 to 100 %."""
NARROW_LANES = 4


def judge_driver(facts: Facts) -> tuple[Finding, ...]:
    """Versions of driver and NVML; nothing where there is neither."""
    driver = facts.driver
    if driver.version is None and driver.nvml_version is None:
        if not facts.cards and not facts.driver_loaded:
            return (Finding(topic="driver", status="ok", found=f"none ({driver.error or 'NVML lists no card'})"),)
        if driver.error is None:
            return ()
        remedy = f"mend what NVML says, or {REINSTALL}"
        return (Finding(topic="driver", status="warn", found=f"NVML does not answer: {driver.error}", remedy=remedy),)
    cuda = f", runs CUDA up to {driver.cuda_version}" if driver.cuda_version else ""
    found = f"NVIDIA {driver.version or 'of unknown version'}, NVML {driver.nvml_version or 'of unknown version'}{cuda}"
    return (Finding(topic="driver", status="ok", found=found),)


def judge_cards(facts: Facts) -> tuple[Finding, ...]:
    """A line per card with its limits and its link, and one for each that does not answer."""
    lost = (
        Finding(
            topic=f"card {index}",
            status="fail",
            found=f"does not answer: {why}",
            remedy="reboot; if it comes back only for a while, look at its power cable, its seat and the power supply",
        )
        for index, why in facts.driver.absent.items()
    )
    return (*(_judge_card(card, len(facts.driver.cards)) for card in facts.driver.cards), *lost)


def _judge_card(card: DriverCard, n_cards: int) -> Finding:
    facts = card.facts
    parts = [facts.name, _heat(card), _power(card), _link(card.link)]
    if card.persistence is not None:
        parts.append(f"persistence mode {'on' if card.persistence else 'off'}")
    topic, found = f"card {facts.index}", ", ".join(part for part in parts if part)
    if facts.slowdown_c is None:
        remedy = "the watchdog assumes 90 C; write slowdown_c under [watch] if the maker says otherwise"
        return Finding(topic=topic, status="warn", found=found, remedy=remedy)
    link = card.link
    if n_cards > 1 and link.width is not None and link.width <= NARROW_LANES < (link.width_max or 0):
        remedy = "move it to a slot with 8 or 16 lanes: two cards exchange every gradient over this link"
        return Finding(topic=topic, status="warn", found=found, remedy=remedy)
    remedy_off = "`sudo nvidia-smi -pm 1`, or the driver forgets power limits whenever nobody uses the card"
    return Finding(topic=topic, status="ok", found=found, remedy=remedy_off if card.persistence is False else None)


def _heat(card: DriverCard) -> str:
    facts = card.facts
    if facts.slowdown_c is None:
        return f"slowdown temperature unknown ({facts.missing.get('slowdown_c', 'no reason given')})"
    about = "about " if facts.limits_from == "margins" else ""
    shutdown = "" if facts.shutdown_c is None else f", shuts down at {about}{facts.shutdown_c:.0f} C"
    return f"slows itself down at {about}{facts.slowdown_c:.0f} C{shutdown}"


def _power(card: DriverCard) -> str:
    facts = card.facts
    if facts.power_limit_w is None:
        return f"power limit unknown ({facts.missing.get('power_limit_w', 'no reason given')})"
    default, bounds = facts.power_limit_default_w, facts.power_limit_range_w
    more = [] if default is None else [f"default {default:.0f}"]
    more += [f"may be {bounds[0]:.0f} to {bounds[1]:.0f}"] if bounds else []
    return f"power limit {facts.power_limit_w:.0f} W" + (f" ({', '.join(more)})" if more else "")


def _link(link: Link) -> str:
    if link.width is None or link.generation is None:
        return "PCIe link unknown"
    most = f" of gen {link.generation_max} x{link.width_max}" if link.generation_max and link.width_max else ""
    return f"PCIe gen {link.generation} x{link.width} now{most}"


def judge_p2p(facts: Facts) -> tuple[Finding, ...]:
    """Whether cards read each other's memory, and the driver that makes NCCL hang over it."""
    pairs, names = facts.driver.pairs, [card.facts.name for card in facts.driver.cards]
    if not pairs:
        return ()
    found = "; ".join(f"cards {p.first} and {p.second}: {p.p2p}" for p in pairs)
    if claims_untruly(names, facts.driver.version):
        if facts.environment.get("NCCL_P2P_DISABLE") == "1":
            return (Finding(topic="p2p", status="ok", found=f"{found} (NCCL_P2P_DISABLE=1)"),)
        remedy = "update it to 550.40.07 or later, or `export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1` before torchrun"
        return (Finding(topic="p2p", status="warn", found=f"{found}; NCCL can hang with this driver", remedy=remedy),)
    if all(p.p2p == "yes" for p in pairs):
        return (Finding(topic="p2p", status="ok", found=found),)
    remedy = "nothing: gradients go through host memory; `homelab ddp` measures whether two cards pay all the same"
    return (Finding(topic="p2p", status="ok", found=found, remedy=remedy),)


def judge_matmul(facts: Facts) -> tuple[Finding, ...]:
    """What large products really reach, per device, against the tabled peak."""
    return tuple(_judge_rate(one) for one in facts.matmul)


def _judge_rate(one: Matmul) -> Finding:
    if one.error is not None:
        remedy = "free the card's memory (`nvidia-smi` names who holds it) and try again"
        if one.device == "cpu":
            remedy = REINSTALL
        return Finding(topic="matmul", status="warn", found=f"{one.device}: {one.error}", remedy=remedy)
    rates = [
        f"{name} {rate / 1e12:.{2 if rate < 1e13 else 0}f} TFLOP/s"
        for name, rate in (("bf16", one.bf16_flops_per_s), ("fp32", one.fp32_flops_per_s))
        if rate is not None
    ]
    where = one.device if one.n_threads is None else f"{one.n_threads} thread{'s' if one.n_threads > 1 else ''}"
    peak = peak_bf16_flops(one.device)
    found = f"{', '.join(rates)} on {where}"
    if peak is None or one.bf16_flops_per_s is None:
        reason = why_no_peak(one.device) if peak is None else "no bf16 to compare"
        return Finding(topic="matmul", status="ok", found=f"{found} ({reason})")
    share = one.bf16_flops_per_s / peak
    found += f", {share:.0%} of the tabled {peak / 1e12:.1f} in bf16"
    if share >= MATMUL_LEAST_SHARE:
        return Finding(topic="matmul", status="ok", found=found)
    remedy = "see who else computes and what throttles: `nvidia-smi`, `nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE`"
    return Finding(topic="matmul", status="warn", found=found, remedy=remedy)


def judge_device(facts: Facts) -> tuple[Finding, ...]:
    """What will compute: every card with its memory and whether torch can use it, or the CPU and why."""
    if facts.torch.error is not None and not facts.torch.cuda_build:
        return (Finding(topic="device", status="fail", found=f"torch fails: {facts.torch.error}", remedy=REINSTALL),)
    if not facts.cards:
        return (_judge_no_card(facts),)
    cards = ", ".join(f"{c.name} ({c.vram_bytes / GIB:.1f} GiB)" for c in facts.cards)
    if facts.torch.cuda_build is None:
        remedy = "reinstall torch from an index that is not CPU-only: `pip install --force-reinstall torch`"
        return (
            Finding(topic="device", status="fail", found=f"{cards}, but torch is built for CPU only", remedy=remedy),
        )
    if facts.torch.n_usable < len(facts.cards):
        why = facts.torch.error or "no reason given"
        found = f"{cards}, but torch computes on {facts.torch.n_usable} of {len(facts.cards)}: {why}"
        remedy = f"update the NVIDIA driver to one for CUDA {facts.torch.cuda_build} or later and reboot"
        return (Finding(topic="device", status="fail", found=found, remedy=remedy),)
    return (Finding(topic="device", status="ok", found=cards),)


def _judge_no_card(facts: Facts) -> Finding:
    if facts.n_cards_hidden:
        found = f"CUDA_VISIBLE_DEVICES hides all {facts.n_cards_hidden} cards: training runs on the CPU"
        return Finding(topic="device", status="warn", found=found, remedy="unset CUDA_VISIBLE_DEVICES")
    if facts.driver_loaded:
        found = f"the NVIDIA driver is loaded but no card answers ({facts.driver.error or 'NVML lists none'})"
        remedy = "reboot; if it stays, `nvidia-smi` names the fault (often a driver updated but not reloaded)"
        return Finding(topic="device", status="fail", found=found, remedy=remedy)
    if facts.card_on_bus:
        found = "an NVIDIA card is in the machine but its driver is not loaded: training runs on the CPU"
        return Finding(topic="device", status="warn", found=found, remedy="install the NVIDIA driver and reboot")
    return Finding(
        topic="device",
        status="warn",
        found="no NVIDIA card: training runs on the CPU",
        remedy="nothing for the quickstart, which is made for it; the ladders from 5M parameters want a card",
    )


def judge_bf16(facts: Facts) -> Finding:
    """Whether bf16 is computed in hardware."""
    if facts.box.computes_bf16:
        return Finding(topic="bf16", status="ok", found="computed in hardware")
    if not facts.cards:
        return Finding(topic="bf16", status="ok", found="not in this CPU: runs train in fp32")
    old = ", ".join(f"{c.name} ({'.'.join(map(str, c.capability))})" for c in facts.cards if not c.computes_bf16)
    remedy = "leave precision = auto (fp32, slower), or hide the old card with CUDA_VISIBLE_DEVICES"
    return Finding(topic="bf16", status="warn", found=f"needs compute capability 8.0, found {old}", remedy=remedy)
