"""Metrics over several processes: what a scrape shows is what all of them, the killed ones included, counted."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf, isnan, nan
from pathlib import Path
from tempfile import TemporaryDirectory

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from phoenix_ml.infrastructure.telemetry import metrics
from phoenix_ml.infrastructure.telemetry.metrics import (
    FILE_BYTES,
    MAX_VALUES,
    Counter,
    Definition,
    Gauge,
    Histogram,
    MetricsFullError,
    MetricsWriter,
    clear,
    negotiate,
    render,
)

REQUESTS = Counter("requests_total", 'Requests, by "model"\nand \\ outcome.', ("model",))
RESTARTS = Counter("restarts_total", "Restarts.")
LATENCY = Histogram("latency_seconds", "Latency.", ("model",), buckets=(0.25, 0.5, 2.0))
IN_FLIGHT = Gauge("in_flight", "Requests in flight.", ("model",))
LAG = Gauge("lag_seconds", "The longest lag.", aggregate="max")
RESIDENT = Gauge("resident_bytes", "Memory.", aggregate="per_process")

Labels = frozenset[tuple[str, str]]
Families = dict[str, tuple[str, str, dict[tuple[str, Labels], float]]]


def families_in(exposition: bytes, *, openmetrics: bool = False) -> Families:
    """Type, help and samples of each family, as prometheus_client's own parser reads them."""
    parse = parse_openmetrics if openmetrics else parse_text
    families: Families = {}
    for family in parse(exposition.decode()):
        samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        if not family.name.endswith("_created"):
            families[family.name] = (family.type, family.documentation, samples)
    return families


def samples_in(folder: Path, *definitions: Definition) -> dict[tuple[str, Labels], float]:
    """All samples that a scrape of these definitions shows."""
    families = families_in(render(folder, definitions))
    return {key: value for _, _, samples in families.values() for key, value in samples.items()}


def sample(name: str, **labels: str) -> tuple[str, Labels]:
    return name, frozenset(labels.items())


