"""The layer rule, and what an API process may load."""

import ast
import subprocess
import sys
from pathlib import Path

import phoenix_ml

PACKAGE = Path(phoenix_ml.__file__).parent
# What a layer may import of the package, and which other libraries than the standard one.
LAYERS = {
    "domain": ({"domain"}, {"numpy", "msgspec"}),
    "application": ({"application", "domain"}, {"numpy", "scipy", "msgspec"}),
}


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


def test_imports_point_inwards_only() -> None:
    """A use case that knows its database, or a domain that knows a library, can be neither tested nor moved."""
    offences = []
    for layer, (own, libraries) in LAYERS.items():
        for path in (PACKAGE / layer).rglob("*.py"):
            for name in imports_of(path):
                root, *rest = name.split(".")
                inwards = root == "phoenix_ml" and bool(rest) and rest[0] in own
                if not (inwards or root in libraries or root in sys.stdlib_module_names):
                    offences.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert offences == []


def test_infrastructure_knows_of_the_outer_ring_only_what_the_protocols_are_given() -> None:
    """Adapters are chosen by the composition root; one that reaches back makes the choice a circle."""
    offences = []
    for path in (PACKAGE / "infrastructure").rglob("*.py"):
        for name in imports_of(path):
            outer = name.startswith(("phoenix_ml.processes", "phoenix_ml.cli", "phoenix_ml.demo"))
            composed = name.startswith(("phoenix_ml.bootstrap", "phoenix_ml.settings"))
            if outer or (composed and path.parent.name not in ("http", "grpc")):
                offences.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert offences == []


def test_api_process_loads_nothing_that_it_does_not_need() -> None:
    """Every library costs memory in each worker and time at each restart."""
    unwanted = ["scipy", "grpc", "sklearn", "alembic", "pyarrow", "onnx", "redis", "psycopg", "rich"]
    program = (
        "import sys, phoenix_ml.processes.api as api\n"
        "from phoenix_ml.settings import Settings\n"
        "from phoenix_ml.bootstrap import bootstrap, open_features\n"
        "import tempfile, pathlib\n"
        "settings = Settings(data=pathlib.Path(tempfile.mkdtemp()))\n"
        "bootstrap(settings).database.close(); open_features(settings)\n"
        f"print([name for name in {unwanted} if name in sys.modules])"
    )

    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert shown.strip() == "[]"
