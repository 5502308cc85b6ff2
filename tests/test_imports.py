"""Imports point one way, and `import kdjax` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kdjax

ROOT = Path(kdjax.__file__).parent
# What each room may import of kdjax, besides itself. Private modules belong to the room named.
LEAVES = {"losses", "labels", "schedules", "augment", "metrics"}
CORE = {"core", "_pairs", "_parts", "_teachers", "_gradients", "_mesh_axis", "_started"}
BELOW_CORE = LEAVES | {"attacks", "kernels", "_checks"}
ALLOWED = {
    "_checks": set(),
    **{leaf: {"_checks"} for leaf in LEAVES},
    "attacks": LEAVES | {"_checks"},
    "kernels": LEAVES | {"_checks"},
    **dict.fromkeys(CORE, CORE | BELOW_CORE),
    "terms": CORE | BELOW_CORE,
    "adapters": CORE | BELOW_CORE | {"terms"},
    "models": CORE | BELOW_CORE | {"terms", "adapters"},
    "lm": CORE | BELOW_CORE | {"terms", "adapters"},
    "methods": CORE | BELOW_CORE | {"terms", "adapters", "models"},
    "theory": {"_checks"},
    "parallel": CORE | {"_checks"},
    "data": {"augment", "_checks"},
    "train": CORE | BELOW_CORE | {
        "terms", "adapters", "models", "lm", "methods", "parallel", "data",
    },
    "experiments": CORE | BELOW_CORE | {
        "terms", "adapters", "models", "lm", "methods", "parallel", "data", "train", "theory",
    },
}  # fmt: skip
HEAVY = {
    "flax": {"adapters", "models", "lm"},
    "orbax": {"train"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "tensorflow": set(),
    "torch": set(),
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules that a file imports, as full dotted names (`from a import b` gives a and a.b)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(p for p in ROOT.rglob("*.py") if room(p) not in ("__init__", "__main__", "cli"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    here = room(path)
    assert here in ALLOWED, f"a new room {here!r}: say in ALLOWED what it may import"
    rooms = {p.removesuffix(".py") for p in (q.name for q in ROOT.iterdir())}
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "kdjax" and len(parts) > 1 and parts[1] in rooms:
            target = parts[1]
            assert target == here or target in ALLOWED[here], f"{here} imports {target}"
        if parts[0] in HEAVY:
            assert here in HEAVY[parts[0]], f"{here} imports {parts[0]}"


def test_importing_kdjax_is_light():
    heavy = ("flax", "orbax", "tensorflow_datasets", "grain", "tensorflow", "sklearn", "matplotlib")
    code = (
        "import sys, kdjax, kdjax.core, kdjax.losses, kdjax.terms\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in kdjax.__all__:
        assert getattr(kdjax, name) is not None
    assert set(kdjax.__all__) <= set(dir(kdjax))
    with pytest.raises(AttributeError, match="nonsense"):
        kdjax.nonsense  # noqa: B018
