"""The training loop: one run from its config to its result, on one device or, with several processes, on several.

    prepare data → build model → claim the run → [ step · checkpoint · report ]* → weights → result

With a teacher, a step minimizes a mixture of the loss and the divergence from the teacher (teacher.py). The loss alone is
reported, validated and watched.

The state of a run is its weights, the optimizer's state and `Counters`; batches and learning rates follow from the step alone.
Before some steps of the warm-up, learned scales are set from the batch of the step, which follows from weights and step.
Before the first step of each stage of the precision schedule (`RunConfig.stages`), a checkpoint is taken, from which the model
is built anew with the quantizers of the stage. An uninterrupted run thus does at a switch what a resumed one does.
A checkpoint is taken after a step and before the report of that step, and a resumed run repeats the report. Weights and
`metrics.jsonl` are therefore the same, bit for bit, however often the run was killed (on a CPU: with the number of threads that
the run began with, which env.json records and every attempt uses).

A step whose loss or gradient norm is not finite is not applied, nor is any step after it: the optimizer reads a flag on the
device, for which the host need not wait. The loop reads the flag when it has to wait anyway, at a report or a checkpoint. The
weights are then still those before the first bad step, and its batch is run again to name the first tensor that is not finite.
If the config limits the loss or the gradient norm, the last of `train.diverged_steps` consecutive steps above a limit is
treated the same way. A quantized layer whose gradient is lost in the first steps ends the run, too (lost.py).
"""

from __future__ import annotations

import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from .. import metrics
from ..analysis.health import clamped_operands
from ..config import RunConfig
from ..config.rates import group_rates, learning_rate
from ..data import sampler
from ..data.packing import IGNORED, Packing, parts, windows_of
from ..data.tokens import Dataset, tokenizer_of
from ..errors import DataError, Diverged, OutOfMemory, Preempted, QuestError, RunFailed, StorageError, UsageError
from ..evaluate.loss import Interrupted, bits_per_byte, evaluate, evaluated_tokens
from ..models.llama import count_flops, count_parameters, model_bits
from ..models.pretrained import initial_model
from ..quant.linear import as_part, calibrate_scales, quantized_layers, quantized_once, use_kernels
from ..quant.quantizer import Quantizer
from ..store import Result, Run, RunStore, RunWriter, checkpoint_name, describe
from ..store.lease import Lease, LeaseLost
from . import checkpoint, distributed, health
from . import provenance as environment
from .allocator import keep_memory
from .branch import branch_checkpoint
from .compiling import compiles, keep_compiled_code, path_of
from .distributed import SINGLE_PROCESS, NullRunWriter, World
from .lost import FIRST_STEPS, FirstSteps, lost
from .nonfinite import UNNAMED, first_nonfinite
from .optim import Optimizer, calibration_steps, freeze, learned_scales
from .preflight import with_stored_execution
from .run_data import check_teacher, load_data, text_record
from .signals import StopSignals
from .teacher import Teacher
from .trackers import from_environment, mirrored

HEALTH_CHECKS = 20  # per run, if train.health_every is not set: 0.6 % of the time of 53K W4A4 on a CPU, less for larger models
CALIBRATION_TOKENS = 2048  # most tokens of a batch (but at least one sequence) from which learned scales are set
TRAIN_TOKENS = 32_768  # of the training text, for the training loss of a run without steps
LEVEL_WINDOWS = 10  # windows in the mean with which loss and gradient norm are compared


class Progress(Protocol):
    """A display of a run's advancement: console.TrainProgress, or any function of the same signature."""

    def __call__(self, *, step: int, steps: int, loss: float, tokens_per_s: float, eta_s: float) -> None:
        """Show that `step` of `steps` are done; `loss` in nats/token, `eta_s` the remaining time in seconds, NaN if unknown."""


def train(
    config: RunConfig,
    *,
    runs: Path | str | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    lease: Lease | None = None,
) -> Result:
    """Train the run of `config` in the folder `runs` (default: `$QUESTCTL_RUNS`, else runs/), and return its result.

    An interrupted run resumes from its last checkpoint, and a finished run returns its result at once. `progress` is called at
    every report. `stop` is called after every step; if it returns true, the run ends as on SIGTERM. `lease` is a claim on the
    run's folder that the caller already holds.

    Raises, before anything is written: UsageError and DataError for the config, the corpus or a damaged run folder,
    StorageError, and LeaseHeld if another process trains this run. Raises later: Preempted (SIGTERM, SIGUSR1, `stop`) and
    KeyboardInterrupt (Ctrl-C), both after a checkpoint; Diverged, which names the first tensor that is not finite; StorageError
    if the disk is full; OutOfMemory; and LeaseLost.
    """
    run = RunStore(runs).run(config.run_id)
    if (finished := run.result()) is not None and "RANK" not in os.environ:
        run.tidy()
        return finished
    with distributed.world(config) as world:
        return _train(config, run, world, progress, stop, lease)


