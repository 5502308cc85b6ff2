"""Meshes and shardings: what lies where, what is refused, and what FSDP saves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from parallel import parallel_problem as problem

from kdjax import parallel
from kdjax.parallel import _updates


def test_mesh():
    assert dict(parallel.data_mesh().shape) == {"data": 8}
    mesh = parallel.data_mesh(3, axis="rows")
    assert dict(mesh.shape) == {"rows": 3}
    assert mesh.axis_types == (AxisType.Auto,)
    chosen = jax.devices()[4:6]
    assert list(parallel.data_mesh(devices=chosen).devices.flat) == chosen


def test_mesh_refuses_more_devices_than_there_are():
    with pytest.raises(ValueError, match=r"n must be at most 8.*got 9.*jax_num_cpu_devices\", 9"):
        parallel.data_mesh(9)
    with pytest.raises(ValueError, match="n must be an integer at least 1, got 0"):
        parallel.data_mesh(0)


def test_other_meshes_are_refused():
    with pytest.raises(TypeError, match=r"mesh must be a .*data_mesh.*got int 4"):
        parallel.batch_sharding(4)
    explicit = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    two = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for mesh in (explicit, two):
        with pytest.raises(ValueError, match="mesh must have one axis of type Auto"):
            parallel.jit_update(problem.learner(), mesh)


def test_a_batch_is_split_in_row_blocks():
    mesh = parallel.data_mesh(4)
    rows = {"x": np.arange(24.0).reshape(8, 3), "label": jnp.arange(8)}
    found = parallel.shard_batch(rows, mesh)
    assert set(found) == set(rows)
    for name, x in found.items():
        assert x.sharding == parallel.batch_sharding(mesh)
        np.testing.assert_array_equal(x, rows[name])
        for i, shard in enumerate(x.addressable_shards):
            np.testing.assert_array_equal(shard.data, rows[name][2 * i : 2 * i + 2])
    again = parallel.shard_batch(found, mesh)
    assert all(again[name] is found[name] for name in found)


def test_a_batch_that_does_not_fit_is_refused():
    mesh = parallel.data_mesh(4)
    with pytest.raises(ValueError, match=r"batch\['x'\] must have a multiple of 4 rows.*got 6"):
        parallel.shard_batch({"x": np.zeros((6, 2))}, mesh)
    with pytest.raises(ValueError, match=r"batch\['x'\] must have a multiple of 4 rows.*no axis"):
        parallel.shard_batch({"x": np.float32(1)}, mesh)
    update = parallel.jit_update(problem.learner(), mesh)
    rows = {name: x[:6] for name, x in problem.batch().items()}
    with pytest.raises(ValueError, match="must have a multiple of 4 rows for 4 devices, got 6"):
        update(problem.start(), rows, problem.teacher())


def test_pad_batch():
    rows = {"x": np.arange(6.0).reshape(3, 2), "label": np.array([2, 0, 1])}
    found = parallel.pad_batch(rows, 5)
    np.testing.assert_array_equal(found["x"], [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]])
    np.testing.assert_array_equal(found["label"], [2, 0, 1, 1, 1])
    np.testing.assert_array_equal(found["weight"], [1, 1, 1, 0, 0])
    assert found["weight"].dtype == np.float32
    assert {name: x.dtype for name, x in rows.items()} == {k: found[k].dtype for k in rows}

    weighted = parallel.pad_batch({**rows, "weight": np.array([0.5, 2.0, 0.0])}, 4)
    np.testing.assert_array_equal(weighted["weight"], [0.5, 2, 0, 0])
    full = parallel.pad_batch(rows, 3)
    np.testing.assert_array_equal(full["x"], rows["x"])
    np.testing.assert_array_equal(full["weight"], [1, 1, 1])
    none = parallel.pad_batch({"x": np.zeros((0, 2))}, 2)
    np.testing.assert_array_equal(none["weight"], [0, 0])
    assert none["x"].shape == (2, 2)


def test_pad_batch_refuses():
    with pytest.raises(ValueError, match="size must be at least 3, the rows of the batch, got 2"):
        parallel.pad_batch({"x": np.zeros((3, 2))}, 2)
    with pytest.raises(ValueError, match="batch must hold arrays with equally many rows"):
        parallel.pad_batch({"x": np.zeros((3, 2)), "label": np.zeros(2)}, 4)
    with pytest.raises(ValueError, match="batch must hold arrays with equally many rows"):
        parallel.pad_batch({"x": np.zeros((3, 2)), "scale": np.float32(1)}, 4)
    with pytest.raises(TypeError, match="size must be an integer"):
        parallel.pad_batch({"x": np.zeros((3, 2))}, 4.0)


def test_replicate_copies():
    mesh = parallel.data_mesh(4)
    tree = {"w": jnp.arange(3.0), "key": jax.random.key(3), "host": np.ones(2)}
    found = parallel.replicate(tree, mesh)
    for x in jax.tree.leaves(found):
        assert x.sharding == NamedSharding(mesh, P())
        assert len(x.addressable_shards if x.ndim else x.sharding.device_set) == 4
    assert found["key"].dtype == tree["key"].dtype
    jax.jit(lambda tree: jax.tree.map(lambda x: x, tree["w"] + 1), donate_argnums=0)(found)
    assert found["w"].is_deleted()
    np.testing.assert_array_equal(tree["w"], [0, 1, 2])
    assert parallel.replicate(parallel.replicate(tree, mesh), mesh)["host"].shape == (2,)


def test_state_sharding():
    mesh = parallel.data_mesh(4)
    tree = {
        "longest": np.zeros((4, 16)),
        "first_of_two": np.zeros((8, 8)),
        "longest_divisible": np.zeros((8, 9)),
        "indivisible": np.zeros((7, 9)),
        "small": np.zeros(4),
        "scalar": np.float32(0),
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(0), 64),
        "empty": np.zeros((0, 64)),
    }
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
    for given in (tree, abstract):
        found = parallel.state_sharding(given, mesh, fsdp=True, min_size=8)
        assert {name: sharding.spec for name, sharding in found.items()} == {
            "longest": P(None, "data"),
            "first_of_two": P("data"),
            "longest_divisible": P("data"),
            "indivisible": P(),
            "small": P(),
            "scalar": P(),
            "key": P(),
            "keys": P(),
            "empty": P(),
        }
    for sharding in parallel.state_sharding(tree, mesh).values():
        assert sharding == NamedSharding(mesh, P())
    with pytest.raises(ValueError, match="min_size must be an integer at least 1, got 0"):
        parallel.state_sharding(tree, mesh, fsdp=True, min_size=0)


def per_device(tree):
    """Bytes that the arrays of a tree take on the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def wide_learner():
    return problem.learner(
        "hard", "soft", model=problem.mlp(64), optimizer=optax.sgd(0.3, momentum=0.9)
    )


