"""The notebooks run from top to bottom, at a small size."""

from __future__ import annotations

from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("default")  # Jupyter's own packages warn about each other
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("KDJAX_NOTEBOOK_SIZE", "tiny")
    monkeypatch.setenv("MPLBACKEND", "agg")
    # Most of the time is compilation, and the notebooks' programs are many and small.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources, kernel_name="python3").execute()
