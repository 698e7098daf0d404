"""Every metric of the platform; ``docs/reference/metrics.md`` is checked against this list."""

from typing import Final

from phoenix_ml.infrastructure.telemetry.metrics import Counter, Definition, Gauge, Histogram

REQUESTS = Counter(
    "phoenix_requests_total",
    "Requests for predictions, and to /feedback, by HTTP status; unregistered models are 'other', and version and role are empty where none was chosen.",
    ("model", "version", "role", "code"),
)
REQUEST_SECONDS = Histogram(
    "phoenix_request_seconds",
    "Time from the end of the request's headers to the finished answer, the reading of the body included.",
    ("model", "version"),
)
PREDICTIONS = Counter(
    "phoenix_predictions_total",
    "Predictions put on record: each row of a batch and each shadow counts.",
    ("model", "version", "strategy", "role"),
)
FEATURE_READ_SECONDS = Histogram(
    "phoenix_feature_read_seconds", "Time to read one entity's features from the store.", ("model",)
)
FEATURE_CACHE_READS = Counter(
    "phoenix_feature_cache_reads_total",
    "Reads of one entity's features by whether the cache had them: hit or miss; none without the cache.",
    ("outcome",),
)
INFERENCE_SECONDS = Histogram(
    "phoenix_inference_seconds",
    "Time of one engine run, of one row or of many, by the device that answered.",
    ("model", "version", "device"),
)
OUT_OF_MEMORY = Counter(
    "phoenix_device_out_of_memory_total",
    "How often a GPU's memory was too small for a version, by phase: load or run.",
    ("model", "version", "phase"),
)
FEATURE_VALUES = Counter(
    "phoenix_feature_values_total",
    "Feature values by where they came from: store, request, default, stale or missing.",
    ("model", "source"),
)
SHADOW_FAILURES = Counter(
    "phoenix_shadow_failures_total",
    "Shadow answers that failed, by error code.",
    ("model", "version", "code"),
)
MODEL_LOADS = Counter(
    "phoenix_model_loads_total", "Attempts to load a version, by outcome.", ("model", "version", "outcome")
)
MODEL_LOAD_SECONDS = Histogram(
    "phoenix_model_load_seconds",
    "Time to load and warm up a version.",
    ("model", "version"),
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
JOURNAL_BYTES = Gauge("phoenix_journal_bytes", "Bytes that the journals hold on disk.")
JOURNAL_DROPPED = Counter(
    "phoenix_journal_dropped_total", "Events not put on record because the journal was full and set to drop."
)
JOURNAL_PENDING_BYTES = Gauge("phoenix_journal_pending_bytes", "Journal bytes that are not in the log yet.")
JOURNAL_LAG_SECONDS = Gauge(
    "phoenix_journal_lag_seconds",
    "How old the oldest prediction was when it was logged last; while the database is down, the age of the oldest journal segment.",
    (),
    "max",
)
JOURNAL_DAMAGE = Counter("phoenix_journal_damage_total", "Damaged regions found in journals.")
JOURNAL_REFUSED = Counter(
    "phoenix_journal_refused_total", "Requests refused because the journal was full or the disk took no more."
)
SHIP_EVENTS = Counter(
    "phoenix_ship_events_total", "Events handed to Kafka; one that is sent again counts again."
)
SHIP_ACKNOWLEDGED = Counter("phoenix_ship_acknowledged_total", "Events that Kafka has acknowledged.")
SHIP_RETRIES = Counter("phoenix_ship_retries_total", "Messages that were sent to Kafka again.")
SHIP_FAILURES = Counter("phoenix_ship_failures_total", "Batches that Kafka did not take.")
SHIP_DEAD = Counter(
    "phoenix_ship_dead_total", "Events that went to the dead letters because they cannot be shipped."
)
SHIP_HEARTBEAT = Gauge(
    "phoenix_ship_heartbeat_timestamp_seconds",
    "When the ship role last got on: events were acknowledged, or there were none and Kafka answers.",
    (),
    "max",
)
LOG_LAG_EVENTS = Gauge(
    "phoenix_log_lag_events",
    "Events in Kafka that this log worker's partitions hold and the log does not yet.",
)
JOURNAL_UNREADABLE = Gauge(
    "phoenix_journal_unreadable_segments",
    "Journal segments that the disk refuses at present; they are tried again.",
)
LOG_ROWS = Counter("phoenix_log_rows_total", "Rows newly written to the prediction log and its outcomes.")
LOG_DEAD = Counter("phoenix_log_dead_total", "Events that went to the dead letters.")
LOG_FAILURES = Counter("phoenix_log_failures_total", "Batches put off because the database did not answer.")
LOG_HEARTBEAT = Gauge(
    "phoenix_log_heartbeat_timestamp_seconds", "When the log role last completed a step.", (), "max"
)
OUTCOMES_UNMATCHED = Gauge(
    "phoenix_outcomes_unmatched", "Outcomes whose prediction is not in the log.", (), "max"
)
MONITOR_ROWS = Counter("phoenix_monitor_rows_total", "Predictions that this monitor has counted.")
MONITOR_OUTCOMES = Counter("phoenix_monitor_outcomes_total", "Outcomes that this monitor has judged.")
MONITOR_LAG_ROWS = Gauge(
    "phoenix_monitor_lag_rows",
    "Rows of the prediction log that come after the last one that every model's monitor has seen.",
    (),
    "max",
)
MONITOR_FAILURES = Counter(
    "phoenix_monitor_failures_total", "Steps of the monitor put off because the database did not answer."
)
MONITOR_FAILED_MODELS = Gauge(
    "phoenix_monitor_failed_models",
    "Models that cannot be watched because of a defect; the log has its traceback.",
    (),
    "max",
)
MONITOR_HEARTBEAT = Gauge(
    "phoenix_monitor_heartbeat_timestamp_seconds", "When the monitor last completed a step.", (), "max"
)
INCIDENTS_OPEN = Gauge(
    "phoenix_incidents_open", "Incidents that are not resolved, by kind.", ("model", "kind"), "max"
)
DRIFT_DISTANCE = Gauge(
    "phoenix_drift_d",
    "Distance of a feature's recent values from the reference, as Kolmogorov-Smirnov's D; `_score` and `_result` are the model's own.",
    ("model", "version", "feature"),
    "max",
)
MODEL_ACCURACY = Gauge(
    "phoenix_model_accuracy", "Accuracy by the last window of outcomes.", ("model", "version"), "max"
)
MODEL_ESTIMATED_ACCURACY = Gauge(
    "phoenix_model_estimated_accuracy",
    "Accuracy as estimated for the last batch, without outcomes.",
    ("model", "version"),
    "max",
)
MODEL_MAE = Gauge(
    "phoenix_model_mae",
    "Mean absolute error by the last window of outcomes.",
    ("model", "version"),
    "max",
)
MODEL_ESTIMATED_MAE = Gauge(
    "phoenix_model_estimated_mae",
    "Mean absolute error as estimated for the last batch, without outcomes.",
    ("model", "version"),
    "max",
)
ALERT_DELIVERIES = Counter(
    "phoenix_alert_deliveries_total",
    "Attempts to tell a channel of an alert, by result: told, failed (tried again) or given_up.",
    ("channel", "result"),
)
ALERTS_WAITING = Gauge(
    "phoenix_alerts_waiting", "Alerts that a channel has not been told of yet.", ("channel",), "max"
)
ALERT_HEARTBEAT = Gauge(
    "phoenix_alert_heartbeat_timestamp_seconds", "When the alert role last completed a step.", (), "max"
)
RETRAIN_JOBS = Gauge("phoenix_retrain_jobs", "Retrain jobs by where they are.", ("status",), "max")
HEAL_HEARTBEAT = Gauge(
    "phoenix_heal_heartbeat_timestamp_seconds",
    "When the heal role last completed a step or looked after a training.",
    (),
    "max",
)
PROCESS_RESTARTS = Counter(
    "phoenix_process_restarts_total", "Processes that the supervisor had to start again.", ("slot",)
)

CATALOGUE: Final[tuple[Definition, ...]] = tuple(
    value for value in list(globals().values()) if isinstance(value, (Counter, Gauge, Histogram))
)
