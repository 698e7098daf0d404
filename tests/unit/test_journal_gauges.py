"""What is told of journals, by the role that empties them."""

from pathlib import Path

import pytest

from phoenix_ml.infrastructure.events.journal import JournalReader
from phoenix_ml.infrastructure.telemetry.catalogue import CATALOGUE
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter, render
from phoenix_ml.processes.journals import JournalGauges


def test_a_segment_that_cannot_be_read_is_logged_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers lie in it that nobody would miss before they are asked for."""
    segments = [tmp_path / f"journal/api-0/0000000000000000000{n}-00000000.segment" for n in (1, 2)]
    segments[0].mkdir(parents=True)  # a folder: the disk refuses to read it as a file
    reader = JournalReader(tmp_path / "journal")
    clock = [0.0]
    counted = []
    with MetricsWriter(tmp_path / "metrics/log.mmap") as metrics:
        gauges = JournalGauges(metrics, clock=lambda: clock[0])
        for changed in (None, None, segments[1].mkdir):
            if changed is not None:
                changed()
            clock[0] += 2
            reader.read(10)
            gauges.set_now_and_then(reader)
            counted.append(unreadable_segments(tmp_path / "metrics"))

    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert counted == [1, 1, 2]
    assert [str(segment) in error for segment, error in zip(segments, errors, strict=True)] == [True, True]


def unreadable_segments(folder: Path) -> float:
    text = render(folder, CATALOGUE).decode()
    (line,) = [line for line in text.splitlines() if line.startswith("phoenix_journal_unreadable_segments ")]
    return float(line.rpartition(" ")[2])