def start(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A process of its own that runs `script` with this package and the arguments."""
    source = Path(metrics.__file__).parents[3]
    prelude = f"import sys; sys.path.insert(0, {str(source)!r})\nfrom pathlib import Path\n"
    prelude += "from phoenix_ml.infrastructure.telemetry.metrics import *\n"
    command = [sys.executable, "-c", prelude + script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[MetricsWriter]:
    with MetricsWriter(tmp_path / "api-0.mmap") as opened:
        yield opened


class TestValues:
    def test_a_counter_shows_what_was_added(self, tmp_path: Path, writer: MetricsWriter) -> None:
        """An alert on a rate is only as right as the sum below it."""
        counter = writer.counter(REQUESTS, model="fraud")

        counter.add()
        counter.add(2.5)

        assert {sample("requests_total", model="fraud"): 3.5} == samples_in(tmp_path, REQUESTS)

    def test_the_same_labels_share_their_values(self, tmp_path: Path, writer: MetricsWriter) -> None:
        """Two parts of the platform that count the same thing must not hide each other's counts."""
        writer.counter(REQUESTS, model="fraud").add(1)
        writer.counter(REQUESTS, model="fraud").add(2)

        assert {sample("requests_total", model="fraud"): 3.0} == samples_in(tmp_path, REQUESTS)

    @pytest.mark.parametrize("amount", [-1.0, nan, -inf])
    def test_a_counter_refuses_to_shrink(self, amount: float, tmp_path: Path, writer: MetricsWriter) -> None:
        """Prometheus takes a smaller value for a restart and shows a rate that never was."""
        counter = writer.counter(RESTARTS)

        with pytest.raises(ValueError, match="only grows"):
            counter.add(amount)

        assert {sample("restarts_total"): 0.0} == samples_in(tmp_path, RESTARTS)

    def test_a_histogram_counts_a_value_in_each_bucket_from_its_bound_on(
        self, tmp_path: Path, writer: MetricsWriter
    ) -> None:
        """A quantile is read off cumulative buckets whose bounds are inclusive."""
        histogram = writer.histogram(LATENCY, model="fraud")

        for seconds in (0.125, 0.25, 0.375, 2.0, 8.0):
            histogram.observe(seconds)

        expected = {
            sample("latency_seconds_bucket", model="fraud", le="0.25"): 2.0,
            sample("latency_seconds_bucket", model="fraud", le="0.5"): 3.0,
            sample("latency_seconds_bucket", model="fraud", le="2.0"): 4.0,
            sample("latency_seconds_bucket", model="fraud", le="+Inf"): 5.0,
            sample("latency_seconds_count", model="fraud"): 5.0,
            sample("latency_seconds_sum", model="fraud"): 10.75,
        }
        assert expected == samples_in(tmp_path, LATENCY)

    def test_a_histogram_leaves_a_nan_out(self, tmp_path: Path, writer: MetricsWriter) -> None:
        """One NaN score would otherwise make the sum NaN until the next start of everything."""
        histogram = writer.histogram(LATENCY, model="fraud")

        histogram.observe(nan)
        histogram.observe(1.0)

        shown = samples_in(tmp_path, LATENCY)
        assert shown[sample("latency_seconds_sum", model="fraud")] == 1.0
        assert shown[sample("latency_seconds_count", model="fraud")] == 1.0

    @pytest.mark.parametrize("value", [-3.5, 0.0, 1e300, inf, -inf])
    def test_a_gauge_shows_the_last_value(self, value: float, tmp_path: Path, writer: MetricsWriter) -> None:
        """A gauge is the current state, not its history."""
        gauge = writer.gauge(IN_FLIGHT, model="fraud")

        gauge.set(7.0)
        gauge.set(value)

        assert {sample("in_flight", model="fraud"): value} == samples_in(tmp_path, IN_FLIGHT)

    def test_a_gauge_may_be_nan(self, tmp_path: Path, writer: MetricsWriter) -> None:
        """A ratio of nothing is not a number, and says nothing about the metrics beside it."""
        for gauge in (LAG, RESIDENT):
            writer.gauge(gauge).set(nan)
        writer.gauge(IN_FLIGHT, model="odd").set(nan)
        writer.gauge(IN_FLIGHT, model="fraud").set(2)
        writer.histogram(LATENCY, model="fraud").observe(1)

        shown = samples_in(tmp_path, LAG, RESIDENT, IN_FLIGHT, LATENCY)

        not_numbers = {sample("lag_seconds"), sample("resident_bytes", process="api-0")}
        assert {*not_numbers, sample("in_flight", model="odd")} == {key for key in shown if isnan(shown[key])}

    @pytest.mark.parametrize(
        "label", ['say "hi"', "a\nb\r\nc", "back\\slash\\n", "{a=b},c", "模型 é 🦅", " ", ""]
    )
    def test_a_label_value_comes_back_as_it_was(
        self, label: str, tmp_path: Path, writer: MetricsWriter
    ) -> None:
        """A model may have any name, and one odd name must not break the scrape of all others."""
        writer.counter(REQUESTS, model=label).add()

        assert {sample("requests_total", model=label): 1.0} == samples_in(tmp_path, REQUESTS)


class TestBinding:
    @pytest.mark.parametrize("labels", [{}, {"modle": "fraud"}, {"model": "fraud", "more": "1"}])
    def test_other_labels_than_defined_are_refused(
        self, labels: dict[str, str], writer: MetricsWriter
    ) -> None:
        """A typing error in a label shows at start, not as a gap on a dashboard."""
        with pytest.raises(TypeError, match="has the labels"):
            writer.counter(REQUESTS, **labels)

    def test_a_label_that_is_no_text_is_refused(self, tmp_path: Path, writer: MetricsWriter) -> None:
        """Half a surrogate pair cannot be written as UTF-8, so in a file it would break every scrape to come."""
        with pytest.raises(UnicodeEncodeError):
            writer.counter(REQUESTS, model="\ud800")

        assert samples_in(tmp_path, REQUESTS) == {}

    def test_threads_that_bind_at_once_each_get_a_series_of_their_own(
        self, tmp_path: Path, writer: MetricsWriter
    ) -> None:
        """A model loaded in a background thread must not land on the values of another one."""
        with ThreadPoolExecutor(8) as threads:
            children = list(threads.map(lambda i: writer.counter(REQUESTS, model=str(i % 500)), range(2000)))

        for child in children:
            child.add()

        expected = {sample("requests_total", model=str(i)): 4.0 for i in range(500)}
        assert expected == samples_in(tmp_path, REQUESTS)

    def test_a_full_file_says_so_and_keeps_what_it_has(self, tmp_path: Path, writer: MetricsWriter) -> None:
        """A label that takes endless values must neither kill the process nor spoil the other metrics."""
        counter = writer.counter(REQUESTS, model="fraud")

        with pytest.raises(MetricsFullError, match="requests_total"):
            writer.counter(REQUESTS, model="x" * FILE_BYTES)
        counter.add()

        assert {sample("requests_total", model="fraud"): 1.0} == samples_in(tmp_path, REQUESTS)

    def test_too_many_values_fill_a_file_too(self, writer: MetricsWriter) -> None:
        """Values past the end of the file would be lost, so the series is refused."""
        fine = Histogram("fine", "Fine.", ("model",), buckets=tuple(float(bound) for bound in range(98)))
        for i in range(MAX_VALUES // 100):
            writer.histogram(fine, model=str(i))

        with pytest.raises(MetricsFullError, match="fine"):
            writer.histogram(fine, model="one more")

    def test_a_file_takes_only_the_space_it_uses(self, tmp_path: Path, writer: MetricsWriter) -> None:
        """The room kept for thousands of series costs a laptop no disk."""
        writer.counter(RESTARTS).add()

        used_bytes = (tmp_path / "api-0.mmap").stat().st_blocks * 512

        assert used_bytes < FILE_BYTES / 64


class TestProcesses:
    def test_two_processes_add_up_exactly(self, tmp_path: Path) -> None:
        """N API processes serve one platform, and its numbers are those of all of them."""
        script = """
with MetricsWriter(Path(sys.argv[1])) as writer:
    counter = writer.counter(Counter("requests_total", "", ("model",)), model="fraud")
    histogram = writer.histogram(Histogram("latency_seconds", "", ("model",), (0.25, 0.5, 2.0)), model="fraud")
    for i in range(20_000):
        counter.add()
        histogram.observe(i % 4)
"""
        processes = [start(script, tmp_path / f"api-{i}.mmap") for i in range(2)]
        codes = []
        for process in processes:
            process.communicate()
            codes.append(process.returncode)

        shown = samples_in(tmp_path, REQUESTS, LATENCY)

        assert codes == [0, 0]
        assert shown[sample("requests_total", model="fraud")] == 40_000.0
        assert shown[sample("latency_seconds_bucket", model="fraud", le="0.25")] == 10_000.0
        assert shown[sample("latency_seconds_bucket", model="fraud", le="2.0")] == 30_000.0
        assert shown[sample("latency_seconds_count", model="fraud")] == 40_000.0
        assert shown[sample("latency_seconds_sum", model="fraud")] == 60_000.0

    def test_a_killed_process_goes_on_from_its_counts_when_restarted(self, tmp_path: Path) -> None:
        """The supervisor restarts a crashed worker, and no counter may go backwards for it."""
        script = """
writer = MetricsWriter(Path(sys.argv[1]))
writer.gauge(Gauge("in_flight", "", ("model",)), model="fraud").set(9)
writer.counter(Counter("requests_total", "", ("model",)), model="other").add(3)
writer.counter(Counter("requests_total", "", ("model",)), model="fraud").add(5)
print("counted", flush=True)
sys.stdin.read()
"""
        with start(script, tmp_path / "api-0.mmap") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "counted\n"
            process.kill()

        with MetricsWriter(tmp_path / "api-0.mmap") as restarted:
            restarted.counter(REQUESTS, model="fraud").add(2)
            restarted.counter(REQUESTS, model="new").add(1)

        expected = {
            sample("requests_total", model="fraud"): 7.0,
            sample("requests_total", model="other"): 3.0,
            sample("requests_total", model="new"): 1.0,
            sample("in_flight", model="fraud"): 0.0,
        }
        assert expected == samples_in(tmp_path, REQUESTS, IN_FLIGHT)

    def test_a_reader_never_meets_half_a_series(self, tmp_path: Path) -> None:
        """A scrape may fall on any moment of processes that start, bind their metrics and are replaced."""
        script = """
for generation in range(400):
    clear(Path(sys.argv[1]))
    with MetricsWriter(Path(sys.argv[1]) / "api-0.mmap") as writer:
        for i in range(30):
            writer.counter(Counter("requests_total", "", ("model",)), model=f"model {i}").add()
"""
        whole = {sample("requests_total", model=f"model {i}"): 1.0 for i in range(30)}
        odd = []
        with start(script, tmp_path) as process:
            while process.poll() is None:
                shown = samples_in(tmp_path, REQUESTS)
                # The last series may be bound and not yet added to.
                odd += [key for key, value in shown.items() if key not in whole or value not in (0.0, 1.0)]

        assert process.returncode == 0
        assert odd == []
        assert whole == samples_in(tmp_path, REQUESTS)

    def test_a_slot_has_one_process_at_a_time(self, tmp_path: Path, writer: MetricsWriter) -> None:
        """Two processes in one file would overwrite each other's series."""
        with pytest.raises(BlockingIOError):
            MetricsWriter(tmp_path / "api-0.mmap")

    def test_gauges_of_processes_are_put_together_as_defined(self, tmp_path: Path) -> None:
        """Requests in flight add up, a lag is the worst one, and memory is looked at process by process."""
        with MetricsWriter(tmp_path / "api-0.mmap") as one, MetricsWriter(tmp_path / "api-1.mmap") as two:
            for process, value in ((one, -2.0), (two, -5.0)):
                process.gauge(IN_FLIGHT, model="fraud").set(value)
                process.gauge(LAG).set(value)
                process.gauge(RESIDENT).set(value)
            with MetricsWriter(tmp_path / "api-2.mmap") as idle:
                idle.gauge(LAG)

        expected = {
            sample("in_flight", model="fraud"): -7.0,
            sample("lag_seconds"): -2.0,
            sample("resident_bytes", process="api-0"): -2.0,
            sample("resident_bytes", process="api-1"): -5.0,
        }
        assert expected == samples_in(tmp_path, IN_FLIGHT, LAG, RESIDENT)

    def test_a_changed_definition_starts_afresh(self, tmp_path: Path) -> None:
        """Counts in the buckets of an older release mean something else in those of a newer one."""
        changed = Histogram("latency_seconds", "Latency.", ("model",), buckets=(0.25, 0.75, 2.0))
        with MetricsWriter(tmp_path / "api-0.mmap") as old:
            old.histogram(LATENCY, model="fraud").observe(0.5)
            old.counter(REQUESTS, model="fraud").add(4)

        with MetricsWriter(tmp_path / "api-0.mmap") as new:
            new.histogram(changed, model="fraud").observe(0.125)

        shown = samples_in(tmp_path, changed, REQUESTS)
        assert shown[sample("latency_seconds_count", model="fraud")] == 1.0
        assert shown[sample("requests_total", model="fraud")] == 4.0

    def test_clearing_forgets_processes_that_have_ended(self, tmp_path: Path) -> None:
        """A supervisor that starts with fewer processes must not show those of its last run."""
        with MetricsWriter(tmp_path / "api-7.mmap") as ended:
            ended.counter(REQUESTS, model="fraud").add()

        clear(tmp_path)

        assert samples_in(tmp_path, REQUESTS) == {}
        assert list(tmp_path.iterdir()) == []

    def test_clearing_leaves_the_values_of_a_process_that_runs(
        self, tmp_path: Path, writer: MetricsWriter
    ) -> None:
        """A log worker that somebody started by itself must not lose its metrics when a server starts."""
        writer.counter(REQUESTS, model="fraud").add()

        clear(tmp_path)

        assert samples_in(tmp_path, REQUESTS) == {sample("requests_total", model="fraud"): 1.0}


class TestExposition:
    def test_a_metric_without_a_series_is_there(self, tmp_path: Path) -> None:
        """A dashboard or an alert finds a metric before its first event."""
        definitions = (REQUESTS, RESTARTS, LATENCY, IN_FLIGHT, LAG, RESIDENT)

        families = families_in(render(tmp_path / "absent", definitions))

        expected: Families = {
            "requests": ("counter", REQUESTS.help, {}),
            "restarts": ("counter", "Restarts.", {sample("restarts_total"): 0.0}),
            "latency_seconds": ("histogram", "Latency.", {}),
            "in_flight": ("gauge", "Requests in flight.", {}),
            "lag_seconds": ("gauge", "The longest lag.", {sample("lag_seconds"): 0.0}),
            "resident_bytes": ("gauge", "Memory.", {}),
        }
        assert expected == families

    def test_a_file_that_is_just_being_created_is_left_out(
        self, tmp_path: Path, writer: MetricsWriter
    ) -> None:
        """A scrape while a worker starts shows the other workers."""
        writer.counter(RESTARTS).add()
        (tmp_path / "api-1.mmap").touch()

        assert {sample("restarts_total"): 1.0} == samples_in(tmp_path, RESTARTS)

    def test_two_metrics_of_one_name_are_refused(self, tmp_path: Path) -> None:
        """Prometheus drops a scrape that names a metric twice."""
        with pytest.raises(ValueError, match="share a name"):
            render(tmp_path, [LAG, Gauge("lag_seconds", "Another.")])

    @pytest.mark.parametrize(
        ("accept", "expected"),
        [
            ("", (False, "text/plain; version=0.0.4; charset=utf-8")),
            ("text/plain;version=0.0.4;q=0.3,*/*;q=0.2", (False, "text/plain; version=0.0.4; charset=utf-8")),
            (
                "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3",
                (True, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
            ),
        ],
    )
    def test_a_scraper_gets_the_format_it_asks_for(self, accept: str, expected: tuple[bool, str]) -> None:
        """Prometheus asks for OpenMetrics, curl for nothing."""
        assert expected == negotiate(accept)

    @pytest.mark.parametrize("openmetrics", [False, True])
    @settings(deadline=None, max_examples=60)
    @given(
        events=st.lists(
            st.tuples(
                st.sampled_from(["counter", "gauge", "histogram"]),
                st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
                st.integers(0, 4096).map(lambda n: n / 1024),
                st.integers(0, 2),
            ),
            max_size=30,
        ),
        buckets=st.lists(st.integers(0, 40_000_000), min_size=1, max_size=5, unique=True).map(sorted),
        help_text=st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    )
    def test_three_processes_show_what_one_prometheus_client_shows(
        self,
        events: list[tuple[str, str, float, int]],
        buckets: Sequence[int],
        help_text: str,
        openmetrics: bool,
    ) -> None:
        """Whoever knows prometheus_client meets the same families and samples here, in both formats."""
        bounds = tuple(bucket / 10_000 for bucket in buckets)
        counter = Counter("requests_total", help_text, ("model",))
        gauge = Gauge("in_flight", help_text, ("model",))
        histogram = Histogram("latency_seconds", help_text, ("model",), bounds)
        registry = prometheus_client.CollectorRegistry()
        reference_counter = prometheus_client.Counter(
            "requests_total", help_text, ["model"], registry=registry
        )
        reference_gauge = prometheus_client.Gauge("in_flight", help_text, ["model"], registry=registry)
        reference_histogram = prometheus_client.Histogram(
            "latency_seconds", help_text, ["model"], registry=registry, buckets=bounds
        )

        with TemporaryDirectory() as name:
            folder = Path(name)
            writers = [MetricsWriter(folder / f"api-{i}.mmap") for i in range(3)]
            for kind, model, value, process in events:
                match kind:
                    case "counter":
                        writers[process].counter(counter, model=model).add(value)
                        reference_counter.labels(model=model).inc(value)
                    case "gauge":
                        writers[0].gauge(gauge, model=model).set(value)
                        reference_gauge.labels(model=model).set(value)
                    case _:
                        writers[process].histogram(histogram, model=model).observe(value)
                        reference_histogram.labels(model=model).observe(value)
            actual = render(folder, [counter, gauge, histogram], openmetrics=openmetrics)
            for writer in writers:
                writer.close()

        generate = generate_openmetrics if openmetrics else prometheus_client.generate_latest
        expected = families_in(generate(registry), openmetrics=openmetrics)
        assert expected == families_in(actual, openmetrics=openmetrics)


class TestDefinitions:
    @pytest.mark.parametrize("name", ["", "1st_total", "a-b_total", "a b_total", "a_total\n", "requests"])
    def test_a_name_that_prometheus_refuses_is_refused(self, name: str) -> None:
        """One bad name would make Prometheus drop the whole scrape."""
        with pytest.raises(ValueError, match="name"):
            Counter(name, "")

    @pytest.mark.parametrize("labelnames", [("",), ("a-b",), ("__a",), ("le",), ("process",), ("a", "a")])
    def test_a_bad_label_name_is_refused(self, labelnames: tuple[str, ...]) -> None:
        """Labels that clash with those that rendering adds would make two series of one name."""
        with pytest.raises(ValueError, match="label"):
            Gauge("g", "", labelnames)

    @pytest.mark.parametrize("buckets", [(), (1.0, 1.0), (2.0, 1.0), (1.0, inf), (nan,), (-1.0, 1.0)])
    def test_buckets_that_do_not_ascend_are_refused(self, buckets: tuple[float, ...]) -> None:
        """A value is put in its bucket by bisection, which needs them in order."""
        with pytest.raises(ValueError, match="buckets ascend"):
            Histogram("h", "", (), buckets)
