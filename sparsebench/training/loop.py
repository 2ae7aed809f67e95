"""One training loop for everything that trains: base models, methods that change the model, controls.

Built on accelerate (mixed precision, accumulation, one process or many through `accelerate launch` / `torchrun`). The
order of the data, the learning rate and a penalty's coefficient are pure functions of (seed, step), so a checkpoint is
weights, optimiser, random state and the history so far, and a run killed at any moment and started again ends as one
never killed. A checkpoint carries the SHA-256 of its files: a damaged one is left for the one before.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch import nn

from sparsebench import ranks
from sparsebench.config import digests, setting
from sparsebench.data.labelled import Labelled, LabelledSplit
from sparsebench.measure import quality
from sparsebench.records import files, stopping
from sparsebench.records.progress import shown
from sparsebench.training.compiled import compiled, next_token_entropy

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Training:
    """Settings of the loop. batch_size is global: per device and pass, micro_batch sequences; the rest accumulates."""

    steps: int = setting(gt=0)
    batch_size: int = setting(gt=0)
    micro_batch: int = setting(gt=0)
    optimizer: str = setting(choices=("adamw", "sgd"))
    lr: float = setting(gt=0)
    min_lr: float = setting(ge=0)
    schedule: str = setting(choices=("cosine", "linear", "constant"))
    warmup: int = setting(ge=0)
    betas: list[float] = setting(ge=0, lt=1)
    momentum: float = setting(ge=0, lt=1)
    weight_decay: float = setting(ge=0)
    clip: float | None = setting(gt=0)
    dropout: float = setting(ge=0, lt=1)
    precision: str = setting(choices=("auto", "no", "bf16", "fp16"))
    compile: bool = setting()
    checkpoint_every: int = setting(gt=0)
    log_every: int = setting(gt=0)

    def __post_init__(self):
        problems = []
        if self.batch_size % self.micro_batch:
            problems.append(f"micro_batch must divide batch_size={self.batch_size}, got {self.micro_batch}")
        if self.warmup >= self.steps:
            problems.append(f"warmup must be below steps={self.steps}, got {self.warmup}")
        if len(self.betas) != 2:
            problems.append(f"betas must be two numbers in [0, 1), got {self.betas}")
        if problems:
            raise ValueError("\n".join(problems))

    def rate(self, step: int) -> float:
        """Learning rate of a step (counted from 0): linear warm-up, then the schedule down to min_lr."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        fall = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
        return self.min_lr + (self.lr - self.min_lr) * fall[self.schedule]


class Penalty(Protocol):
    """A term added to the loss: it watches the model (hooks of its own) and is read after every forward pass."""

    def coefficient(self, step: int) -> float:
        """lambda of a step."""

    def value(self) -> torch.Tensor:
        """The penalty of the last forward pass, with its graph; forgets that pass."""

    def stats(self) -> dict[str, float]:
        """What to log beside it, e.g. the share of zeros per site since last asked."""


class Diverged(FloatingPointError):
    """The loss left the path: not finite, or far above where it started. The last good checkpoint is kept."""


@dataclass
class History:
    """Rows logged on the way (those before a kill too), the last step and the time of this process's part."""

    rows: list[dict] = field(default_factory=list)
    steps: int = 0
    first_loss: float = math.inf  # of step 0: what the guard against divergence compares with
    clipped: int = 0  # steps whose gradient was clipped, on the first process
    resumed_at: int = 0
    processes: int = 1
    seconds: float = 0.0


def next_token_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token over windows [B, T]."""
    return next_token_entropy(module(input_ids=batch, use_cache=False).logits, batch)


def classification_loss(module: nn.Module, batch: Labelled) -> torch.Tensor:
    """Mean cross-entropy of the label over a batch of examples."""
    return F.cross_entropy(quality.logits(module, batch.inputs).float(), batch.labels)


def order(rows: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of one epoch: a function of seed and epoch only."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


class Order:
    """Row indices of any global position, without state: position p stands in epoch p // rows."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.epoch, self.permutation = rows, seed, -1, torch.empty(0)

    def __call__(self, start: int, count: int) -> torch.Tensor:
        rows = []
        for position in range(start, start + count):
            epoch, place = divmod(position, self.rows)
            if epoch != self.epoch:
                self.epoch, self.permutation = epoch, order(self.rows, self.seed, epoch)
            rows.append(int(self.permutation[place]))
        return torch.tensor(rows)


def optimiser(module: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW or SGD; vectors (norms, biases) are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas))