def test_fsdp_trains_the_same_in_less_memory():
    mesh, learner, frozen = parallel.data_mesh(8), wide_learner(), problem.teacher()
    started = learner.init(jax.random.key(0), problem.batch(), frozen)
    whole = parallel.jit_update(learner, mesh)
    split = parallel.jit_update(learner, mesh, fsdp=True, min_size=64)
    (wanted, measured), (found, metrics) = (
        problem.train(update, started, frozen) for update in (whole, split)
    )
    assert problem.distance(found.params, wanted.params) < 1e-6
    assert problem.distance(found.opt, wanted.opt) < 1e-6
    assert problem.distance(metrics, measured) < 1e-6
    for part in ("params", "opt"):
        saved = per_device(getattr(found, part)) / per_device(getattr(wanted, part))
        assert saved < 0.16, f"an eighth, but for the biases of {problem.CLASSES}, got {saved}"
    shardings = parallel.state_sharding(started, mesh, fsdp=True, min_size=64)
    assert all(
        x.sharding == s for x, s in zip(*map(jax.tree.leaves, (found, shardings)), strict=True)
    )

    # The program itself takes and returns shards; it never gets a whole array.
    programs = {}
    for name, update, state in (("whole", whole, wanted), ("split", split, found)):
        rows = parallel.shard_batch(problem.batch(), mesh)
        frozen = parallel.replicate(problem.teacher(), mesh)
        lowered = jax.jit(update, donate_argnums=0).lower(state, rows, frozen)
        programs[name] = lowered.compile()
    for size in ("argument_size_in_bytes", "output_size_in_bytes"):
        sizes = {k: getattr(p.memory_analysis(), size) for k, p in programs.items()}
        assert sizes["split"] < 0.4 * sizes["whole"], "batch and teacher are the same in both"
    assert "all-gather" in programs["split"].as_text()
    assert "all-gather" not in programs["whole"].as_text()


