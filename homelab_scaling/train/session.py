"""How one process of a launch is set up: Accelerate, its guard, the device, the execution choices and their reasons."""

import gc
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from homelab_scaling import __version__
from homelab_scaling.box import missing_for_compile
from homelab_scaling.codec import to_plain
from homelab_scaling.errors import MachineError, SpecError
from homelab_scaling.plan.memory import LossPath, choose_loss_path
from homelab_scaling.runs import Machine
from homelab_scaling.specs import CompileMode, ExecutionSpec, RunSpec
from homelab_scaling.train.model import LanguageModel, sdpa_backend
from homelab_scaling.train.parallel import choose_parallel
from homelab_scaling.train.ranks import Ranks
from homelab_scaling.train.sharded import hide_from_accelerate

MAX_COMPILE_SHARE = 0.10
SHARED_WITHIN_S = 10.0
"""How long a file may take to be seen on another machine."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What `auto` became for this segment, and why; logged in events.jsonl."""

    compile: bool
    compile_reason: str
    compile_mode: CompileMode
    loss_path: LossPath
    loss_reason: str


def start_accelerator(spec: RunSpec, folder: Path) -> Any:
    """An Accelerator that trains what the spec says, or a refusal.

    Raises:
        MachineError: the device cannot do the precision, a tracker is missing, or machines do not share the folder.
        SpecError: the launch gave another number of processes than the spec wants.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    hide_from_accelerate(os.environ)
    execution = spec.execution
    if execution.device == "cuda" and not torch.cuda.is_available():
        raise MachineError('this spec wants device "cuda", but torch sees none; check the driver with `homelab doctor`')
    on_cpu = execution.device == "cpu" or not torch.cuda.is_available()
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if spec.science.precision == "bf16" else "no",
            log_with=[_installed(tracker) for tracker in execution.trackers] or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
            kwargs_handlers=[choose_parallel(spec, on_gpu=not on_cpu).kwargs_handler()],
        )
    except ValueError as error:
        raise MachineError(f"Accelerate refuses this set-up ({error}); run `homelab doctor`") from None
    refuse_silent_split(accelerator.num_processes, execution.n_processes, dict(os.environ))
    refuse_split_folder(folder, accelerator)
    return accelerator


def refuse_silent_split(found: int, wanted: int, environ: dict[str, str]) -> None:
    """Stops a launch that is not the one asked for.

    `accelerate launch --cpu --num_processes 2` silently starts one process, and a launch of several processes that
    Accelerate does not recognise trains the same run several times over; both would look like success.

    Raises:
        SpecError: found and wanted differ, or WORLD_SIZE says otherwise.
    """
    launched = int(environ.get("WORLD_SIZE", "1"))
    if launched != found:
        raise SpecError(
            f"{launched} processes were launched but Accelerate trains with {found}: they would train independently; "
            "use `accelerate launch --multi_gpu --num_processes N`"
        )
    if found != wanted:
        raise SpecError(
            f"this launch has {found} process{'es' if found > 1 else ''}, the spec wants {wanted}; launch with "
            f"`--num_processes {wanted}{' --multi_gpu' if wanted > 1 else ''}`, or pass --processes {found}"
        )


def refuse_split_folder(folder: Path, accelerator: Any) -> None:
    """Stops a launch over several machines that do not see the same run folder.

    Each would resume from what it has on its own disk, at another step than the others. Every rank calls this.

    Raises:
        MachineError: on every rank, naming the machines that do not see the main one's folder.
    """
    world_size, is_main = accelerator.num_processes, accelerator.is_main_process
    if int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size:
        return
    ranks = Ranks(world_size)
    mine = folder / f".shared-{os.getpid()}-{time.time_ns()}"
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        mine.touch()
    name = ranks.gather(mine.name)[0]
    deadline = time.monotonic() + SHARED_WITHIN_S
    while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    told = ranks.gather((socket.gethostname(), seen))
    if is_main:
        mine.unlink()
    blind = sorted({host for host, sees in told if not sees})
    if blind:
        raise MachineError(
            f"{', '.join(blind)} does not see {folder} of {told[0][0]}: the machines of one run share its folder; put "
            "the lab on a file system that all of them mount"
        )


def _installed(tracker: str) -> str:
    from importlib.util import find_spec

    if find_spec(tracker) is None:
        raise MachineError(f"tracker {tracker} is not installed; pip install 'homelab_scaling[{tracker}]'")
    return tracker


def choose(spec: RunSpec, on_gpu: bool) -> Choices:
    """Resolves the `auto` execution settings by their stated rules."""
    science, execution = spec.science, spec.execution
    compile_it, compile_reason = choose_compile(execution, science.shape.n_layer, on_gpu, missing_for_compile())
    path: LossPath
    if execution.loss == "auto":
        n_tokens = execution.microbatch_seqs_per_rank * science.shape.context_tokens
        path = choose_loss_path(n_tokens, science.n_vocab, on_gpu=on_gpu)
        loss_reason = "by the size of one micro-batch's logits" if on_gpu else "its softmax stays in cache"
    else:
        path, loss_reason = execution.loss, "as asked"
    return Choices(
        compile=compile_it,
        compile_reason=compile_reason,
        compile_mode=execution.compile_mode,
        loss_path=path,
        loss_reason=loss_reason,
    )


def first_step_s(n_layer: int, on_gpu: bool) -> float:
    """What torch.compile costs before the first step is done, roughly (on CPU 10 s for 2 layers, 12 for 3)."""
    return 20 + 2.0 * n_layer if on_gpu else 6 + 2.0 * n_layer


def choose_compile(execution: ExecutionSpec, n_layer: int, on_gpu: bool, missing: list[str]) -> tuple[bool, str]:
    """Whether to torch.compile, and why, in words."""
    if execution.compile != "auto":
        return execution.compile == "on", "as asked"
    if missing:
        return False, f"without {' and '.join(missing)}; see `homelab doctor`"
    cost, run = first_step_s(n_layer, on_gpu), execution.predicted_s
    if run is not None and cost > MAX_COMPILE_SHARE * run:
        return False, f"its first step costs about {cost:.0f} s of a run of about {run:.0f} s"
    return True, "pays for itself within this run"


def about_segment(spec: RunSpec, choices: Choices, machine: Machine, *, step: int, skipped: list[str]) -> str:
    """The segment in a line: what `auto` became, and why; before it, each checkpoint that could not be used."""
    micro, accumulation = spec.execution.microbatch_seqs_per_rank, spec.execution.accumulation_steps(spec.science)
    said = [f"{spec.run_id}: skipped checkpoint {why}" for why in skipped]
    begun = spec.execution.start_name if spec.science.start is not None else None
    starts = f"starts from the weights of {begun}" if begun else "starts"
    said.append(
        f"{spec.run_id} {f'goes on at step {step}' if step else starts} on {machine.device}, {machine.n_processes} x "
        f"{micro} sequences x {accumulation}, {spec.science.precision}; torch.compile "
        f"{'on' if choices.compile else 'off'} ({choices.compile_reason}); {choices.loss_path} loss "
        f"({choices.loss_reason})"
        f"{'; blocks recomputed' if spec.execution.activation_checkpointing else ''}"
        f"{'' if spec.execution.sharding == 'none' else f'; sharded ({spec.execution.sharding})'}"
    )
    return "\n".join(said)


def segment_facts(
    spec: RunSpec, choices: Choices, machine: Machine, model: LanguageModel, device: torch.device
) -> dict[str, object]:
    """How a segment is executed, for its entry in events.jsonl."""
    dtype = torch.bfloat16 if spec.science.precision == "bf16" else torch.float32
    ddp: dict[str, object] = {}
    if machine.n_processes > 1 and spec.execution.sharding == "none":
        ddp = {"ddp": to_plain(choose_parallel(spec, on_gpu=device.type == "cuda"))}
    return {
        "n_processes": machine.n_processes,
        "microbatch_seqs_per_rank": spec.execution.microbatch_seqs_per_rank,
        "accumulation": spec.execution.accumulation_steps(spec.science),
        "device": machine.device,
        "compile": choices.compile,
        "compile_reason": choices.compile_reason,
        "loss_path": choices.loss_path,
        "loss_reason": choices.loss_reason,
        "activation_checkpointing": spec.execution.activation_checkpointing,
        "sharding": spec.execution.sharding,
        "sdpa": sdpa_backend(model, device, dtype),
    } | ddp


def describe_machine(device: torch.device, n_processes: int) -> Machine:
    """This machine and these versions, for the record."""
    from importlib.metadata import version

    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        n_processes=n_processes,
        torch=torch.__version__,
        accelerate=version("accelerate"),
        transformers=version("transformers"),
        python=sys.version.split()[0],
        homelab_scaling=__version__,
        git_commit=_git_commit(),
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown model")
    return f"cpu ({model}, {torch.get_num_threads()} threads)"


def _git_commit() -> str | None:
    import subprocess

    folder = Path(__file__).resolve().parents[2]
    if not (folder / "setup.cfg").exists():  # installed from a wheel: a repository around it would be somebody else's
        return None
    try:
        out = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


def leave_group(*, together: bool) -> None:
    """Ends the process group, if there is one; without this a rank can abort on its way out and look like a crash.

    Args:
        together: every rank gets here (a clean end), so that they may wait for one another.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gc.unfreeze()
    gc.collect()  # DDP's threads must be gone before the group is
    if together:
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def sum_over_ranks(vector: Tensor) -> Tensor:
    """Adds a tensor over all ranks, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(vector)
    return vector
