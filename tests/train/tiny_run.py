"""A tiny classifier and its data, for the tests of the loop; also a program that they kill."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kdjax as kd

ROWS, FEATURES, CLASSES, BATCH = 64, 8, 3, 16
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(ROWS, FEATURES)).astype(np.float32)
Y = (X[:, :CLASSES].argmax(-1)).astype(np.int32)


def init(key, x, width=16):
    a, b = jax.random.split(key)
    shape_a, shape_b = (x.shape[-1], width), (width, CLASSES)
    return {"a": 0.3 * jax.random.normal(a, shape_a), "b": 0.3 * jax.random.normal(b, shape_b)}


def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


MODEL = kd.Model(
    init=lambda key, x: (init(key, x), {}),
    apply=lambda params, extra, x, *, train=False, key=None: ({"logits": apply(params, x)}, extra),
    inputs="x",
)


class Data:
    """Batches that depend on (seed, step) only, as those of kdjax.data."""

    def __init__(self, seed=7, end=None, pause=0.0, poison=None):
        self.seed, self.end, self.pause, self.poison = seed, end, pause, poison

    def from_step(self, step):
        while self.end is None or step < self.end:
            time.sleep(self.pause)
            yield self.at(step)
            step += 1

    def at(self, step):
        rows = np.random.default_rng([self.seed, step]).integers(0, ROWS, BATCH)
        x = X[rows].copy()
        if step == self.poison:
            x[0, 0] = np.nan
        return {"x": x, "label": Y[rows], "index": rows.astype(np.int32)}

    def describe(self):
        return {"dataset": "tiny", "seed": self.seed}


def make(optimizer=None, terms=None):
    terms = terms or {"hard": (1.0, kd.terms.hard_labels())}
    method = kd.distill(MODEL, None, terms)
    return kd.minimize(method, optimizer or optax.adam(1e-2))


LEARNER = make()


def start(learner=LEARNER, seed=0):
    return learner.init(jax.random.key(seed), Data().at(0))


def leaves(state):
    """All arrays of a State, keys as their words."""
    key = jax.random.key_data(state.key)
    return [np.asarray(x) for x in jax.tree.leaves(state._replace(key=key))]


def same(a, b):
    return all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(leaves(a), leaves(b), strict=True)
    )


def held_out(state):
    logits = apply(state.params["student"], jnp.asarray(X))
    return {"accuracy": float((logits.argmax(-1) == Y).mean())}


def run(folder, steps, *, data=None, **options):
    options = {"save_every": 3, "log_every": 2, "progress": False, "plot": False, **options}
    return kd.train.fit(LEARNER, start(), data or Data(), steps=steps, checkpoint=folder, **options)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), data=Data(pause=float(sys.argv[3])), save_every=5)
