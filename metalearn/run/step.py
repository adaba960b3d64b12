"""A run while it is meta-trained: all that changes, one meta-step, and how it is kept and found again."""

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils import _pytree as pytree

from metalearn.config.schema import TrainConfig
from metalearn.run import optimisers
from metalearn.run.build import Run
from metalearn.run.meter import Meter
from metalearn.system.errors import UserError
from metalearn.tasks.types import Estimate, Params, State

#: Version of the content of last.pt; older ones cannot be resumed.
FORMAT = 2


@dataclasses.dataclass
class Best:
    """The best state by validation, its score, and how long ago it was: `since` validations."""

    estimate: Estimate
    step: int
    state: State
    since: int = 0


class Training:
    """The state of a run, the optimiser's, what has been seen since the last row of figures, and the best so far.

    step: meta-steps taken; reads_host: whether values may be read on the host, which costs nothing on a CPU; engine: what takes the next one, another object where the method enters another stage. The tensors are
    the same throughout, changed in place: a CUDA graph reads and writes them where they lie.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._settings = run, run.config.train
        self.state = State(
            run.state.params, {name: value.clone() for name, value in run.state.buffers.items()}
        )
        self._leaves = list(self.state.params.values())
        self.optimiser = optimisers.make(run.config.optimiser, self._settings.lr, self._leaves)
        self._own_first, self._own_count = run.processes.share(self._settings.meta_batch)
        self.reads_host = run.device.type == "cpu"
        self.has_stepped = False  # then the optimiser has all of its state, which may be none
        self._classes = hashlib.sha256(
            repr(run.class_names).encode()
        ).hexdigest()  # which are in which split
        self._steps_done = torch.zeros((), dtype=torch.int64, device=run.device)
        self.step = 0
        self.engine = run.train_engine
        self._enter_stage()
        self.best: Best | None = None
        self.meter = Meter(run.device)

    def meta_step(self) -> None:
        """Take one step on the device without reading a value on the host.

        A step whose loss or gradient is not finite changes nothing: no weight, no buffer, no state of the optimiser.
        """
        run, settings, buffers = self._run, self._settings, self.state.buffers
        progress = self._steps_done.to(torch.float32) / settings.steps
        with record_function("draw tasks"):
            tasks = run.train.draw(
                self._steps_done * settings.meta_batch + self._own_first, self._own_count
            )
        with record_function("gradients"):
            step = self.engine.step(self.state, tasks, progress, settings.meta_batch)
            losses = run.processes.placed(step.losses, settings.meta_batch)
            gradients, logs, statistics, new, losses = run.processes.summed((*step[:4], losses))
        with record_function("optimiser"):
            values = pytree.tree_leaves((gradients, logs, statistics, new))
            finite = torch.stack([value.isfinite().all() for value in values]).all()
            for leaf, gradient in zip(
                self._leaves, clip_gradients(gradients, settings), strict=True
            ):
                leaf.grad = gradient
            self._optimise(finite)
            seen = {
                name: torch.where(finite, value, buffers[name])
                for name, value in statistics.items()
            }
            fold(buffers, seen, settings.statistics_momentum)
            for name, value in new.items():
                buffers[name].copy_(
                    torch.where(finite, value.to(buffers[name].dtype), buffers[name])
                )
            self.meter.add(logs, finite, self._steps_done, losses)
            self._steps_done.add_(1)

    def _optimise(self, finite: Tensor) -> None:
        """Let the optimiser take a step, if `finite`.

        On a device other than the CPU, what it changed is put back where the step is not finite, so that nothing is read on the
        host. That needs its state to exist and to be on the device, which is not so at the first step.
        """
        state = [
            value
            for one in self.optimiser.state.values()
            for value in one.values()
            if isinstance(value, Tensor)
        ]
        tensors = [*self._leaves, *state]
        if self.reads_host or not self.has_stepped or any(t.device != finite.device for t in state):
            if finite:
                self.optimiser.step()
                self.has_stepped = True
            return
        before = [value.detach().clone() for value in tensors]
        self.optimiser.step()
        with torch.no_grad():
            for value, old in zip(tensors, before, strict=True):
                value.copy_(torch.where(finite, value, old))

    def count(self) -> None:
        """Do the host's part of a meta-step: count it, and set the learning rate of the next one."""
        self.step += 1
        self._set_learning_rate()
        self.meter.count(self._settings.meta_batch)
        self._enter_stage()

    def _set_learning_rate(self) -> None:
        lr = optimisers.learning_rate(self._settings, self.step)
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # a CUDA graph reads this tensor
            else:
                group["lr"] = lr

    def _enter_stage(self) -> None:
        engine = self._run.train_engine.at(self.step / max(1, self._settings.steps))
        if engine != self.engine:
            self.engine = engine

    def validated(self, estimate: Estimate) -> bool:
        """Takes note of a validation. Returns: whether it is the best so far."""
        if self.best is not None and not self._run.metric.better(
            estimate.mean, self.best.estimate.mean
        ):
            self.best.since += 1
            return False
        state = State(
            *({name: value.detach().clone() for name, value in part.items()} for part in self.state)
        )
        self.best = Best(estimate, self.step, state)
        return True

    def kept(self) -> dict[str, Any]:
        """All of it, as tensors and plain data."""
        return {
            **self._weights(self.step, self.state),
            "format": FORMAT,
            "optimiser": self.optimiser.state_dict()["state"],
            "meter": self.meter.kept(),
            "best": self.kept_best() | {"since": self.best.since} if self.best else None,
            "classes": self._classes,
        }

    def kept_best(self) -> dict[str, Any]:
        """The best state, as tensors and plain data."""
        assert self.best is not None
        return self._weights(self.best.step, self.best.state) | {
            "val": dataclasses.asdict(self.best.estimate)
        }

    def _weights(self, step: int, state: State) -> dict[str, Any]:
        return {
            "step": step,
            "meta": state.params,
            "fixed": state.buffers,
            "spec": dataclasses.asdict(self._run.spec),
            "standardisation": self._run.standardisation,
            "content_hash": self._run.content_hash,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Restore the training state from a checkpoint, on any device. Raises UserError if the data or the format differ."""
        device = self._run.device
        if kept.get("format") != FORMAT:
            raise UserError(
                "the checkpoint was made by another version of metalearn and cannot be resumed; train again in another "
                "hydra.run.dir"
            )
        try:
            if (kept["content_hash"], kept["classes"]) != (self._run.content_hash, self._classes):
                raise UserError(
                    "the data, or their split, are others than when the run was stopped; bring those back, or begin another run"
                )
            for part, found in zip(self.state, (kept["meta"], kept["fixed"]), strict=True):
                if {name: value.shape for name, value in part.items()} != {
                    n: v.shape for n, v in found.items()
                }:
                    raise UserError("the checkpoint's weights are not those of this configuration")
                for name, value in part.items():
                    value.copy_(found[name])
            groups = self.optimiser.param_groups
            rates = [group["lr"] for group in groups]
            own = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": kept["optimiser"], "param_groups": own})
            for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
                group["lr"] = rate  # a rate on the device stays the tensor that it is
            self.meter.restore(kept["meter"])
            best = kept["best"]
            if best is not None:
                state = State(
                    *(
                        {name: value.to(device) for name, value in best[part].items()}
                        for part in ("meta", "fixed")
                    )
                )
                self.best = Best(Estimate(**best["val"]), best["step"], state, best["since"])
            self.step = kept["step"]
            self.has_stepped = bool(kept["optimiser"]) or self.step > 0
            self._set_learning_rate()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint cannot be gone on from ({error}); it was made by another version"
            ) from None
        self._steps_done.fill_(self.step)
        self._enter_stage()


def clip_gradients(gradients: Params, settings: TrainConfig) -> list[Tensor]:
    """Return meta-gradients clipped by `train.clip_value` and `train.clip_norm`."""
    values = list(gradients.values())
    if settings.clip_value is not None:
        values = [value.clamp(-settings.clip_value, settings.clip_value) for value in values]
    if settings.clip_norm is not None:
        norm = torch.stack([value.square().sum() for value in values]).sum().sqrt()
        scale = (settings.clip_norm / (norm + 1e-12)).clamp_max(1)
        values = [value * scale for value in values]
    return values


def fold(buffers: Params, seen: Params, momentum: float) -> None:
    """Move buffers, in place, by a share of the way to the statistics of a step: an exponential moving average."""
    for name, value in seen.items():
        buffers[name].lerp_(value.to(buffers[name].dtype), momentum)
