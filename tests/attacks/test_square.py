"""Square Attack against a recorded run of the published code, NumPy, and what must always hold."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kdjax import attacks, losses
from kdjax.attacks import _square_windows as windows

GOLDEN = np.load(Path(__file__).parent / "golden_square.npz")
NORMS, SHAPE, QUERIES = ("linf", "l2"), (4, 6, 7, 2), 12
SCHEDULES = ("nq5000_resc0", "nq5000_resc1", "nq1000_resc1", "nq100_resc1")
# Radii at which some images of `small` fall early, some late and some never.
EPS = {"linf": 0.05, "l2": 0.5}
KEY = jax.random.key(0)


def published_model(x):
    hidden = x.reshape(len(x), -1)
    for i in range(3):
        weight, bias = (jnp.asarray(GOLDEN[f"params_{kind}{i}"], x.dtype) for kind in "Wb")
        hidden = hidden @ weight + bias[None]
        hidden = jax.nn.relu(hidden) if i < 2 else hidden
    return hidden


def published_images(name):
    return np.asarray(GOLDEN[f"{name}_16"] / 16)


@partial(jax.jit, static_argnames=("norm", "queries"))
def on_digits(eps, key, *, norm="linf", queries):
    x = jnp.asarray(published_images("x"), jnp.float32)
    labels = jnp.asarray(GOLDEN["labels"])
    return attacks.square(published_model, x, labels, eps=eps, norm=norm, queries=queries, key=key)


def bumpy(x, classes=5):
    """Smooth logits whose every row is computed alone."""
    flat = x.reshape(len(x), -1, 1)
    weights = jnp.sin(jnp.arange(1.0, flat.shape[1] * classes + 1) ** 2)
    weights = weights.reshape(1, flat.shape[1], classes).astype(x.dtype)
    return (weights * jnp.sin(5 * flat + 3 * weights)).sum(1)


def small(dtype=jnp.float32):
    x = jax.random.uniform(jax.random.key(1), SHAPE, dtype)
    x = x.at[0, 0, 0, 0].set(0.0).at[0, 1, 0, 0].set(1.0)
    return x, bumpy(x).argmax(-1)


@partial(jax.jit, static_argnames=("norm", "queries"))
def attack(x, labels, eps, key, *, norm="linf", queries=QUERIES):
    return attacks.square(bumpy, x, labels, eps=eps, norm=norm, queries=queries, key=key)


def distances(x_adv, x, norm):
    difference = np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)
    difference = difference.reshape(len(difference), -1)
    return np.abs(difference).max(1) if norm == "linf" else np.linalg.norm(difference, axis=1)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


# The published code


def test_replays_the_published_run_exactly():
    count, images = len(GOLDEN["replay_row_u"]), len(GOLDEN["replay_labels"])
    shared = np.stack([GOLDEN["replay_row_u"], GOLDEN["replay_col_u"]], axis=1)
    shared = np.concatenate([shared, GOLDEN["replay_sign_u"]], axis=1)[:, None]
    draws = attacks.SquareDraws(
        start=GOLDEN["replay_init_uniform"][:, 0],
        windows=np.broadcast_to(shared, (count, images, 3)),
    )
    with jax.enable_x64(True):
        x, labels = published_images("replay_x"), GOLDEN["replay_labels"]
        found = attacks.square(
            published_model, x, labels, eps=GOLDEN["replay_eps"], queries=count, draws=draws
        )
        np.testing.assert_array_equal(found.robust, GOLDEN["replay_robust"])
        np.testing.assert_array_equal(found.queries, GOLDEN["replay_n_queries"])
        np.testing.assert_array_equal(found.x_best, GOLDEN["replay_x_adv"])
        kept = np.where(GOLDEN["replay_robust"][:, None, None, None], x, GOLDEN["replay_x_adv"])
        np.testing.assert_array_equal(found.x_adv, kept)
    assert len(set(GOLDEN["replay_n_queries"])) > 3


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_schedule_of_the_published_code(name, dtype):
    queries = int(name.removeprefix("nq").split("_")[0])
    halvings = windows.halvings(queries, rescale=name.endswith("1"))
    with jax.enable_x64(dtype == "float64"):
        for query, p, on_8, on_32 in zip(
            *(GOLDEN[f"{what}_{name}"] for what in ("it", "p", "side8", "side32")), strict=True
        ):
            share = windows.share(int(query), halvings, jnp.asarray(0.8, dtype))
            assert share.dtype == dtype
            np.testing.assert_allclose(share, p, rtol=1e-7)
            for size, side in ((8, on_8), (32, on_32)):
                assert windows.side(share, size, size, odd=False) == side, (query, size)


def test_sides_for_l2_are_odd_and_fit():
    for height, width in ((3, 9), (4, 4), (5, 7), (8, 8), (32, 32), (33, 40)):
        for level in range(10):
            p = 0.8 / 2**level
            side = int(windows.side(jnp.float32(p), height, width, odd=True))
            wanted = max(round(np.sqrt(p * height * width)), 3)
            wanted += wanted % 2 == 0
            largest = max(s for s in range(1, min(height, width) + 1) if s % 2)
            assert side == min(wanted, largest)


def test_robust_accuracy_near_the_published_one_after_500_queries():
    found = on_digits(float(GOLDEN["eps_linf"]), KEY, queries=500)
    robust = np.asarray(found.robust)
    assert not (robust & ~GOLDEN["clean_correct"]).any()
    # The published runs of 5000 queries leave 58 and 59.
    published = GOLDEN["square_linf_robust"].sum(-1).mean()
    assert published - 3 <= robust.sum() <= published + 8
    assert (published_model(found.x_adv).argmax(-1)[~robust] != GOLDEN["labels"][~robust]).all()


@pytest.mark.slow
def test_robust_accuracy_of_the_published_code():
    ours = [
        on_digits(float(GOLDEN["eps_linf"]), jax.random.key(seed), queries=5000).robust.sum()
        for seed in range(8)
    ]
    assert abs(np.mean(ours) - GOLDEN["square_linf_robust"].sum(-1).mean()) <= 2


# The l2 form, against NumPy


def rectangle(height, width):
    values = np.zeros((height, width))
    row, column = height // 2, width // 2
    for ring in range(max(row, column) + 1):
        rows = slice(max(row - ring, 0), row + ring + 1)
        values[rows, max(column - ring, 0) : column + ring + 1] += 1 / (ring + 1) ** 2
    return values / np.linalg.norm(values)


def pattern(side, transposed):
    if side == 1:
        return -np.ones((1, 1))
    upper, lower = rectangle(side // 2, side), rectangle(side - side // 2, side)
    values = np.concatenate([upper, -lower]) / np.sqrt(2)
    return values.T if transposed else values


@partial(jax.jit, static_argnames="shape")
def patterns(rows, columns, side, transposed, shape):
    return windows.eta(rows, columns, side, transposed, shape, jnp.float64)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 9])
def test_eta_is_two_halves_of_unit_norm(side):
    height, width = 11, 14
    rows, columns = np.array([0, 2, 1, 2]), np.array([0, 5, 4, 3])
    transposed = np.array([False, True, False, True])
    with jax.enable_x64(True):
        corners = jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32)
        found = patterns(*corners, jnp.int32(side), jnp.asarray(transposed), (height, width))
    found = np.asarray(found)
    for i, values in enumerate(found):
        inside = values[rows[i] : rows[i] + side, columns[i] : columns[i] + side]
        np.testing.assert_allclose(inside, pattern(side, transposed[i]), rtol=1e-12)
        assert np.count_nonzero(values) == side**2
        np.testing.assert_allclose(np.linalg.norm(values), 1, rtol=1e-12)
        first = inside.T[: side // 2] if transposed[i] else inside[: side // 2]
        assert (first > 0).all()
        assert (inside > 0).sum() == side * (side // 2)
        if side > 1:
            np.testing.assert_allclose(np.sum(first**2), 0.5, rtol=1e-12)


def l2_start(x, eps, draws):
    delta, tile = np.zeros_like(x), max(min(x.shape[1:3]) // 5, 1)
    down, across = x.shape[1] // tile, x.shape[2] // tile
    top, left = (x.shape[1] - down * tile) // 2, (x.shape[2] - across * tile) // 2
    for b, i, j, c in np.ndindex(len(x), down, across, x.shape[3]):
        sign = 1 if draws[b, i, j, 1 + c] >= 0.5 else -1
        row, column = top + i * tile, left + j * tile
        values = sign * pattern(tile, draws[b, i, j, 0] >= 0.5)
        delta[b, row : row + tile, column : column + tile, c] = values
    norms = np.linalg.norm(delta.reshape(len(x), -1), axis=1).reshape(-1, 1, 1, 1)
    return np.clip(x + eps * delta / norms, 0, 1)


def l2_window(best, x, eps, draws, side):
    """One image: the steps of the paper's algorithm 3."""
    delta, channels = best - x, x.shape[2]
    room = np.array(x.shape[:2] * 2) - side
    row, column, row2, column2 = np.floor(draws[:4] * room).astype(int)
    gains, loses = np.zeros(x.shape[:2], bool), np.zeros(x.shape[:2], bool)
    gains[row : row + side, column : column + side] = True
    loses[row2 : row2 + side, column2 : column2 + side] = True
    unused = max(eps**2 - np.sum(delta**2), 0)
    moved = delta.copy()
    for c in range(channels):
        old = delta[..., c]
        mass = np.sqrt(np.sum(old[gains | loses] ** 2) + unused / channels)
        fresh = (1 if draws[5 + c] >= 0.5 else -1) * pattern(side, draws[4] >= 0.5)
        window = old[gains].reshape(side, side)
        if np.linalg.norm(window) > 0:
            fresh = fresh + window / np.linalg.norm(window)
        moved[loses, c] = 0
        moved[gains, c] = (fresh / np.linalg.norm(fresh) * mass).ravel()
    return np.clip(x + eps * moved / np.linalg.norm(moved), 0, 1)