def _train(
    config: RunConfig, run: Run, world: World, progress: Progress | None, stop: Callable[[], bool] | None, lease: Lease | None
) -> Result:
    """`train` in one of the processes of `world`. Rank 0 reads and writes the run folder and decides for the others."""
    if (finished := world.on_rank0(run.result)) is not None:
        return finished
    config = world.on_rank0(lambda: with_stored_execution(config, run))
    start = world.on_rank0(lambda: branch_checkpoint(config, run))
    world.on_rank0(lambda: load_data(config, run).data_hash)  # prepares the token files, which the others then only open
    data, env = load_data(config, run), world.on_rank0(run.env)
    if config.teacher.source:
        check_teacher(config, data.meta.vocab_size, tokenizer_of(data))
    device = pick_device(config.train.device, world)
    if device.type == "cpu":
        keep_memory()
    threads_before = env.get("threads") if world.size == 1 else None
    threads = int(threads_before or config.train.threads or distributed.threads_each())
    with execution(threads, device), StopSignals() as signals, ExitStack() as stack:

        def stopping() -> bool:
            return world.any(signals.received is not None or (stop is not None and stop()))

        path = path_of(config, env, device.type)
        trainer = Trainer(config, data, device, stop=stopping, world=world, compiled=path)
        writer: RunWriter = NullRunWriter(run, config) if world.rank else run.open_for_training(config, lease=lease)
        trackers = () if world.rank else from_environment()
        world.on_rank0(lambda: stack.enter_context(writer) and None)
        if world.rank == 0:
            writer.listeners.append(stack.enter_context(mirrored(run, config, trackers)).log)
        stack.enter_context(recorded(writer, trainer))
        if (finished := world.on_rank0(run.result)) is not None:  # another process finished it before the lease was claimed
            return finished
        trainer.resume(run, start)
        record = {**text_record(data), "threads": threads, "compiled": path, "attempt": environment.attempt(device, world.size)}
        trunk = run.sibling(config.branch.source) if config.branch and start else None
        world.on_rank0(lambda: writer.begin(step=trainer.counters.step, steps=config.train.steps, env=record, trunk=trunk))
        try:
            return trainer.fit(writer, progress if world.rank == 0 else None)
        except Interrupted:
            raise trainer.preempted(writer, signals.received) from None


# --- device and execution ---------------------------------------------------------------------------------------------


def pick_device(name: str, world: World = SINGLE_PROCESS) -> torch.device:
    """The device that `train.device` names; `auto` is CUDA if it is available, else the CPU.

    Each of several processes takes the CUDA device of its local rank. Raises UsageError if the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{world.local_rank}" if name.startswith("cuda") and world.size > 1 else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"train.device: '{name}' is not on this machine, which has {torch.cuda.device_count()} CUDA devices.")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device, whatever the device of the tensors
    return device


@contextmanager
def execution(threads: int, device: torch.device) -> Iterator[None]:
    """Fix the number of threads and, on a CPU, deterministic kernels, which together determine the last bits of every result.

    Both are restored at the end of the `with` block.
    """
    memory: Any = torch.utils.deterministic
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_num_threads(threads)
    if device.type == "cpu":
        torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms, which imports the compiler (1.5 s)
        memory.fill_uninitialized_memory = False  # filling costs a pass over every new tensor
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_deterministic_debug_mode(before[1])
        memory.fill_uninitialized_memory = before[2]


@contextmanager
def recorded(writer: RunWriter, trainer: Trainer) -> Iterator[None]:
    """Record an unexpected error as the state `failed` with one sentence, even if the disk is full."""
    try:
        yield
        trainer.saving.wait()
    except Exception as e:
        trainer.saving.join()
        if isinstance(e, QuestError) and not isinstance(e, StorageError):  # diverged, preempted, …: already recorded
            raise
        if distributed.of_lost_rank(e):  # the run has not failed: it goes on from its checkpoint
            raise
        error = _as_failure(e, writer.run, trainer.rows)
        try:
            writer.set_state("failed", trainer.counters.step, str(error) or type(error).__name__)
        except LeaseLost:  # the error is that a successor removed what this process was writing
            raise
        except QuestError:
            pass
        raise error from e


def _as_failure(e: Exception, run: Run, rows: int) -> Exception:
    if isinstance(e, OSError) and not isinstance(e, StorageError):
        return StorageError(f"{e.filename or run.path}: cannot be written: {e.strerror or e}; the last checkpoint is intact.")
    if isinstance(e, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(e):
        return OutOfMemory(f"out of memory at {rows} sequences per backward pass; set train.micro_batch to a smaller divisor.")
    return e


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclass
class Counters:
    """The state of a run between steps, apart from weights and moments. Every checkpoint contains it.

    A window is the steps since the last metrics line. The level of loss or gradient norm is its mean over the windows before
    the present one: of all until there are `LEVEL_WINDOWS`, and from then on a running mean with weight 1/`LEVEL_WINDOWS`.
    """

    step: int = 0  # optimizer steps done
    window: int = 0  # steps in the present window
    loss_sum: float = 0.0  # over the window, nats/token
    norm_sum: float = 0.0  # over the window
    divergence_sum: float = 0.0  # from a teacher, over the window, nats/token
    loss_peak: float = 0.0  # largest loss of the window
    loss_level: float = 0.0
    norm_level: float = 0.0
    windows: int = 0  # in the levels, at most `LEVEL_WINDOWS`
    streak: int = 0  # consecutive steps above a limit (train.diverged_loss, train.diverged_grad_norm)
    seconds: float = 0.0  # in the loop
    step_seconds: float = 0.0  # of these, in steps
    peak_memory_bytes: int = 0

    def end_window(self, loss: float, norm: float) -> dict[str, float]:
        """Compare the window's mean loss and gradient norm with their levels, update the levels, and begin a new window."""
        comparisons = {}
        if self.windows:
            comparisons[metrics.LOSS_SPIKE] = max(0.0, self.loss_peak - self.loss_level)
            if self.norm_level:
                comparisons[metrics.GRAD_NORM_GROWTH] = norm / self.norm_level
        self.windows = min(self.windows + 1, LEVEL_WINDOWS)
        self.loss_level += (loss - self.loss_level) / self.windows
        self.norm_level += (norm - self.norm_level) / self.windows
        self.window = 0
        return comparisons


