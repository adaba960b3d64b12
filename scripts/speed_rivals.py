"""Rivals of the engine, each in a process of its own: the plain loop, and libraries.

python scripts/speed_rivals.py LIBRARY CASE.npz

`rival_processes.py` starts this. Libraries have environments of their own, because
`parallel-metalearn` is imported as `metalearn` too. CASE.npz has initial parameters, tasks and the
settings of the method. Commands arrive on stdin, one a line, and each is answered by a line of
JSON:

    gradient FILE.npz   save the meta-gradient, with the names of the parameters
    sample SECONDS      take steps for some seconds; answer tasks, wall and CPU seconds
"""

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

#: Packages of each library's environment.
PACKAGES = {"parallel-metalearn": ["parallel-metalearn==0.5.6"], "JAX": ["jax==0.10.2"]}
#: The plain loop, which more threads can slow down.
PLAIN = ("plain", "plain, 1 thread")
Arrays = dict[str, np.ndarray]


def sample(step: Callable[[], object], tasks: int, seconds: float) -> dict[str, float]:
    """Take steps of some tasks until the seconds are over; return tasks, wall and CPU seconds."""
    start, own, done = time.perf_counter(), time.process_time(), 0
    while not done or time.perf_counter() - start < seconds:
        step()
        done += tasks
    wall = time.perf_counter() - start
    return {"tasks": done, "wall": wall, "cpu": time.process_time() - own}


def _adapts(name: str, settings: dict[str, Any]) -> bool:
    """Return True if the inner loop adapts a parameter: normalisation never, in ANIL the head."""
    return name.startswith("head") or not (settings["adapted_part"] == "head" or "norm" in name)


def jax_gradient(settings: dict[str, Any], eps: float) -> Any:
    """Return a compiled function (params, support, query) -> meta-gradient of MAML with Conv4."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    jax.config.update("jax_default_matmul_precision", "highest")  # like torch: no TF32

    def loss(params: Any, x: Any, y: Any) -> Any:
        for block in range(4):
            x = lax.conv_general_dilated(
                x, params[f"net.conv{block}.weight"], (2, 2), ((1, 1), (1, 1))
            )
            mean, var = (f(x, (0, 2, 3), keepdims=True) for f in (jnp.mean, jnp.var))
            scale, shift = (params[f"net.norm{block}.{part}"] for part in ("weight", "bias"))
            x = (x - mean) * lax.rsqrt(var + eps) * scale[:, None, None] + shift[:, None, None]
            x = jax.nn.relu(x)
        logits = x.mean((2, 3)) @ params["head.weight"].T + params["head.bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def task_loss(params: Any, support: Any, query: Any) -> Any:
        adapted = {name: value for name, value in params.items() if _adapts(name, settings)}
        for _ in range(settings["inner_steps"]):
            gradients = jax.grad(lambda own: loss({**params, **own}, *support))(adapted)
            if settings["first_order"]:
                gradients = lax.stop_gradient(gradients)
            adapted = jax.tree.map(lambda w, g: w - settings["inner_lr"] * g, adapted, gradients)
        return loss({**params, **adapted}, *query)

    def meta_loss(params: Any, support: Any, query: Any) -> Any:
        return jax.vmap(task_loss, (None, 0, 0))(params, support, query).mean()

    return jax.jit(jax.grad(meta_loss))


def _jax(case: Arrays, params: Arrays, settings: dict[str, Any]) -> Callable[[], Arrays]:
    import jax

    device = {name: jax.numpy.asarray(value) for name, value in params.items()}
    support, query = (
        (jax.numpy.asarray(case[f"{part}_x"]), jax.numpy.asarray(case[f"{part}_y"]))
        for part in ("support", "query")
    )
    gradient = jax_gradient(settings, settings["eps"])
    return lambda: jax.block_until_ready(gradient(device, support, query))


def _parallel_metalearn(
    case: Arrays, params: Arrays, settings: dict[str, Any]
) -> Callable[[], Arrays]:
    import torch
    from torch import nn

    library = {  # not ours, which has the same name
        name: importlib.import_module(f"metalearn.{name}")
        for name in ("algorithms", "inner_optimizers", "loss", "model_wrappers")
    }
    layers = importlib.import_module("metalearn.nn_models.basic_layers.BatchNormalization")

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for block in range(4):
                out, channels = params[f"net.conv{block}.weight"].shape[:2]
                conv = nn.Conv2d(channels, out, 3, 2, padding=1, bias=False)
                setattr(self, f"conv{block}", conv)
                norm = layers.BatchNorm(out, eps=settings["eps"], track_running_stats=False)
                setattr(self, f"norm{block}", norm)

        def forward(self, x: Any, **flags: Any) -> Any:
            for block in range(4):
                x = getattr(self, f"conv{block}")(x)
                x = torch.relu(getattr(self, f"norm{block}")(x, **flags))
            return x.mean((-2, -1))

    class Head(nn.Linear):
        def forward(self, input: Any, **flags: Any) -> Any:
            return super().forward(input)

    loss = library["loss"]
    way, features = params["head.weight"].shape
    model = library["model_wrappers"].MAML_Model(backbone=Backbone(), head=Head(features, way))
    names = {name: name.replace("backbone.", "net.") for name, _ in model.named_parameters()}
    model.fast_weights = [name for name in names if _adapts(name, settings)]
    model.load_state_dict({own: torch.from_numpy(params[name]) for own, name in names.items()})
    inner = library["inner_optimizers"].InnerSGD(
        initial_fast_weights=model.get_fast_weights(),
        first_order=settings["first_order"],
        inner_lr=settings["inner_lr"],
        learn_lr=False,
    )
    algorithm = library["algorithms"].MAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=inner,
        support_loss_fn=loss.CrossEntropy(metric_fn=loss.CategoricalAccuracy()),
        inner_steps=settings["inner_steps"],
        device=torch.device("cpu"),
    )
    parts: list[Any] = []
    for part in ("support", "query"):
        x, y = (torch.from_numpy(case[f"{part}_{axis}"]) for axis in "xy")
        parts += [x, {"labels": y}]

    def step() -> Arrays:
        algorithm.step(iter([tuple(parts)]))
        # A parameter that no loss depends on has no gradient.
        return {
            names[name]: np.zeros(value.shape) if value.grad is None else value.grad.numpy()
            for name, value in model.named_parameters()
        }

    return step


def _plain(case: Arrays, params: Arrays, settings: dict[str, Any]) -> Callable[[], Arrays]:
    from plain_loop import build_run, plain_step

    run = build_run(settings["overrides"], settings["device"])
    tasks, step = run.train.draw(0, len(case["support_x"])), plain_step(run)
    return lambda: {name: value.cpu().numpy() for name, value in step(tasks)[0].items()}


def main() -> None:
    """Answer commands."""
    library, file = sys.argv[1:]
    case = dict(np.load(file))
    settings = json.loads(str(case["settings"]))
    params = {name[6:]: value for name, value in case.items() if name.startswith("param:")}
    make = {**dict.fromkeys(PLAIN, _plain), "JAX": _jax, "parallel-metalearn": _parallel_metalearn}[
        library
    ]
    step, tasks = make(case, params, settings), len(case["support_x"])
    for line in sys.stdin:
        command, argument = line.split()
        if command == "gradient":
            arrays: Any = {name: np.asarray(value) for name, value in step().items()}
            np.savez(argument, **arrays)
            package = PACKAGES.get(library, ["torch"])[0].partition("=")[0]
            answer: dict[str, Any] = {"version": importlib.metadata.version(package)}
        else:
            answer = dict(sample(step, tasks, float(argument)))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