@pytest.mark.parametrize("shape", [(3, 15, 11, 2), (2, 6, 7, 3)])
def test_l2_start_is_a_grid_of_tiles(shape):
    rng = np.random.default_rng(0)
    x = rng.uniform(size=shape)
    with jax.enable_x64(True):
        grid = windows.l2_grid(*shape[1:3])
        draws = rng.uniform(size=(shape[0], *grid, 1 + shape[3]))
        found = jax.jit(windows.l2_start)(jnp.asarray(x), jnp.float64(0.7), jnp.asarray(draws))
    np.testing.assert_allclose(found, l2_start(x, 0.7, draws), atol=1e-14)
    # Where nothing is cut off, all of eps is used.
    middle = 0.5 + 0 * x
    start = l2_start(middle, 0.7, draws)
    np.testing.assert_allclose(distances(start, middle, "l2"), 0.7, rtol=1e-12)


def test_an_l2_run_is_that_of_numpy():
    eps, queries = 1.5, 60
    x, labels = np.asarray(small()[0], np.float64), np.asarray(small()[1])
    rng = np.random.default_rng(1)
    grid = windows.l2_grid(*SHAPE[1:3])
    draws = attacks.SquareDraws(
        rng.uniform(size=(SHAPE[0], *grid, 1 + SHAPE[3])),
        rng.uniform(size=(queries, SHAPE[0], 5 + SHAPE[3])),
    )
    with jax.enable_x64(True):
        found = jax.jit(partial(attacks.square, bumpy, norm="l2", queries=queries))(
            x, labels, eps=eps, draws=draws
        )
        model = jax.jit(bumpy)

        def margins(images):
            return -np.asarray(losses.margin(model(jnp.asarray(images)), jnp.asarray(labels)))

        best = l2_start(x, eps, draws.start)
        sides = [5] * 11 + [5] * 40 + [3] * 9  # 42 pixels: sqrt(.8 * 42), halved after 10 and 50
        least, used = margins(best), np.ones(len(x), int)
        for query in range(queries):
            side = sides[query]
            new = np.stack([
                l2_window(b, image, eps, d, side)
                for b, image, d in zip(best, x, draws.windows[query], strict=True)
            ])  # fmt: skip
            value, live = margins(new), least > 0
            taken = live & (value < least)
            used += live
            best, least = (
                np.where(taken[:, None, None, None], new, best),
                np.where(taken, value, least),
            )
    np.testing.assert_allclose(found.x_best, best, atol=1e-10)
    np.testing.assert_array_equal(found.queries, used)
    np.testing.assert_array_equal(found.robust, least > 0)
    assert len(set(used)) > 1, "choose eps so that some images break on the way"