@contextmanager
def dropping(module: nn.Module, share: float) -> Iterator[None]:
    """Dropout on the input of every linear map while the context lasts (embedding and norms untouched)."""
    hooks = [
        linear.register_forward_pre_hook(lambda m, args: (F.dropout(args[0], share, training=m.training), *args[1:]))
        for linear in module.modules()
        if share and isinstance(linear, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train(
    module: nn.Module,
    rows: torch.Tensor | LabelledSplit,
    settings: Training,
    *,
    folder: Path,
    seed: int,
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] = next_token_loss,
    penalty: Penalty | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    track: Callable[[dict], None] = lambda row: None,
    label: str = "train",
) -> History:
    """Train `module` in place on `rows` (tokens [N, T], or a split of examples) and return the history.

    Resumes by itself from `folder`. Told to stop, it ends the step, leaves a checkpoint and raises stopping.Stopped.

    loss(module, batch) is the task's mean loss; `penalty` is added with its own coefficient; `before_step(step)` and
    `after_step(step)` run around each optimiser step (e.g. to anneal a setting, to re-apply weight masks). Under FSDP
    the module stays sharded: take its weights with finetune.weights. Raises Diverged, naming the step.
    """
    if not len(rows):
        raise ValueError(f"{label}: the data set holds nothing to train on (a set to evaluate on only)")
    on_cpu = next(module.parameters()).device.type == "cpu"
    precision = ("no" if on_cpu else "bf16") if settings.precision == "auto" else settings.precision
    AcceleratorState._reset_state()  # an earlier training of this process may have used another precision
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
    accumulate, remainder = divmod(settings.batch_size, settings.micro_batch * accelerator.num_processes)
    if remainder:
        raise ValueError(
            f"train.batch_size={settings.batch_size} must be a multiple of train.micro_batch={settings.micro_batch} "
            f"times {accelerator.num_processes} processes"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("train: FSDP needs version 2 (accelerate launch --fsdp_version 2, or FSDP_VERSION=2)")
    torch.manual_seed(seed + accelerator.process_index)
    module.train()
    history = History(processes=accelerator.num_processes)
    wrapped, optimizer = accelerator.prepare(module, optimiser(module, settings))
    pick = Order(len(rows), seed)
    start = resume(accelerator, folder, history)
    begun, unit = time.perf_counter(), getattr(rows, "unit", "tokens")
    since, tokens = begun, 0

    def gradients(step: int, scale: float) -> tuple[float, float, float]:
        """Add up one step's gradients; (task loss, penalty, share of processes told to stop), means over all of them."""
        nonlocal tokens
        sums = torch.zeros(3, device=accelerator.device)
        sums[2] = stopping.name() is not None
        indices = pick(step * settings.batch_size, settings.batch_size)
        mine = indices[accelerator.process_index :: accelerator.num_processes].split(settings.micro_batch)
        for i, part in enumerate(mine):
            batch = rows[part].to(accelerator.device)
            with nullcontext() if i == accumulate - 1 else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    task = loss(wrapped, batch)
                term = penalty.value() if penalty else task.new_zeros(())
                accelerator.backward((task + scale * term if scale else task) / accumulate)
            sums[:2] += torch.stack([task.detach().float(), term.detach().float()]) / accumulate
            tokens += batch.numel() * accelerator.num_processes
        return tuple(accelerator.reduce(sums, "mean").tolist())

    with dropping(module, settings.dropout), stopping.held(), compiled(module, settings.compile):
        for step in shown(range(start, settings.steps), settings.steps - start, label):
            if before_step is not None:
                before_step(step)
            rate, scale = settings.rate(step), penalty.coefficient(step) if penalty else 0.0
            for group in optimizer.param_groups:
                group["lr"] = rate
            total, extra, told = gradients(step, scale)
            if step == 0:
                history.first_loss = total
            if not math.isfinite(total) or total > 3 * history.first_loss + 1:
                raise Diverged(
                    f"{label}: the loss is {total:.4g} at step {step}, {history.first_loss:.4g} at first; last checkpoint kept"
                )
            if settings.clip is not None:
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip)
                history.clipped += int(float(norm) > settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if after_step is not None:
                after_step(step)
            history.steps = step + 1
            if history.steps % settings.log_every == 0 or history.steps == settings.steps:
                now = time.perf_counter()
                row = {"step": history.steps, "loss": total, "lr": rate, f"{unit}_per_s": tokens / (now - since)}
                if penalty is not None:
                    row |= {"penalty": extra, "lambda": scale, **penalty.stats()}
                if settings.clip is not None:
                    row["clip_rate"] = history.clipped / history.steps
                row["eta_s"] = (settings.steps - history.steps) * (now - begun) / (history.steps - start)
                history.rows.append({f"{label}/{k}": v for k, v in row.items()})
                if accelerator.is_main_process:
                    track(history.rows[-1])
                    log.info("%s %s", label, progress(row, settings.steps, unit))
                since, tokens = now, 0
            if told or (history.steps % settings.checkpoint_every == 0 and history.steps < settings.steps):
                checkpoint(accelerator, folder, history)
            if told:
                raise stopping.Stopped(
                    f"{stopping.reason()}; the checkpoint of step {history.steps} of "
                    f"{label} is kept, the same command goes on from it"
                )
    history.seconds = time.perf_counter() - begun
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # or later passes would still run under autocast
    module.eval()
    accelerator.free_memory()
    return history


def progress(row: dict, steps: int, unit: str) -> str:
    """A row of history as one line for people."""
    minutes, seconds = divmod(int(row["eta_s"]), 60)
    penalty = f" penalty {row['penalty']:.4g} lambda {row['lambda']:.3g}" if "penalty" in row else ""
    penalty += f" x1_zero {row['x1_zero']:.3f}" if "x1_zero" in row else ""
    return (
        f"{row['step']}/{steps} loss {row['loss']:.4f}{penalty} lr {row['lr']:.2e} {row[f'{unit}_per_s']:.3g} {unit}/s "
        f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    )


def checkpoint(accelerator: Accelerator, folder: Path, history: History) -> None:
    """Write this step's checkpoint beside the one before, which stays in case this one is damaged later.

    It gets its name when it is whole, and at most two lie there: a kill at any moment leaves a whole one.
    """
    partial, final = folder / f".step-{history.steps}.partial", folder / f"step-{history.steps}"
    if accelerator.is_main_process:
        for old in steps_kept(folder)[1:]:  # it loses its name first: what has one is whole
            (folder / f"step-{old}").rename(folder / f".step-{old}.old")
        for left in folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial), safe_serialization=True)
    except Exception as error:  # each library has its own words for a full disk
        left = shutil.disk_usage(folder).free
        shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint only makes that worse
        text = f"checkpoint {final} can't be written, {left / 1e6:.0f} MB are left on the disk: {error}"
        raise OSError(" ".join(text.split())) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        kept = {"rows": history.rows, "first_loss": history.first_loss, "clipped": history.clipped}
        files.write_atomic(partial / PROGRESS, json.dumps(files.plain(kept)).encode())
        files.write_atomic(partial / CHECKSUMS, json.dumps(checksums(partial)).encode())
        partial.rename(final)
    accelerator.wait_for_everyone()


