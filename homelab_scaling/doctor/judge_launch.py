"""What follows from the facts about launching: the settings that make Accelerate train something else, silently.

Each of these was seen with accelerate 1.15: a launch that looks like success but is one process, or two independent
ones, or on the wrong device.
"""

from homelab_scaling.doctor.facts import LAUNCH_VARIABLES, Facts
from homelab_scaling.doctor.report import Finding

ODD_BACKENDS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TPU", "XLA")
CONFIG_FLAG = "--config_file recipes/accelerate_configs/"


def judge_launch(facts: Facts) -> Finding:
    """How several processes are started on this box."""
    if len(facts.cards) > 1:
        remedy = f"start both cards with `accelerate launch {CONFIG_FLAG}two_gpus.yaml recipes/pretrain.py ...`"
        return Finding(topic="launch", status="ok", found=f"{len(facts.cards)} cards", remedy=remedy)
    if facts.cards:
        return Finding(topic="launch", status="ok", found="one card, one process")
    return Finding(
        topic="launch",
        status="ok",
        found="`accelerate launch --cpu --num_processes 2` would start one process only",
        remedy="for two on CPU: `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...`",
    )


def judge_left_over_ranks(facts: Facts) -> tuple[Finding, ...]:
    """A launcher's variables in a plain shell; nothing without them."""
    left = [name for name in LAUNCH_VARIABLES if name in facts.environment]
    if not left:
        return ()
    found = f"{', '.join(f'{name}={facts.environment[name]}' for name in left)} set in this shell"
    remedy = f"`unset {' '.join(left)}`: a process started here would wait for ranks that nobody started"
    return (Finding(topic="ranks", status="warn", found=found, remedy=remedy),)


def judge_variables(facts: Facts) -> tuple[Finding, ...]:
    """ACCELERATE_* variables, which outrank what a recipe says; nothing without them."""
    names = sorted(name for name in facts.environment if name.startswith("ACCELERATE_"))
    if not facts.cards:
        names = [n for n in names if n != "ACCELERATE_USE_CPU"]  # which is the truth there
    if not names:
        return ()
    found = f"{', '.join(f'{name}={facts.environment[name]}' for name in names)} set in this shell"
    remedy = f"`unset {' '.join(names)}`: they change the device, precision or compiling of every launch"
    return (Finding(topic="launch env", status="warn", found=found, remedy=remedy),)


def judge_accelerate_config(facts: Facts) -> tuple[Finding, ...]:
    """The defaults that a bare `accelerate launch` takes without a word; nothing without such a file."""
    config, n_cards = facts.accelerate_config, len(facts.cards)
    if not config:
        return ()
    n_processes = int(config["num_processes"]) if config.get("num_processes", "").isdigit() else 1
    backend = config.get("distributed_type", "NO").upper()
    odd = []
    if config.get("use_cpu", "false").lower() == "true" and n_cards:
        odd.append("use_cpu: true leaves the cards idle")
    if n_processes > max(1, n_cards):
        trap = "would train independently" if not n_cards else "share cards"
        odd.append(f"num_processes: {n_processes} with {n_cards} card{'s' if n_cards != 1 else ''} ({trap})")
    if backend in ODD_BACKENDS:
        odd.append(f"distributed_type: {backend}, which the recipes are not made for")
    if config.get("mixed_precision", "no") not in ("no", "bf16"):
        odd.append(f"mixed_precision: {config['mixed_precision']}")
    if "dynamo_config" in config:
        odd.append("dynamo_config compiles a second time")
    found = f"{facts.accelerate_config_path} applies to every bare `accelerate launch`"
    if not odd:
        return (Finding(topic="launch config", status="ok", found=found),)
    which = "two_gpus" if n_cards > 1 else "one_gpu" if n_cards else "cpu"
    remedy = f"pass `{CONFIG_FLAG}{which}.yaml`, or remove that file"
    return (Finding(topic="launch config", status="warn", found=f"{found}: {'; '.join(odd)}", remedy=remedy),)


def judge_card_order(facts: Facts) -> tuple[Finding, ...]:
    """Whether CUDA and NVML number different cards alike."""
    names = {card.facts.name for card in facts.driver.cards}
    if len(names) < 2 or facts.environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return ()
    found = "CUDA numbers these cards by speed, nvidia-smi and this tool by slot"
    remedy = "`export CUDA_DEVICE_ORDER=PCI_BUS_ID` before setting CUDA_VISIBLE_DEVICES"
    return (Finding(topic="card order", status="warn", found=found, remedy=remedy),)