class Trainer:
    """Model, optimizer and counters of one run, or of one process's part of it if several processes train it."""

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        device: torch.device,
        *,
        stop: Callable[[], bool],
        world: World = SINGLE_PROCESS,
        compiled: bool | None = None,
    ) -> None:
        """Build the model, `compiled` or not, by default as the config says.

        Raises UsageError, which names the layer, if a quantizer spec does not fit it.
        """
        t = config.train
        self.config, self.data, self.device, self.stop, self.world = config, data, device, stop, world
        self.rows = min(t.micro_batch or t.batch_size, t.batch_size // world.size)  # sequences per backward pass
        self.sharded = world.size > 1 and t.parallel == "fsdp"
        self.compiled = compiles(config, device.type) if compiled is None else compiled
        self.saving = checkpoint.Background()
        self._stages = dict(config.stages)
        self._text = windows_of(data, "train", config.data)
        self.teacher = Teacher(config, device) if config.teacher.source else None
        self._build(0)
        self.counters = Counters()
        self._saved = 0  # step of the newest checkpoint
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # over the window: loss, gradient norm, good steps
        self._divergence = torch.zeros((), dtype=torch.float64, device=device)  # from a teacher, over the window
        self._peak = torch.zeros((), dtype=torch.float64, device=device)  # largest loss of the window
        self._bad = torch.zeros((), device=device)  # 1 from the first bad step on
        self._streak = torch.zeros((), dtype=torch.float64, device=device)  # consecutive steps above a limit
        limits = [t.diverged_loss or math.inf, t.diverged_grad_norm or math.inf, math.inf]
        self._limits = torch.tensor(limits, dtype=torch.float64, device=device) if min(limits) < math.inf else None

    def _build(self, first: int) -> None:
        """Build the model, with initial weights, and the optimizer of the stage whose first step is `first`."""
        config, t = self.config, self.config.train
        shape = config.with_vocabulary(self.data.meta.vocab_size).model
        self.first = first
        self.model = initial_model(shape, self._stages[first], t.seed, rotate_back=config.rotate_back).to(self.device)
        self.model.recomputes = t.checkpoint_activations
        freeze(self.model, config.frozen)
        use_kernels(self.model, t.kernels, self.device)
        self.optimizer = Optimizer(self.model, config.optim, group_rates(config))
        self._use(self.model)
        self._draws = any(isinstance(m, Quantizer) and m.spec.draws for m in self.model.modules())
        learns = bool(learned_scales(self.model))
        self._calibrations = calibration_steps(config, first) if learns else frozenset()

    def _use(self, model: torch.nn.Module, replica: DistributedDataParallel | None = None) -> None:
        """Train `model`: the model itself or, if several processes train it, its `replica` in DDP's wrapper."""
        self._plain, self._replica = model, replica
        self._forward = self._compiled(model)
        self._proven = self._forward is model  # whether a forward and a backward pass have succeeded
        self._joined = self._forward is self.model and self.device.type == "cpu"  # weights are quantized together
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._layers = quantized_layers(self.model)  # found once: walking through the modules takes part of a small step
        self._first = FirstSteps(self.model)

    # one step

    def loss(self, tokens: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """The mean loss (), in nats/token, of what `packing.parts` returns, in the run's precision."""
        with self._precision():
            return self._called(tokens, *others)

    def objective(self, tokens: torch.Tensor, targets: torch.Tensor, *first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a step minimizes (), and what it reports: the loss () or, with a teacher, [loss, divergence] (2,)."""
        if self.teacher is None:
            loss = self.loss(tokens, targets, *first)
            return loss, loss.detach()
        with self._precision():
            logits = self._called(tokens, None, *first)
        return self.teacher.losses(logits, tokens, targets, *first)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def _compiled(self, model: torch.nn.Module) -> Callable[..., torch.Tensor]:
        if not self.compiled:
            return model
        keep_compiled_code()
        forward: Callable[..., torch.Tensor] = model
        return torch.compile(forward)

    def _called(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """The model's output. Without gradients on a CPU it is never compiled: a validation takes less time than compiling."""
        if not torch.is_grad_enabled():
            if not self._compiles_validation:
                out: torch.Tensor = self._plain(*inputs)
                return out
            if self._forward is not self._plain:
                for x in inputs:  # the last batch is smaller, and would else be compiled separately
                    if x is not None:
                        torch._dynamo.maybe_mark_dynamic(x, 0)
        try:
            return self._forward(*inputs)
        except Exception as e:
            self._fall_back(e)
            return self._forward(*inputs)

    @property
    def _compiles_validation(self) -> bool:
        return self.device.type != "cpu"

    def _fall_back(self, e: Exception) -> None:
        """Go on without torch.compile, with a warning that names what failed; raises `e` if it cannot be the compiler's."""
        if self._forward is self._plain or isinstance(e, QuestError | MemoryError | torch.OutOfMemoryError):
            raise e
        cause = getattr(e, "inner_exception", e)  # the compiler's own wrapper names no cause in its first line
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        warnings.warn(
            f"train.compile: torch.compile fails ({type(cause).__name__}: {reason[:160]}); it trains without.", stacklevel=2
        )
        self._forward, self.compiled = self._plain, False

    def batch(self, step: int, world: World = SINGLE_PROCESS) -> torch.Tensor:
        """The sequences of a step, as `packing.parts` takes them, on the device; with `world` only this process's share."""
        t, text = self.config.train, self._text
        which = {"seed": t.seed, "step": step, "batch_size": t.batch_size, "rank": world.rank, "world_size": world.size}
        rows = (
            text.batch(**which) if isinstance(text, Packing) else sampler.batch(text, seq_len=self.config.data.seq_len, **which)
        )
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def shares(self, pieces: Sequence[torch.Tensor]) -> Sequence[float | torch.Tensor]:
        """The weight of the mean of each piece of this process's batch, such that all targets that count weigh the same."""
        if not isinstance(self._text, Packing):
            n = sum(map(len, pieces))
            return [len(piece) / n for piece in pieces]
        counts = torch.stack([(piece[:, 1] != IGNORED).sum() for piece in pieces]).float()
        of_all = self.world.sum(counts.sum())
        return list(counts * (self.world.size / of_all.clamp(min=1)))

    def forward_backward(self, step: int) -> torch.Tensor:
        """Compute the gradients of step `step`; returns what `objective` reports of this process's sequences.

        If the first step fails in compiled code, which may happen as late as in the backward pass, it is repeated uncompiled.
        """
        try:
            if not self._proven and self._forward is not self._plain:
                self._make_constants(step)
            report = self._gradients(step)
        except Exception as e:
            if self._proven:
                raise
            self._fall_back(e)
            self.model.zero_grad()
            report = self._gradients(step)
        self._proven = True
        return report

    def _make_constants(self, step: int) -> None:
        """Compute one sequence without the compiler, so that graphs find the constants in their cache (`components.memo`)."""
        with self._eager(), self._drawing(step, 0, 1):
            self.objective(*parts(self.batch(step)[:1]))[0].backward()
        self.model.zero_grad()

    def _gradients(self, step: int) -> torch.Tensor:
        batch = self.batch(step, self.world)
        total = torch.zeros(() if self.teacher is None else 2, device=self.device)
        pieces = batch.split(self.rows)
        once = self.world.size == 1 and (len(pieces) > 1 or self._joined)  # DDP and FSDP2 need complete passes
        with quantized_once(self._layers, once):
            for i, (part, share) in enumerate(zip(pieces, self.shares(pieces), strict=True), 1):
                first = self.world.rank * len(batch) + (i - 1) * self.rows
                with self._averaging(i == len(pieces)), self._drawing(step, first, len(part)):
                    loss, reported = self.objective(*parts(part))
                    (loss * share).backward()
                total += reported * share
        return total

    def _drawing(self, step: int, first: int, rows: int) -> AbstractContextManager[None]:
        """Draw this step's noise for rows `first`, … of its batch: the same if a run is resumed or the batch is split."""
        if not self._draws:
            return nullcontext()
        torch.manual_seed((self.config.train.seed << 32) + step)
        of = self.config.train.batch_size
        return as_part(self.model, first, of) if rows < of else nullcontext()

    def _averaging(self, is_last: bool) -> AbstractContextManager[None]:
        """Average gradients over the processes only in the last backward pass of a step."""
        if self.sharded:
            self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        elif self._replica is not None and not is_last:
            return self._replica.no_sync()
        return nullcontext()

    def step(self) -> None:
        """Take one optimizer step, without waiting for the device."""
        c, optim = self.counters, self.config.optim
        if c.step in self._calibrations:
            self.calibrate()
        loss, *divergence = (self.world.sum(self.forward_backward(c.step)) / self.world.size).view(-1)
        self._first.look()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = distributed.gathered(torch.nn.utils.get_total_norm(gradients))
        if optim.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, optim.grad_clip, norm)
        finite = torch.stack([loss.double(), norm.double(), torch.ones_like(loss, dtype=torch.float64)])
        bad = ~finite.isfinite().all()
        if self._limits is not None:
            above = (finite > self._limits).any()
            self._streak.copy_(torch.where(self._bad.bool(), self._streak, (self._streak + 1) * above))
            bad |= self._streak >= self.config.train.diverged_steps
        self._bad.copy_(torch.maximum(self._bad, bad.to(self._bad)))
        good = torch.where(self._bad.bool(), 0.0, finite)
        self._sums += good
        self._peak.copy_(torch.maximum(self._peak, good[0]))
        if divergence:
            self._divergence += torch.where(self._bad.bool(), 0.0, divergence[0].double())
        steps = self.config.train.steps
        self.optimizer.step(learning_rate(c.step, steps, optim), skip=self._bad, step=c.step, of=steps)
        for p in self._parameters:
            p.grad = None
        c.step += 1
        c.window += 1

    @torch.no_grad()
    def calibrate(self) -> None:
        """Set the learned scales from the batch of the present step, unless a step before it was bad.

        The result is a function of weights and step alone. All processes take that of rank 0.
        """
        before = {name: p.clone() for name, p in distributed.whole(learned_scales(self.model)).items()}
        values = calibrate_scales(self.model, self.calibration_batch())
        new = torch.cat([torch.where(self._bad.bool(), value, values[name]).flatten() for name, value in before.items()])
        parts = self.world.from_rank0(new).split([value.numel() for value in before.values()])
        parameters = learned_scales(self.model)
        for (name, value), part in zip(before.items(), parts, strict=True):
            distributed.local(parameters[name]).copy_(distributed.share(part.view(value.shape), parameters[name]))

    def calibration_batch(self) -> torch.Tensor:
        """The inputs (B, T) from which the present step sets learned scales.

        A run that sets them only once, before the first step, takes the whole batch, as earlier versions did.
        """
        rows = max(1, CALIBRATION_TOKENS // self.config.data.seq_len) if self.config.optim.scale_calibrations else None
        inputs: torch.Tensor = parts(self.batch(self.counters.step)[:rows])[0]
        return inputs

    # the whole run

    def resume(self, run: Run, start: Path | None = None) -> None:
        """Load weights, moments and counters from the run's newest intact checkpoint, else from its trunk's, `start`.

        The model is that of the stage that made the checkpoint, because the report of its step may have to be repeated.
        """
        if self.world.size > 1:
            path = self.world.on_rank0(
                lambda: checkpoint.find_latest(run.checkpoints_path) or (start and checkpoint.verify(start))
            )
            if path is not None:
                self._build_for(checkpoint.step_of(path))
            state = self._distribute(path)
        elif (saved := checkpoint.load_latest(run.checkpoints_path) or (checkpoint.load(start) if start else None)) is not None:
            self._build_for(saved.step)
            state = self._take(saved)
        else:
            state = None
        if state is None:
            return
        c = self.counters = Counters(**state)
        self._sums.copy_(torch.tensor([c.loss_sum, c.norm_sum, c.window], dtype=torch.float64))
        self._divergence.fill_(c.divergence_sum)
        self._peak.fill_(c.loss_peak)
        self._streak.fill_(c.streak)
        self._saved = c.step

    def _build_for(self, step: int) -> None:
        """Build the model of the stage that a checkpoint of `step` steps is from, unless it is the present one."""
        first = max((s for s in self._stages if s < step), default=0)
        if first != self.first:
            self._build(first)

    def switch(self, writer: RunWriter) -> None:
        """Begin the stage that starts with the present step, from a checkpoint of the stage before it.

        Weights and moments go on, and so do the counters. Learned scales are new: they are set from data before the step.
        """
        self.saving.wait()
        path = writer.run.checkpoints_path / checkpoint_name(self.counters.step)
        if not self.world.on_rank0(path.exists):  # a resumed run has it already
            self.save(writer)
            self.saving.wait()
        before = {*learned_scales(self.model)}
        self._build(self.counters.step)
        fresh = before | {*learned_scales(self.model)}
        if self.world.size > 1:
            self._distribute(path, fresh)
        else:
            self._take(checkpoint.load(path), fresh)

    def _take(self, saved: checkpoint.Checkpoint, fresh: Set[str] = frozenset()) -> dict[str, Any]:
        """Load the weights and moments of a checkpoint, but not of the parameters `fresh`; returns its counters."""

        def merged(stored: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            kept = {key: t for key, t in own.items() if _parameter(key) in fresh}
            return kept | {key: t for key, t in stored.items() if _parameter(key) not in fresh}

        try:
            self.model.load_state_dict(merged(saved.model, self.model.state_dict()))
        except RuntimeError as e:
            raise DataError(f"checkpoint: step {saved.step} does not fit the model: {e}.") from e
        self.optimizer.load(merged(saved.optimizer, self.optimizer.tensors()), saved.step)
        return saved.state

    def _distribute(self, path: Path | None, fresh: Set[str] = frozenset()) -> dict[str, Any] | None:
        """Distribute the model over the processes, and load a checkpoint, if any, as `_take` does; returns its counters."""
        state = None
        if self.sharded:
            distributed.shard(self.model, self.world, self.device)
            self.optimizer = Optimizer(self.model, self.config.optim, group_rates(self.config))
            self._use(self.model)
            if path is not None:
                tensors = {**self.model.state_dict(), **self.optimizer.tensors()}
                stored = {key: t for key, t in tensors.items() if _parameter(key) not in fresh}
                state = checkpoint.load_into(path, stored, self.world)
                self.optimizer.set_step(state["step"])
        else:
            if path is not None:
                state = self._take(checkpoint.load(path), fresh)
            replica = distributed.replicate(self.model, self.device)
            self._use(replica, replica)
        return state

    def fit(self, writer: RunWriter, progress: Progress | None) -> Result:
        """Train from the counters' step to the end. Raises Interrupted if `stop` asks for it, and Diverged."""
        c, t = self.counters, self.config.train
        keep_steps = {int(step) for step in t.keep_steps.split(",") if step}
        checkpoint_every = t.steps_between_checkpoints
        self._last_tick, self._reported = time.perf_counter(), (c.step, c.step_seconds)
        was_compiled = self.compiled
        self._warm: tuple[int, float] | None = None  # steps and step_seconds after the first step of this process
        line: dict[str, Any] = {} if t.steps else self.untrained(writer)
        while True:
            self.saving.check()
            if self.stop():
                raise Interrupted
            if c.window and (c.step % t.log_every == 0 or self._evaluates(c.step) or c.step == t.steps):
                line = self.report(writer, progress)
            if c.step == t.steps:
                return self.finish(writer, line)
            if c.step in self._stages and c.step != self.first:
                self.switch(writer)
            self.step()
            if self._first.over(c.step == t.steps):
                self.raise_if_lost(writer)
            if self._warm is None:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self._tick(steps=True)
                self._warm = c.step, c.step_seconds
                if was_compiled and not self.compiled:
                    writer.record({"compiled": False})  # what has failed here does not succeed in another attempt
            if c.step in keep_steps:
                self.keep(writer)
            if c.step % checkpoint_every == 0 or c.step == t.steps:
                self.save(writer)

    def untrained(self, writer: RunWriter) -> dict[str, Any]:
        """Write the one metrics line of a run without steps, which takes a checkpoint as it is; returns the line."""
        if 0 in self._calibrations:
            self.calibrate()
        length, rows = self.config.data.seq_len, self.rows
        of_text = evaluate(
            self.loss,
            self._text,
            seq_len=length,
            max_tokens=TRAIN_TOKENS,
            batch_size=rows,
            device=self.device,
            stop=self.stop,
            world=self.world,
        )
        line = {metrics.STEP: 0, metrics.TOKENS: 0, metrics.TRAIN_LOSS: of_text, metrics.VAL_LOSS: self.validate(writer)}
        writer.log(line, {metrics.STEP: 0, metrics.TOKENS_PER_S: 0.0, metrics.STEP_TIME: 0.0})
        return line

    def _evaluates(self, step: int) -> bool:
        every = self.config.train.eval_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def report(self, writer: RunWriter, progress: Progress | None) -> dict[str, Any]:
        """Write the metrics line of the present window, which has at least one step, and show it; returns the line."""
        c, t = self.counters, self.config.train
        self.raise_if_diverged(writer)
        tokens = t.batch_size * self.config.data.seq_len
        loss, norm = c.loss_sum / c.window, c.norm_sum / c.window
        line: dict[str, Any] = {
            metrics.STEP: c.step,
            metrics.TOKENS: c.step * tokens,
            metrics.TRAIN_LOSS: loss,
            metrics.LR: learning_rate(c.step - 1, t.steps, self.config.optim),
            metrics.GRAD_NORM: norm,
        }
        if self.teacher is not None:
            line[metrics.TEACHER_KL] = c.divergence_sum / c.window
        if self._evaluates(c.step):
            line[metrics.VAL_LOSS] = self.validate(writer)
            if self.optimizer.average:
                with self.optimizer.average.swapped(c.step):
                    line[metrics.VAL_LOSS_AVERAGE] = self.validate(writer)
        health_every = t.health_every or -(-t.steps // HEALTH_CHECKS)
        if c.step == t.steps or c.step // health_every > (c.step - c.window) // health_every:
            line |= self.operand_shares()
        line |= c.end_window(loss, norm)
        since, seconds = c.step - self._reported[0], c.step_seconds - self._reported[1]
        if not since:  # resumed between a checkpoint and the report of its step: the report is repeated
            since, seconds = c.step, c.step_seconds
        per_step = seconds / since
        speed = tokens / per_step if per_step else 0.0
        writer.log(line, {metrics.STEP: c.step, metrics.TOKENS_PER_S: speed, metrics.STEP_TIME: per_step * 1e3})
        if progress:
            progress(
                step=c.step,
                steps=t.steps,
                loss=line[metrics.TRAIN_LOSS],
                tokens_per_s=speed,
                eta_s=(t.steps - c.step) * self._usual_step(per_step),
            )
        self._reported = c.step, c.step_seconds
        for of_window in (self._sums, self._peak, self._divergence):
            of_window.zero_()
        return line

    def _usual_step(self, per_step: float) -> float:
        """Seconds per step without this process's first one, which is slow; NaN before there is a second, else `per_step`."""
        c = self.counters
        if self._warm is None or self._warm[0] <= self._reported[0]:
            return per_step
        return (c.step_seconds - self._warm[1]) / (c.step - self._warm[0]) if c.step > self._warm[0] else math.nan

    def operand_shares(self) -> dict[str, Any]:
        """Trust and saturation of every operand, on the first sequences of the last step."""
        tokens, _, *first = parts(self.batch(self.counters.step - 1)[: health.SEQUENCES])
        with self._precision():
            shares = health.operand_shares(self.model, lambda: self.model(tokens, None, *first))
        self._tick()
        return shares

    def validate(self, writer: RunWriter) -> float:
        """The validation loss in nats/token. Raises Diverged if it is not finite, and Interrupted if `stop` asks for it."""
        c, t = self.counters, self.config.train
        loss = evaluate(
            self.loss,
            windows_of(self.data, "val", self.config.data),
            seq_len=self.config.data.seq_len,
            max_tokens=t.eval_tokens,
            batch_size=self.rows,
            device=self.device,
            stop=self.stop,
            world=self.world,
        )
        self._tick()
        if not math.isfinite(loss):
            raise self.diverged(writer, c.step, "validation loss is not finite")
        return loss

    def raise_if_diverged(self, writer: RunWriter) -> None:
        """Wait for the device, and update the counters. Raises Diverged if a step of the window was bad."""
        c, t = self.counters, self.config.train
        window = torch.cat([self._sums, self._peak[None], self._streak[None], self._divergence[None]])
        c.loss_sum, c.norm_sum, good, c.loss_peak, streak, c.divergence_sum = window.tolist()
        self._tick(steps=True)
        c.streak = int(streak)
        if good == c.window:
            return
        c.step, c.window = c.step - c.window + int(good), int(good)  # no step after the first bad one was applied
        if c.streak >= t.diverged_steps and self._limits is not None:
            c.streak -= 1
            loss, norm, _ = self._limits.tolist()
            above = [f"{what} above {x:g}" for what, x in (("loss", loss), ("gradient norm", norm)) if x < math.inf]
            raise self.diverged(writer, c.step, f"{' or '.join(above)} in {t.diverged_steps} steps in a row")
        if self.sharded:
            what = "loss or gradient norm is not finite"
        else:
            with self._eager():
                names = self.world.all(first_nonfinite(self.model, lambda: float(self.forward_backward(c.step).sum())))
            what = next((name for name in names if name not in UNNAMED), names[0])
        raise self.diverged(writer, c.step, what)

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """Compute steps inside a `with` block on the model itself, without the compiler and DDP."""
        before = self._forward, self._plain, self._replica, self._joined
        self._forward, self._plain, self._replica, self._joined = self.model, self.model, None, False
        try:
            yield
        finally:
            self._forward, self._plain, self._replica, self._joined = before

    def raise_if_lost(self, writer: RunWriter) -> None:
        """Raises RunFailed if no gradient has reached a quantized layer in the first steps that should have."""
        silent = set.intersection(*map(set, self.world.all(list(self._first.silent))))
        if not silent:
            return
        step = self.counters.step
        with self._eager():
            lost_layers = self.world.all(lost(self.model, silent, lambda: self.forward_backward(step - 1)))
        if names := [name for name in self._first.silent if any(name in of_process for of_process in lost_layers)]:
            message = (
                f"{names[0]}: its gradient is zero in each of the first {min(step, FIRST_STEPS)} steps, but not by the formula "
                f"of its quantizers ({len(names)} layers in all): steps are computed wrongly here. `questctl doctor --train` "
                "says in which way; train it anew with train.compile=off and train.kernels=reference."
            )
            writer.set_state("failed", step, message)
            raise RunFailed(f"{writer.run.name}: {message}")

    def diverged(self, writer: RunWriter, step: int, what: str) -> Diverged:
        """Keep the last good state as a checkpoint, and record the state `diverged`; returns the error to raise."""
        if step > self._saved:
            self._write_checkpoint(writer)
        self.saving.wait()
        message = f"diverged at step {step}/{self.config.train.steps}: {what}; the state before it is kept."
        writer.set_state("diverged", step, message)
        return Diverged(f"{writer.run.name}: {message}")

    def preempted(self, writer: RunWriter, received: signal.Signals | None) -> BaseException:
        """Write a checkpoint, and record the state `preempted`; returns the exception to raise."""
        c = self.counters
        if c.step > self._saved:
            self.save(writer)
        self.saving.wait()
        by = received.name if received else "its caller"
        message = f"stopped by {by} at step {c.step}/{self.config.train.steps}; repeat the command to resume."
        writer.set_state("preempted", c.step, message)
        return KeyboardInterrupt() if received == signal.SIGINT else Preempted(f"{writer.run.name}: {message}")

    def save(self, writer: RunWriter) -> None:
        """Write a checkpoint of this step. Raises Diverged if a step before it was bad."""
        self.raise_if_diverged(writer)
        self._write_checkpoint(writer)
        writer.set_state("running", self.counters.step)
        self._tick()

    def keep(self, writer: RunWriter) -> None:
        """Write a checkpoint of this step that is kept for branches, after its metric lines have reached the disk."""
        self.raise_if_diverged(writer)
        writer.check()
        writer.sync()
        self._save_to(writer.run.kept_path, keep=0)
        self._tick()

    def _write_checkpoint(self, writer: RunWriter) -> None:
        writer.sync()
        self._save_to(writer.run.checkpoints_path)
        self._saved = self.counters.step

    def _save_to(self, folder: Path, **how: int) -> None:
        """Copy the state, and write it in the background while training continues; waits for the write before it."""
        self.saving.wait()
        c = self.counters
        state = checkpoint.Checkpoint(c.step, self.model.state_dict(), self.optimizer.tensors(), asdict(c))
        copy, world = checkpoint.snapshot(state), self.world.in_background
        self.saving.start(lambda: checkpoint.save(folder, copy, world=world, **how))

    def finish(self, writer: RunWriter, line: dict[str, Any]) -> Result:
        """Write the weights and then the result, which it returns."""
        c, config, t = self.counters, self.config, self.config.data
        about = {"run": writer.run.name, "config": config.experiment, "data_hash": self.data.data_hash}
        self.saving.wait()
        weights = distributed.whole(self.model.state_dict())
        if self.world.rank == 0:
            writer.write_model(checkpoint.model_bytes(weights, about))
        if self.optimizer.average:
            with self.optimizer.average.swapped(c.step):
                weights = distributed.whole(self.model.state_dict())
                if self.world.rank == 0:
                    writer.write_average(checkpoint.model_bytes(weights, about))
        loss = line[metrics.VAL_LOSS]
        result = Result(
            **describe(config),
            loss=loss,
            bits_per_byte=bits_per_byte(loss, self.data.meta.val.bytes_per_token),
            train_loss=line[metrics.TRAIN_LOSS],
            model_bits=model_bits(self.model),
            flops=self.flops(),
            tokens_per_s=config.tokens / c.step_seconds if c.step else 0.0,
            seconds=c.seconds,
            peak_memory_bytes=c.peak_memory_bytes,
            data_hash=self.data.data_hash,
            params_total=count_parameters(self.model).total,
            steps=c.step,
            val_tokens=evaluated_tokens(windows_of(self.data, "val", t), t.seq_len, config.train.eval_tokens),
            attempts=writer.status.attempts,
            device=environment.device_name(self.device),
            loss_average=line.get(metrics.VAL_LOSS_AVERAGE),
        )
        writer.finish(result)
        inputs = clamped_operands(line, ["activation"])  # clamped weights are no cause to warn: `runs health` reports them
        for sentence in inputs if self.world.rank == 0 else ():
            warnings.warn(f"{writer.run.name}: {sentence} at the end of its training.", stacklevel=2)
        return result

    def flops(self) -> float:
        """Operations of all steps, those of a teacher's forward pass included."""
        config = self.config
        a_token = count_flops(self.model, config.data.seq_len).training
        a_token += self.teacher.flops_per_token(config.data.seq_len) if self.teacher else 0
        return float(a_token * config.tokens + config.optimizer_flops * self.counters.step)

    def _tick(self, *, steps: bool = False) -> None:
        """Add the time since the last call to the counters; with `steps` it was spent in optimizer steps."""
        c, now = self.counters, time.perf_counter()
        c.seconds += now - self._last_tick
        c.step_seconds += (now - self._last_tick) * steps
        self._last_tick = now
        c.peak_memory_bytes = max(c.peak_memory_bytes, environment.peak_memory(self.device))


def _parameter(key: str) -> str:
    """The parameter to which a tensor of a checkpoint belongs: `blocks.0.q.weight` for `blocks.0.q.weight/exp_avg`."""
    return key.partition("/")[0]
