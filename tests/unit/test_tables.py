"""Tables of any size, of which a part is read."""

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phoenix_ml.infrastructure.tables import read_spread


def numbered(path: Path, rows: int) -> Path:
    pq.write_table(pa.table({"row": range(rows), "name": [str(i) for i in range(rows)]}), path)
    return path


@pytest.mark.parametrize("rows", [0, 1, 999, 5000])
def test_a_table_that_fits_is_read_whole(tmp_path: Path, rows: int) -> None:
    """Nothing is left out where nothing needs to be."""
    columns = read_spread(numbered(tmp_path / "t.parquet", rows), 5000)

    assert columns == {"row": list(range(rows)), "name": [str(i) for i in range(rows)]}


def test_of_a_large_table_runs_are_read_that_are_spread_over_all_of_it(tmp_path: Path) -> None:
    """Rows that follow each other stay together, by which it is seen how much they have in common; none of the time is left out."""
    columns = read_spread(numbered(tmp_path / "t.parquet", 300_000), 10_000)

    rows = columns["row"]
    assert 5_000 <= len(rows) <= 10_000
    assert rows == sorted(rows)
    assert columns["name"] == list(map(str, rows))
    starts = [one for before, one in zip([-2, *rows], rows, strict=False) if one != before + 1]
    assert len(starts) >= 5
    assert {later - earlier for earlier, later in itertools.pairwise(starts)} == {32_000}
    assert starts[0] == 0
    assert rows[-1] > 250_000
