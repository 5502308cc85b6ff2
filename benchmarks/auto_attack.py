"""AutoAttack: robust accuracy and seconds per image, beside the PyTorch implementation's.

A small network is trained adversarially (PGD-10) on the embedded digits for some seconds, then
evaluated with `kdjax.attacks.auto_attack`. A row is what an attack adds in its turn, on the images
that those before it have left: the evaluation is timed with the first attack, the first two and so
on, the best of several runs, and the times subtracted. The first run of all attacks, with tracing
and compilation, is timed by itself.

    PYTHONPATH=. python benchmarks/auto_attack.py                 # a minute or two on two cores
    PYTHONPATH=. python benchmarks/auto_attack.py --model conv --images 449 --eps 0.2

Where PyTorch and the package `autoattack` (https://github.com/fra31/auto-attack) can be imported,
the same network with the same weights is evaluated there too, on PyTorch's CPU, in one batch. That
code draws its numbers otherwise, so that accuracies may differ by an image or two. Needs nothing
beyond kdjax's core dependencies.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _compare import machine

import kdjax as kd
from kdjax import attacks, losses

Params = dict[str, jax.Array]
ATTACKS = ("apgd_ce", "apgd_t", "fab_t", "square")
NORMS = {"linf": "Linf", "l2": "L2"}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {"dense1": (64, 128), "dense2": (128, 128), "head": (128, 10)},
    "conv": {"conv1": (3, 3, 1, 16), "conv2": (3, 3, 16, 32), "head": (512, 10)},
}
QUICK = {"images": 32, "train_steps": 30, "steps": 5, "queries": 50, "repeats": 1}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", choices=SHAPES, default="mlp")
    found.add_argument("--images", type=int, default=200, help="test images, up to 449")
    found.add_argument("--norm", choices=NORMS, default="linf")
    found.add_argument("--eps", type=float, default=0.15)
    found.add_argument("--train-steps", type=int, default=1500)
    found.add_argument("--steps", type=int, default=100, help="of APGD and FAB")
    found.add_argument("--queries", type=int, default=5000, help="of square")
    found.add_argument("--batch-size", type=int, default=None)
    found.add_argument("--repeats", type=int, default=3, help="of which the best is taken")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--quick", action="store_true", help=f"only to see that it runs: {QUICK}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, evaluates, prints."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    digits = kd.data.digits()
    train, test = digits.read("train"), digits.read("test", np.arange(options.images))
    started = time.perf_counter()
    params = trained(options, train["image"], train["label"])
    took = time.perf_counter() - started
    model = jax.tree_util.Partial(functools.partial(apply, options.model), params)
    x, labels = test["image"], test["label"]
    print(f"{shlex.join(['python', 'benchmarks/auto_attack.py', *arguments])}  ({machine()})\n")
    print(
        f"{options.model} trained for {took:.0f} s; {len(x)} digits, {options.norm}, "
        f"eps {options.eps:g}, {options.steps} steps, {options.queries} queries.\n"
    )
    robust, seconds = ours(options, model, x, labels)
    if options.quick:
        print("\n--quick is only to see that it runs: these numbers mean nothing.")
    missing = [name for name in ("torch", "autoattack") if not importlib.util.find_spec(name)]
    if missing:
        print(f"\nNot compared with PyTorch: {' and '.join(missing)} not installed.")
    else:
        theirs(options, params, x, labels, robust, seconds)


def apply(model: str, params: Params, x: jax.Array) -> jax.Array:
    """Logits of the small networks, whose convolutions halve the image."""
    if model == "conv":
        for name in ("conv1", "conv2"):
            x = jax.lax.conv_general_dilated(
                x, params[name], (1, 1) if name == "conv1" else (2, 2), ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            x = jax.nn.relu(x + params[f"{name}_bias"])
    x = x.reshape(len(x), -1)
    for name in ("dense1", "dense2"):
        if name in params:
            x = jax.nn.relu(x @ params[name] + params[f"{name}_bias"])
    return x @ params["head"] + params["head_bias"]


def trained(options: argparse.Namespace, images: np.ndarray, labels: np.ndarray) -> Params:
    """Weights after adversarial training at the radius of the evaluation."""
    start = jax.random.key(options.seed)
    params: Params = {}
    for i, (name, shape) in enumerate(SHAPES[options.model].items()):
        scale = np.sqrt(2 / np.prod(shape[:-1]))
        params[name] = scale * jax.random.normal(jax.random.fold_in(start, i), shape)
        params[f"{name}_bias"] = jnp.zeros(shape[-1])
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, options.train_steps))
    ball: dict[str, Any] = {
        "eps": options.eps, "step_size": options.eps / 4, "steps": 10, "norm": options.norm
    }  # fmt: skip

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return losses.hard_label_cross_entropy(apply(options.model, params, x), y)

    @jax.jit
    def step(params: Params, state: Any, key: jax.Array) -> tuple[Params, Any]:
        rows = jax.random.randint(key, (128,), 0, len(images))
        x, y = jnp.asarray(images)[rows], jnp.asarray(labels)[rows]
        x = attacks.pgd(lambda z: loss(params, z, y), x, **ball, key=jax.random.fold_in(key, 1))
        grads = jax.grad(lambda p: loss(p, x, y).mean())(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(options.train_steps):
        params, state = step(params, state, jax.random.fold_in(start, 1000 + i))
    return jax.block_until_ready(params)


def ours(
    options: argparse.Namespace, model: Any, x: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """The table of our evaluation; robust accuracy, and seconds per image of a warm run."""

    def evaluate(names: Sequence[str]) -> attacks.AutoAttack:
        return attacks.auto_attack(
            model, x, labels, eps=options.eps, norm=options.norm, attacks=names,
            steps=options.steps, queries=options.queries, batch_size=options.batch_size,
            key=jax.random.key(options.seed), progress=False,
        )  # fmt: skip

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        first = timed(lambda: evaluate(ATTACKS))
        warm = {
            n: min(timed(lambda n=n: evaluate(ATTACKS[:n])) for _ in range(options.repeats))
            for n in range(1, len(ATTACKS) + 1)
        }
        found = evaluate(ATTACKS)
    total, count = warm[len(ATTACKS)], len(x)
    print("| attack | attacked | broken | robust accuracy | ms per image | share |")
    print("|" + " --- |" * 6)
    left = found.per_attack["clean"].copy()
    print(f"| clean | {count} | {(~left).sum()} | {100 * left.mean():.1f} % | | |")
    for n, name in enumerate(ATTACKS, 1):
        attacked, took = left.sum(), max(warm[n] - warm.get(n - 1, 0.0), 0.0)
        left &= found.per_attack[name]
        print(
            f"| {name} | {attacked} | {attacked - left.sum()} | {100 * left.mean():.1f} % | "
            f"{1e3 * took / count:.3g} | {100 * took / total:.0f} % |"
        )
    accuracy = float(found.robust.mean())
    print(
        f"| all, warm | {count} | {(~found.robust).sum()} | {100 * accuracy:.1f} % | "
        f"{1e3 * total / count:.3g} | 100 % |"
    )
    print(
        f"| all, first run | {count} | {(~found.robust).sum()} | {100 * accuracy:.1f} % | "
        f"{1e3 * first / count:.3g} | |"
    )
    for message in sorted({str(warning.message) for warning in told}):
        print(f"\nWarning: {message}")
    return accuracy, total / count


def theirs(
    options: argparse.Namespace,
    params: Params,
    x: np.ndarray,
    labels: np.ndarray,
    robust: float,
    seconds: float,
) -> None:
    """The row of the PyTorch implementation, and how many times as long it takes."""
    import autoattack
    import torch
    from torch.nn import functional

    weights = {name: torch.tensor(np.asarray(value)) for name, value in params.items()}

    def forward(z: Any) -> Any:
        if options.model == "conv":
            for name, stride in (("conv1", 1), ("conv2", 2)):
                kernel = weights[name].permute(3, 2, 0, 1)
                z = functional.conv2d(z, kernel, weights[f"{name}_bias"], stride, 1).relu()
        z = z.permute(0, 2, 3, 1).reshape(len(z), -1)
        for name in ("dense1", "dense2"):
            if name in weights:
                z = (z @ weights[name] + weights[f"{name}_bias"]).relu()
        return z @ weights["head"] + weights["head_bias"]

    adversary = autoattack.AutoAttack(
        forward, norm=NORMS[options.norm], eps=options.eps, version="standard", device="cpu",
        verbose=False, seed=options.seed,
    )  # fmt: skip
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = options.steps
    adversary.fab.n_iter, adversary.square.n_queries = options.steps, options.queries
    images = torch.tensor(x).permute(0, 3, 1, 2).contiguous()
    classes = torch.tensor(np.asarray(labels)).long()
    kept: list[Any] = []
    took = timed(lambda: kept.append(adversary.run_standard_evaluation(images, classes, bs=len(x))))
    with torch.no_grad():
        accuracy = float((forward(kept[0]).argmax(1) == classes).double().mean())
    per_image = took / len(x)
    print(f"\n| implementation | robust accuracy | ms per image | times ours |\n|{' --- |' * 4}")
    print(f"| kdjax, warm | {100 * robust:.1f} % | {1e3 * seconds:.3g} | 1 |")
    print(
        f"| autoattack, torch {torch.__version__} | {100 * accuracy:.1f} % | "
        f"{1e3 * per_image:.3g} | {per_image / seconds:.2f} |"
    )


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