def test_l2_is_stronger_than_noise_and_weaker_than_all_of_auto_attack():
    for eps, by_all in zip(GOLDEN["eps_l2"], GOLDEN["aa_l2_robust"], strict=True):
        found = on_digits(float(eps), KEY, norm="l2", queries=500)
        robust = np.asarray(found.robust)
        x, labels = jnp.asarray(published_images("x"), jnp.float32), GOLDEN["labels"]
        withstood = GOLDEN["clean_correct"].copy()
        for seed in range(20):
            noise = jax.random.normal(jax.random.key(seed), x.shape)
            noise = noise / jnp.sqrt(jnp.sum(noise**2, (1, 2, 3), keepdims=True))
            withstood &= published_model(jnp.clip(x + eps * noise, 0, 1)).argmax(-1) == labels
        assert robust.sum() <= withstood.sum() - 10
        assert (robust & ~withstood).sum() <= 1
        # What every attack of the published suite left standing stands.
        assert (by_all.all(0) & ~robust).sum() <= 1
        assert distances(found.x_adv, x, "l2").max() <= eps + 1e-6


# What holds for every model


@pytest.mark.parametrize(
    ("dtype", "queries"), [("float32", 0), ("float32", QUERIES), ("float64", QUERIES)]
)
@pytest.mark.parametrize("norm", NORMS)
def test_stays_in_the_ball_and_the_range(norm, queries, dtype):
    with jax.enable_x64(dtype == "float64"):
        x, labels = small(dtype)
        tolerance = 1e-12 if dtype == "float64" else 1e-6
        for eps in (0.0, 0.3, 5.0):
            found = attack(x, labels, eps, KEY, norm=norm, queries=queries)
            assert found.x_adv.dtype == found.x_best.dtype == dtype
            for images in (found.x_adv, found.x_best):
                assert distances(images, x, norm).max() <= eps + tolerance
                assert images.min() >= 0
                assert images.max() <= 1
            if eps == 0:
                np.testing.assert_array_equal(found.x_best, x)
                assert found.robust.all()
            else:
                assert (distances(found.x_best, x, norm) > 0).all()
            # An image without a misclassified version is returned as it came.
            np.testing.assert_array_equal(found.x_adv[found.robust], x[found.robust])
            wrong = bumpy(found.x_adv).argmax(-1) != labels
            np.testing.assert_array_equal(wrong, ~found.robust)


