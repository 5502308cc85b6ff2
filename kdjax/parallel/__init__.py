"""Data parallelism: meshes, shardings, one update in three parallel forms, several processes.

`jit_update` is the form to use. The compiler splits the program over the mesh, every loss, batch
statistic and metric is that of the whole batch, and parameters may be sharded too. With
`shard_map_update` and `pmap_update` each device runs the update on its own rows and the learner
exchanges sums by name; batch statistics are then those of each device's rows, averaged afterwards.

Several processes: every process calls `initialize` first, builds the same mesh and passes its own
rows. All of them must take every step together: a process that stops early, or that has one batch
less, leaves the others waiting (`agree`, `pad_batch`).
"""

from kdjax.parallel._placement import (
    batch_sharding,
    data_mesh,
    pad_batch,
    replicate,
    shard_batch,
    state_sharding,
)
from kdjax.parallel._processes import agree, initialize, is_main
from kdjax.parallel._updates import jit_update, pmap_update, shard_map_update

__all__ = [
    "agree",
    "batch_sharding",
    "data_mesh",
    "initialize",
    "is_main",
    "jit_update",
    "pad_batch",
    "pmap_update",
    "replicate",
    "shard_batch",
    "shard_map_update",
    "state_sharding",
]