PROGRESS, CHECKSUMS = "progress.json", "sha256.json"


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, read now, by its path in the folder."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / CHECKSUMS)
    return {p.relative_to(folder).as_posix(): digests.of_file(p) for p in files}


def steps_kept(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, latest first."""
    steps = (p.name.partition("-")[2] for p in folder.glob("step-*") if p.is_dir())
    return sorted((int(step) for step in steps if re.fullmatch(r"[1-9][0-9]{0,17}", step)), reverse=True)


def problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        stated = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{CHECKSUMS}: {str(error)[:100]}"
    if not isinstance(stated, dict) or PROGRESS not in stated:
        return f"{CHECKSUMS} is not as it was written"
    digests = checksums(path)
    odd = [n for n in sorted({*stated, *digests}) if stated.get(n) != digests.get(n)]
    return f"{odd[0]} is not as it was written" if odd else None


def latest(folder: Path) -> int:
    """The step of the newest whole checkpoint, 0 where there is none; damaged ones are named and removed."""
    for step in steps_kept(folder):
        path = folder / f"step-{step}"
        wrong = problem(path)
        if wrong is None:
            return step
        log.warning("checkpoint %s is damaged (%s): going on from the one before, if any", path, wrong)
        shutil.rmtree(path)
    return 0


def resume(accelerator: Accelerator, folder: Path, history: History) -> int:
    """Load the newest whole checkpoint in `folder` and its history; the step to go on from, 0 where there is none.

    Raises ValueError where a whole one can't be loaded (made by other versions, say); it is removed, so that the next
    start goes on from an earlier one.
    """
    step = history.resumed_at = ranks.agreed(latest(folder) if accelerator.is_main_process else 0)
    if not step:
        return 0
    path = folder / f"step-{step}"
    try:
        accelerator.load_state(str(path))
        kept = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        history.rows, history.first_loss, history.clipped = kept["rows"], kept["first_loss"], kept["clipped"]
    except Exception as error:
        if accelerator.is_main_process:
            shutil.rmtree(path, ignore_errors=True)
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"checkpoint {path} can't be loaded ({text}) and was removed: start again") from error
    history.steps = step
    log.info("resumed at step %d from %s", step, folder)
    return step