@pytest.mark.parametrize("norm", NORMS)
def test_longer_runs_go_on_from_shorter_ones(norm):
    x, labels = small()
    eps, before = EPS[norm], None
    for queries in (0, 1, QUERIES, 200):
        found = attack(x, labels, eps, KEY, norm=norm, queries=queries)
        margin = -np.asarray(losses.margin(bumpy(found.x_best), labels))
        np.testing.assert_array_equal(margin > 0, found.robust)
        assert (found.queries[found.robust] == queries + 1).all()
        if before is not None:
            assert (margin <= before[0] + 1e-6).all()
            # Broken images are frozen.
            broken = ~before[1].robust
            same([v[broken] for v in found], [v[broken] for v in before[1]])
        before = margin, found
    assert 0 < found.robust.sum() < len(x), "choose eps so that both kinds occur"


@pytest.mark.parametrize("norm", NORMS)
def test_images_do_not_see_their_batch(norm):
    x, labels = small()
    eps, order = EPS[norm], jnp.array([2, 0, 3, 1])
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(jnp.arange(4))
    whole = attack(x, labels, eps, KEY, norm=norm)
    same(attack(x, labels, eps, keys, norm=norm), whole)
    mixed = attack(x[order], labels[order], eps, keys[order], norm=norm)
    same(mixed, [v[order] for v in whole])
    # Beside images that are broken at once, the loop runs on for the others.
    others = labels.at[:2].set((labels[:2] + 1) % 5)
    part = attack(x, others, eps, keys, norm=norm)
    same([v[2:] for v in part], [v[2:] for v in whole])
    assert not np.array_equal(attack(x, labels, eps, jax.random.key(7), norm=norm).x_best,
                              whole.x_best)  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_jit_and_eager_agree(norm):
    x, labels = small()
    eager = attacks.square(bumpy, x, labels, eps=0.2, norm=norm, queries=QUERIES, key=KEY)
    compiled = attack(x, labels, 0.2, KEY, norm=norm)
    np.testing.assert_array_equal(eager.robust, compiled.robust)
    np.testing.assert_array_equal(eager.queries, compiled.queries)
    np.testing.assert_allclose(eager.x_best, compiled.x_best, atol=1e-6)


