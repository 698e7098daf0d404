"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

import phoenix_ml

_PACKAGE = Path(phoenix_ml.__file__).parent
_MODULES = [
    ".".join(("phoenix_ml", *path.relative_to(_PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(_PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text()
]


def test_there_are_examples() -> None:
    """The search finds modules, so the test below has something to run."""
    assert _MODULES


@pytest.mark.parametrize("name", _MODULES)
def test_examples_in_docstrings_print_what_they_show(name: str) -> None:
    """Each example of the module runs and prints what stands below it."""
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