def test_a_state_can_be_made_in_shards():
    mesh, learner, frozen = parallel.data_mesh(8), wide_learner(), problem.teacher()
    rows = problem.batch()
    shardings = parallel.state_sharding(
        jax.eval_shape(learner.init, jax.random.key(0), rows, frozen), mesh, fsdp=True, min_size=64
    )
    made = jax.jit(learner.init, out_shardings=shardings)(jax.random.key(0), rows, frozen)
    assert (
        problem.distance(made.params, learner.init(jax.random.key(0), rows, frozen).params) < 1e-6
    )
    update = parallel.jit_update(learner, mesh, fsdp=True, min_size=64, donate=False)
    moved, _ = update(made, rows, frozen)
    assert jax.tree.map(lambda x: x.sharding, moved.params) == shardings.params


def test_the_teacher_is_placed_once(monkeypatch):
    placed = []

    def replicate(tree, mesh):
        placed.append(len(jax.tree.leaves(tree)))
        return parallel.replicate(tree, mesh)

    monkeypatch.setattr(_updates, "replicate", replicate)
    mesh, frozen = parallel.data_mesh(4), problem.teacher()
    update = parallel.jit_update(problem.learner("hard", "soft"), mesh)
    state, _ = problem.train(update, problem.start("hard", "soft"), frozen)
    assert placed == [len(jax.tree.leaves(frozen))]

    # A teacher in shards stays in shards.
    split = jax.device_put(frozen, parallel.state_sharding(frozen, mesh, fsdp=True, min_size=1))
    update(state, problem.batch(), split)
    assert placed[1:] == [0]


def test_another_teacher_is_noticed():
    mesh, frozen = parallel.data_mesh(4), problem.teacher()
    update = parallel.jit_update(problem.learner("hard", "soft"), mesh)
    other = jax.tree.map(lambda x: 2 * x, frozen)
    losses = [
        float(update(problem.start("hard", "soft"), problem.batch(), teacher)[1]["loss"])
        for teacher in (frozen, other, frozen)
    ]
    assert losses[0] == losses[2]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_state_is_wanted():
    update = parallel.jit_update(problem.learner(), parallel.data_mesh(4))
    with pytest.raises(TypeError, match=r"state must be the kdjax.State.*got dict"):
        update({"params": {}}, problem.batch(), problem.teacher())


def test_one_process():
    assert parallel.is_main()
    assert parallel.agree(True) is True
    assert parallel.agree(np.bool_(False)) is False


@pytest.mark.parametrize(
    ("error", "arguments", "match"),
    [
        (ValueError, {"coordinator": "a:1"}, "given together.*no processes and no process_id"),
        (ValueError, {"processes": 2, "process_id": 0}, "given together.*no coordinator"),
        (ValueError, {"coordinator": "a", "processes": 2, "process_id": 0}, "host:port"),
        (
            ValueError,
            {"coordinator": "a:1", "processes": 2, "process_id": 2},
            "process_id must be an integer at least 0 and at most 1, got 2",
        ),
        (TypeError, {"heartbeat_timeout": 1.5}, "heartbeat_timeout must be an integer"),
    ],
)
def test_initialize_refuses(error, arguments, match):
    with pytest.raises(error, match=match):
        parallel.initialize(**arguments)