def test_same_result_over_several_devices():
    x, labels = small()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(jnp.arange(4))
    rows = PartitionSpec("data")
    sharded = jax.jit(
        jax.shard_map(
            lambda *a: attacks.square(bumpy, *a[:2], eps=EPS["linf"], queries=QUERIES, key=a[2]),
            mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows,
        )
    )  # fmt: skip
    whole, parts = attack(x, labels, EPS["linf"], KEY), sharded(x, labels, keys)
    np.testing.assert_array_equal(parts.robust, whole.robust)
    np.testing.assert_array_equal(parts.queries, whole.queries)
    np.testing.assert_allclose(parts.x_best, whole.x_best, atol=1e-6)


def test_stops_when_all_images_are_broken():
    calls = []

    def model(bright):
        def logits_fn(x):
            jax.debug.callback(lambda: calls.append(1))
            above = x.reshape(len(x), -1).max(1) - bright
            return jnp.stack([-above, above], axis=1)

        return logits_fn

    x, zero = jnp.full((3, 4, 12, 1), 0.5), jnp.zeros(3, jnp.int32)

    def run(bright, labels):
        calls.clear()
        found = attacks.square(
            model(bright), x, labels, eps=0.1, queries=QUERIES, key=jax.random.key(1)
        )
        jax.block_until_ready(found)
        jax.effects_barrier()
        return found, len(calls)

    # Wrong from the beginning: one look at the images.
    found, looks = run(0.3, zero)
    assert looks == 1
    assert found.queries.tolist() == [1, 1, 1]
    assert not found.robust.any()
    np.testing.assert_array_equal(found.x_adv, x)
    # Any bright pixel breaks them: the stripes of the start do.
    found, looks = run(0.55, zero)
    assert looks == 2
    assert found.queries.tolist() == [1, 1, 1]
    assert not found.robust.any()
    assert distances(found.x_adv, x, "linf").min() == pytest.approx(0.1)
    # Nothing does: every query is made.
    found, looks = run(0.7, zero)
    assert looks == 2 + QUERIES
    assert found.queries.tolist() == [1 + QUERIES] * 3
    assert found.robust.all()
    np.testing.assert_array_equal(found.x_adv, x)


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_finite_is_never_robust(norm):
    x, labels = small()

    def nowhere(images):
        return bumpy(images).at[:, 3].set(jnp.nan)

    def nan_off_the_image(images):
        near = jnp.abs(images - x).max((1, 2, 3)) == 0
        return jnp.where((near | (jnp.arange(4) == 1))[:, None], bumpy(images), jnp.nan)

    def infinite(images):
        return bumpy(images).at[:, 3].set(-jnp.inf)

    for model in (nowhere, infinite)[:: 1 if norm == "linf" else 2]:
        found = attacks.square(model, x, labels, eps=0.01, norm=norm, queries=3, key=KEY)
        assert not found.robust.any()
    found = attacks.square(nan_off_the_image, x, labels, eps=0.01, norm=norm, queries=3, key=KEY)
    assert found.robust.tolist() == [False, True, False, False]
    assert found.queries.tolist() == [1, 4, 1, 1]


def test_misclassified_images_stay_as_they_are():
    x, labels = small()
    wrong = (labels + 1) % 5
    found = attack(x, labels.at[1:3].set(wrong[1:3]), 0.01, KEY)
    assert found.robust.tolist() == [True, False, False, True]
    assert found.queries.tolist() == [QUERIES + 1, 1, 1, QUERIES + 1]
    np.testing.assert_array_equal(found.x_best[1:3], x[1:3])


@pytest.mark.parametrize("norm", NORMS)
def test_one_program_with_one_model_for_every_eps(norm):
    traces = []

    @jax.jit
    def run(x, labels, eps, p_init, key):
        traces.append(1)
        return attacks.square(
            lambda images: images.reshape(len(images), -1) @ jnp.ones((84, 5)),
            x, labels, eps=eps, p_init=p_init, norm=norm, queries=3, key=key,
        )  # fmt: skip

    x, labels = small()
    for eps, p_init, seed in ((0.1, 0.8, 0), (0.2, 0.5, 1)):
        run(x, labels, eps, p_init, jax.random.key(seed))
    assert len(traces) == 1
    program = run.lower(x, labels, 0.1, 0.8, KEY).as_text()
    assert program.count("stablehlo.dot_general") == 1


