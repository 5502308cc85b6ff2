"""One of two processes that train together on loopback: a program for the tests."""

import sys

import jax
import tiny_run as tiny

import kdjax as kd


class Half(tiny.Data):
    """This process's rows of each global batch."""

    def at(self, step):
        rows, each = super().at(step), tiny.BATCH // jax.process_count()
        first = jax.process_index() * each
        return {name: x[first : first + each] for name, x in rows.items()}


def main(port, rank, folder, steps, pause):
    jax.config.update("jax_num_cpu_devices", 2)
    kd.parallel.initialize(
        f"localhost:{port}", processes=2, process_id=int(rank), heartbeat_timeout=10
    )
    evaluate = kd.train.evaluator(tiny.MODEL, [Half().at(0)], mesh=kd.parallel.data_mesh())
    state = kd.train.fit(
        tiny.LEARNER,
        tiny.start(),
        Half(pause=float(pause)),
        steps=int(steps),
        mesh=kd.parallel.data_mesh(),
        checkpoint=folder,
        save_every=5,
        log_every=2,
        evaluate=evaluate,
        best="accuracy",
        plot=False,
    )
    print("reached", int(state.step))


if __name__ == "__main__":
    main(*sys.argv[1:])
