"""One contestant of `homelab bench train`, in a process of its own: takes orders on stdin, answers on stdout.

    python -m homelab_scaling.bench.train_contestants job.json

Orders and answers are one JSON object a line. `{"do": "turn", "n_warm": 1, "n_steps": 5}` takes one step untimed and
five timed; `{"do": "parts", "n_steps": 5}` times whole steps and steps without head and loss; the end of stdin is the
end. Everybody trains on the same token file with the same batch, clips at the same norm and uses AdamW; nobody drops
out. Shapes: B sequences of a micro-batch, T context, D width, V vocabulary.
"""

import gc
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from homelab_scaling import codec
from homelab_scaling.bench.train_job import Job
from homelab_scaling.errors import MachineError
from homelab_scaling.plan.counting import pad_vocab
from homelab_scaling.specs import RunSpec

LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0


class Contestant(ABC):
    """A model, its data and its optimizer."""

    about: str
    """What is special about it, for the summary."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device(job.device)

    @abstractmethod
    def race(self, steps: Iterator[None]) -> None:
        """Takes a step whenever `steps` yields."""


class Stepping(Contestant):
    """A contestant whose steps can be taken one by one, and without output head and loss."""

    @abstractmethod
    def step(self) -> None:
        """One optimizer step over the whole batch."""

    @abstractmethod
    def backbone_step(self) -> None:
        """The same without output head and loss: the hidden states get a gradient made beforehand."""

    def race(self, steps: Iterator[None]) -> None:
        for _ in steps:
            self.step()


class Ours(Stepping):
    """The trainer's own step: its model, loss path, optimizer, clipping, masks and data order."""

    def __init__(self, job: Job) -> None:
        from homelab_scaling.train.rehearsal import rehearse

        super().__init__(job)
        self.stepper = rehearse(codec.read_json(Path(job.spec), RunSpec), Path(job.folder) / "ours")
        choices, execution = self.stepper.choices, self.stepper.execution
        self.about = (
            f"compile {choices.compile_mode if choices.compile else 'off'} ({choices.compile_reason}), "
            f"{choices.loss_path} loss, {execution.microbatch_seqs_per_rank} sequences a micro-batch"
        )
        self._gradient: Tensor | None = None
        self._n_steps = 0

    def step(self) -> None:
        self.stepper.do_update(LR)
        self.stepper.meter.pending.clear()
        self._n_steps += 1
        if self._n_steps == 1:  # as the Trainer does
            gc.collect()
            gc.freeze()

    def backbone_step(self) -> None:
        stepper, seqs = self.stepper, self.stepper.execution.microbatch_seqs_per_rank
        for micro in range(stepper.accumulation):
            x_BT, _ = stepper.feed.micro_batch(stepper.step, micro, seqs)
            with stepper.accelerator.autocast():
                hidden_BTD = stepper.model.hidden_states(x_BT)
            self._gradient = _gradient_like(self._gradient, hidden_BTD)
            hidden_BTD.backward(self._gradient)  # type: ignore[no-untyped-call]
        norm = stepper.optimizer.clip()
        stepper.optimizer.step(LR, torch.isfinite(norm))
        stepper.optimizer.zero_grad()