def test_windows_are_of_the_share_asked_for():
    x, labels = 0.5 + 0 * small()[0], jnp.zeros(4, jnp.int32)

    def first_pixel(images):  # never below the start: the first window is always better
        return jnp.stack([images[:, 0, 0, 0] * 0 + 1, 0 * images[:, 0, 0, 0]], axis=1)

    for p_init, side in ((1.0, 6), (0.4, 4), (0.01, 1)):
        draws = attacks.SquareDraws(np.zeros((4, 7, 2)), np.ones((1, 4, 4)) * 0.999)
        found = attacks.square(
            lambda images: first_pixel(images) + images.mean((1, 2, 3))[:, None] * jnp.array(
                [[-1.0, 0.0]]
            ),
            x, labels, eps=0.25, queries=1, p_init=p_init, draws=draws,
        )  # fmt: skip
        assert ((found.x_best == 0.75).sum((1, 2)) == side**2).all()
    # Rescaled, the share falls within the same run.
    p = [float(windows.share(9, windows.halvings(10, r), jnp.float32(1))) for r in (False, True)]
    assert p == [1.0, 2.0**-9]


def test_low_precision_models():
    x, labels = small()
    model = lambda images: bumpy(images.astype(jnp.bfloat16))  # noqa: E731
    labels = model(x).argmax(-1)
    found = attacks.square(model, x.astype(jnp.bfloat16), labels, eps=0.3, queries=5, key=KEY)
    assert found.x_adv.dtype == jnp.float32
    assert (model(found.x_adv).argmax(-1)[~found.robust] != labels[~found.robust]).all()


DRAWS = attacks.SquareDraws(np.zeros((4, 7, 2)), np.zeros((3, 4, 4)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((4, 6, 7, 2), int)}, TypeError, "x must be floating-point images"),
        ({"x": np.full(SHAPE, 1.5)}, ValueError, r"x must be images in \[0, 1\]"),
        ({"x": np.zeros((4, 84))}, ValueError, "x must have 4 dimensions"),
        ({"x": np.zeros((0, 6, 7, 2))}, ValueError, "x must have at least one image"),
        ({"x": np.zeros((4, 2, 7, 2)), "norm": "l2"}, ValueError, "x must have at least 3 rows"),
        ({"labels": np.zeros(4)}, TypeError, "labels must be an integer array"),
        ({"labels": np.zeros(3, int)}, ValueError, r"labels must have shape \(4,\)"),
        ({"labels": np.full(4, 5)}, ValueError, "labels must be class indices from 0 to 4, got 5"),
        ({"labels": np.full(4, -1)}, ValueError, "labels must be class indices from 0 to 4"),
        ({"logits_fn": 3}, TypeError, "logits_fn must be a function"),
        ({"logits_fn": lambda x: x}, ValueError, "logits_fn must return logits of shape"),
        (
            {"logits_fn": lambda x: bumpy(x, 1)},
            ValueError,
            "logits_fn must return logits of at least 2",
        ),
        ({"eps": -0.1}, ValueError, "eps must be a finite number at least 0, got -0.1"),
        ({"eps": float("nan")}, ValueError, "eps must be"),
        ({"norm": "l1"}, ValueError, "norm must be one of l2, linf; got 'l1'"),
        ({"queries": -1}, ValueError, "queries must be an integer at least 0, got -1"),
        ({"queries": 2.5}, TypeError, "queries must be an integer"),
        ({"p_init": 0.0}, ValueError, "p_init must be a finite number above 0"),
        ({"p_init": 1.5}, ValueError, "p_init must be a finite number above 0 and at most 1"),
        ({"rescale": 1}, TypeError, "rescale must be True or False, got int 1"),
        ({"key": None}, ValueError, "exactly one of key and draws"),
        ({"draws": DRAWS}, ValueError, "exactly one of key and draws"),
        ({"key": np.zeros(2, np.uint32)}, TypeError, "key must be a typed key"),
        ({"key": None, "draws": (0, 1)}, TypeError, "draws must be SquareDraws"),
        ({"key": None, "draws": DRAWS, "queries": 4}, ValueError, "draws.windows must have shape"),
        ({"key": None, "draws": DRAWS, "norm": "l2"}, ValueError, "draws.start must have shape"),
    ],
)
def test_bad_input(changes, error, message):
    x, labels = small()
    given = {"x": x, "labels": labels, "logits_fn": bumpy, "eps": 0.1, "queries": 3, "key": KEY}
    given |= changes
    with pytest.raises(error, match=message):
        attacks.square(given.pop("logits_fn"), given.pop("x"), given.pop("labels"), **given)
