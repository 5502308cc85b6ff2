"""Data sets as named splits, batches that are pure functions of (seed, step), stored teachers.

``digits``, ``npz``, ``tfds``, ``text`` and ``arrays`` return the same immutable ``Dataset``. Its
batches are dicts of NumPy arrays: ``image`` [B, H, W, C] (or ``input_ids`` [B, L]), ``label`` int32
[B] (-1 = unlabelled), ``index`` int32 [B] (the row in its split, whatever the shuffling) and, with
``last="pad"``, ``weight`` float32 [B] (0 on padding rows).

uint8 images stay uint8 in memory. Batches hold them as float32 in [0, 1], ready for any model; with
``raw=True`` they stay uint8, a quarter of the traffic to the device, and the compiled step scales
them: every function of ``kdjax.augment`` does so first, ``kdjax.augment.to_float`` does only that.
"""

from kdjax.data._batches import Batches
from kdjax.data._dataset import Dataset, Split
from kdjax.data._joined import Joined, joined
from kdjax.data._prefetch import Prefetch, prefetch
from kdjax.data._sources import arrays, digits, npz
from kdjax.data._stored import StoredOutputs, store_outputs, stored_outputs
from kdjax.data._text import text
from kdjax.data._tfds import tfds

__all__ = [
    "Batches",
    "Dataset",
    "Joined",
    "Prefetch",
    "Split",
    "StoredOutputs",
    "arrays",
    "digits",
    "joined",
    "npz",
    "prefetch",
    "store_outputs",
    "stored_outputs",
    "text",
    "tfds",
]