class Plain(Stepping):
    """A short loop as people write it: autocast, backward, clip, step. Subclasses bring model and optimizer."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.tokens = np.memmap(Path(job.shards) / "train.bin", dtype=np.uint16, mode="r")
        self.rng = np.random.default_rng(0)
        self.accumulation = job.batch_seqs // job.microbatch_seqs
        self._gradient: Tensor | None = None

    def micro_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) each, from random places of the file."""
        context = self.job.shape.context_tokens
        starts = self.rng.integers(0, len(self.tokens) - context, size=self.job.microbatch_seqs)
        rows = np.stack([self.tokens[s : s + context + 1] for s in starts]).astype(np.int64)
        window = torch.from_numpy(rows)
        if self.device.type == "cuda":
            window = window.pin_memory().to(self.device, non_blocking=True)
        return window[:, :-1], window[:, 1:]

    def autocast(self) -> AbstractContextManager[Any]:
        on = self.job.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    @abstractmethod
    def loss(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        """Mean loss in nats per token."""

    @abstractmethod
    def hidden(self, x_BT: Tensor) -> Tensor:
        """What the blocks make of the tokens, (B, T, D)."""

    def step(self) -> None:
        for _ in range(self.accumulation):
            x_BT, y_BT = self.micro_batch()
            with self.autocast():
                loss = self.loss(x_BT, y_BT) / self.accumulation
            loss.backward()  # type: ignore[no-untyped-call]
        self._update()

    def backbone_step(self) -> None:
        for _ in range(self.accumulation):
            x_BT, _ = self.micro_batch()
            with self.autocast():
                hidden_BTD = self.hidden(x_BT)
            self._gradient = _gradient_like(self._gradient, hidden_BTD)
            hidden_BTD.backward(self._gradient)  # type: ignore[no-untyped-call]
        self._update()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class PlainHuggingFace(Plain):
    """GPT2LMHeadModel as it comes, SDPA, its own `.loss`, torch's default AdamW; dropout off like everybody's."""

    about = "SDPA, .loss, default AdamW, dropout off"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.model: Any = _gpt2_lm_head_model(job).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def loss(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=x_BT, labels=x_BT).loss  # it shifts the labels itself
        return loss

    def hidden(self, x_BT: Tensor) -> Tensor:
        hidden: Tensor = self.model.transformer(input_ids=x_BT).last_hidden_state
        return hidden


class NanoGPT(Plain):
    """nanoGPT's model.py from a path, compiled, with its own optimizer and padded vocabulary, as its train.py does."""

    about = "torch.compile, its configure_optimizers, vocabulary padded"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        peer = _import_file(Path(str(job.nanogpt)) / "model.py")
        shape = job.shape
        config = peer.GPTConfig(
            block_size=shape.context_tokens,
            vocab_size=pad_vocab(job.n_vocab),
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.d_model,
            dropout=0.0,
            bias=True,
        )
        model: Any = peer.GPT(config).to(self.device)
        self.model = model
        self.optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, self.device.type)
        self._compiled: Any = torch.compile(self.model) if job.compiles else self.model
        self._backbone: Any = torch.compile(self._hidden) if job.compiles else self._hidden

    def loss(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        loss: Tensor = self._compiled(x_BT, y_BT.contiguous())[1]
        return loss

    def hidden(self, x_BT: Tensor) -> Tensor:
        hidden: Tensor = self._backbone(x_BT)
        return hidden

    def _hidden(self, x_BT: Tensor) -> Tensor:
        parts: Any = self.model.transformer
        positions_T = torch.arange(x_BT.shape[1], device=x_BT.device)
        hidden = parts.drop(parts.wte(x_BT) + parts.wpe(positions_T))
        for block in parts.h:
            hidden = block(hidden)
        normed: Tensor = parts.ln_f(hidden)
        return normed


class HuggingFaceTrainer(Contestant):
    """transformers.Trainer over a ready dataset: its own loop, nothing evaluated, logged or saved."""

    def __init__(self, job: Job) -> None:
        from transformers import Trainer, TrainingArguments

        super().__init__(job)
        arguments = TrainingArguments(
            output_dir=str(Path(job.folder) / "hf-trainer"),
            per_device_train_batch_size=job.microbatch_seqs,
            gradient_accumulation_steps=job.batch_seqs // job.microbatch_seqs,
            max_steps=10**7,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=GRAD_CLIP,
            bf16=job.precision == "bf16",
            use_cpu=self.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=self.device.type == "cuda",
        )
        self.about = f"its defaults ({arguments.optim}), dropout off"
        dataset: Any = _Windows(Path(job.shards) / "train.bin", job.shape.context_tokens)
        self.trainer = Trainer(model=_gpt2_lm_head_model(job), args=arguments, train_dataset=dataset)

    def race(self, steps: Iterator[None]) -> None:
        from transformers import PrinterCallback, TrainerCallback

        class Referee(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                next(steps, None)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = next(steps, "end") == "end"

        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(Referee())
        self.trainer.train()


class _Windows:
    """Every window of the token file, tokenized and ready."""

    def __init__(self, path: Path, context: int) -> None:
        self.tokens, self.context = np.memmap(path, dtype=np.uint16, mode="r"), context

    def __len__(self) -> int:
        return len(self.tokens) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = index * self.context
        ids = torch.from_numpy(self.tokens[first : first + self.context].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def _gpt2_lm_head_model(job: Job) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = job.shape
    config = GPT2Config(
        vocab_size=job.n_vocab,
        n_positions=shape.context_tokens,
        n_embd=shape.d_model,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if spec is None or spec.loader is None:
        raise MachineError(f"{path} is no Python file; --nanogpt wants a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def _gradient_like(made: Tensor | None, hidden_BTD: Tensor) -> Tensor:
    """A random gradient of the hidden states, made once."""
    if made is not None:
        return made
    return torch.randn_like(hidden_BTD) / math.sqrt(hidden_BTD.numel())


CONTESTANTS: dict[str, Callable[[Job], Contestant]] = {
    "ours": Ours,
    "hf": PlainHuggingFace,
    "hf-trainer": HuggingFaceTrainer,
    "nanogpt": NanoGPT,
}


# --------------------------------------------------------------------------------------------------------- the referee


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held: torch's allocator on CUDA, resident pages elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise MachineError("/proc/self/status has no VmHWM; `homelab bench train` needs Linux")


def referee(contestant: Contestant, answer: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Yields once for every step to take, and answers the orders in between."""
    answer({"about": contestant.about, "n_threads": torch.get_num_threads()})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "parts":
            answer(_parts(contestant, order["n_steps"]))
            continue
        for _ in range(order["n_warm"]):
            yield
        began = _clock(contestant.device)
        for _ in range(order["n_steps"]):
            yield
        wall_s, cpu_s = (now - then for now, then in zip(_clock(contestant.device), began, strict=True))
        memory = peak_bytes(contestant.device)
        if contestant.device.type == "cuda":
            torch.cuda.empty_cache()  # the next contestant's turn on the same card
        answer({"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": memory})


def _clock(device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def _parts(contestant: Contestant, n_steps: int) -> dict[str, Any]:
    """Seconds of a whole step and of one without head and loss, medians of steps taken in turn."""
    if not isinstance(contestant, Stepping):
        return {"step_s": None, "backbone_s": None}
    contestant.backbone_step()
    seconds: dict[str, list[float]] = {"step_s": [], "backbone_s": []}
    for number in range(n_steps + 1):
        for name, does in (("step_s", contestant.step), ("backbone_s", contestant.backbone_step)):
            began, _ = _clock(contestant.device)
            does()
            if number:
                seconds[name].append(_clock(contestant.device)[0] - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(path: str) -> None:
    """Builds the contestant of a job file and lets it race until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    job = codec.read_json(Path(path), Job)
    torch.set_num_threads(job.n_threads)

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=channel, flush=True)

    contestant = CONTESTANTS[job.contestant](job)
    contestant.race(referee(contestant, answer))


if __name__ == "__main__":
    main(sys.argv[1])
