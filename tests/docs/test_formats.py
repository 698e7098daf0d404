"""The example of how to register other formats, executed as a reader would, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "register-other-formats.md"

pytestmark = pytest.mark.system


def _squeezed(text: str) -> str:
    """Without the spaces that only align columns."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def test_the_example_does_what_it_shows(tmp_path: Path) -> None:
    """The script trains, and each command prints what stands below it, ``…`` being anything."""
    blocks = dict(
        re.findall(r"^```(python|console)\n(.*?)^```$", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
    )
    (tmp_path / "train.py").write_text(blocks["python"])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PHOENIX_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    parts = re.split(r"^\$ (.*)\n", blocks["console"], flags=re.MULTILINE)
    commands = list(zip(parts[1::2], parts[2::2], strict=True))

    for command, shown in commands:
        done = subprocess.run(
            ["bash", "-c", f"{command} 2>&1"],
            cwd=tmp_path,
            env=kept | {"PATH": path, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        pattern = re.escape(_squeezed(shown)).replace("…", r"[^\n]*")
        assert re.fullmatch(pattern, _squeezed(done.stdout)), f"$ {command}\n{done.stdout}"
        assert done.returncode == 0

    assert [command.split()[0] for command, _ in commands] == ["python", "phoenix-ml"]
