"""Views for dashboards: what they may see, in the form in which they show it.

A migration that changes a table below them drops the views first and makes them anew.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# The first outcome counts, as for the monitor. Callers know the id of the answer that they got, so a shadow's
# outcome is that of the prediction it shadowed. MATERIALIZED: a version's metadata holds its baseline, and
# PostgreSQL would unpack all of it again for each prediction.
_PREDICTION_OUTCOMES = """
CREATE VIEW v_prediction_outcomes AS
WITH tasks AS MATERIALIZED (
  SELECT id, version, {task} AS task FROM models
)
SELECT
  p.id AS prediction_id, p.model_id, p.model_version, {role} AS role, {shadow_of} AS shadow_of,
  p.entity_id, p.created_at, p.latency_ms, p.confidence, p.result, o.outcome, o.observed_at,
  CASE WHEN t.task = 'classification' THEN {equal} END AS is_correct,
  CASE WHEN t.task = 'regression' AND {are_numbers} THEN {absolute_error} END AS absolute_error
FROM prediction_logs p
JOIN tasks t ON t.id = p.model_id AND t.version = p.model_version
LEFT JOIN outcomes o
  ON o.prediction_id = COALESCE({shadow_of}, p.id)
  AND NOT EXISTS (
    SELECT 1 FROM outcomes earlier
    WHERE earlier.prediction_id = o.prediction_id
    AND (COALESCE(earlier.seq, 0), earlier.id) < (COALESCE(o.seq, 0), o.id)
  )
"""
# A label as text, as the monitor compares them: true, 1, 1.0 and "1" are the same, whoever wrote them.
_LABEL_POSTGRESQL = """
CASE jsonb_typeof({0})
  WHEN 'string' THEN {0} #>> '{{}}'
  WHEN 'number' THEN CAST(trim_scale(CAST({0} AS numeric)) AS text)
  WHEN 'boolean' THEN CAST(CAST(CAST({0} AS boolean) AS integer) AS text)
END"""
_LABEL_SQLITE = """
CASE json_type({0})
  WHEN 'text' THEN json_extract({0}, '$')
  WHEN 'integer' THEN CAST(json_extract({0}, '$') AS text)
  WHEN 'real' THEN CASE
    WHEN json_extract({0}, '$') = CAST(json_extract({0}, '$') AS integer)
    THEN CAST(CAST(json_extract({0}, '$') AS integer) AS text)
    ELSE CAST(json_extract({0}, '$') AS text)
  END
  WHEN 'true' THEN '1'
  WHEN 'false' THEN '0'
END"""
# The fields of ``FeatureDrift`` that fit into a row of a table.
_DRIFT_FIELDS = {
    "feature": "text",
    "kind": "text",
    "verdict": "text",
    "rows": "bigint",
    "missing": "double precision",
    "reference_missing": "double precision",
    "distance": "double precision",
    "p": "double precision",
    "p_adjusted": "double precision",
    "psi": "double precision",
    "jensen_shannon": "double precision",
    "wasserstein": "double precision",
}
_POSTGRESQL = {
    "task": "metadata ->> 'task'",
    "role": "p.route ->> 'role'",
    "shadow_of": "CAST(p.route ->> 'shadow_of' AS uuid)",
    "equal": f"{_LABEL_POSTGRESQL.format('p.result')} = {_LABEL_POSTGRESQL.format('o.outcome')}",
    "correct": "CAST(CAST(is_correct AS integer) AS double precision)",
    "are_numbers": "jsonb_typeof(p.result) = 'number' AND jsonb_typeof(o.outcome) = 'number'",
    "absolute_error": "abs(CAST(p.result AS double precision) - CAST(o.outcome AS double precision))",
    "drift_columns": ", ".join(f"found.{name}" for name in _DRIFT_FIELDS),
    "drift_features": (
        "LATERAL jsonb_to_recordset(newest.report -> 'features') AS found "
        f"({', '.join(f'{name} {kind}' for name, kind in _DRIFT_FIELDS.items())})"
    ),
}
_SQLITE = {
    "task": "json_extract(metadata, '$.task')",
    "role": "json_extract(p.route, '$.role')",
    "shadow_of": "replace(json_extract(p.route, '$.shadow_of'), '-', '')",
    "equal": f"{_LABEL_SQLITE.format('p.result')} = {_LABEL_SQLITE.format('o.outcome')}",
    "correct": "is_correct",
    "are_numbers": (
        "json_type(p.result) IN ('integer', 'real') AND json_type(o.outcome) IN ('integer', 'real')"
    ),
    "absolute_error": "abs(json_extract(p.result, '$') - json_extract(o.outcome, '$'))",
    "drift_columns": ", ".join(f"json_extract(found.value, '$.{name}') AS {name}" for name in _DRIFT_FIELDS),
    "drift_features": "json_each(newest.report, '$.features') found",
}

_PERFORMANCE = """
  count(*) AS predictions, count(DISTINCT entity_id) AS entities, count(outcome) AS with_outcome,
  avg({correct}) AS accuracy, avg(absolute_error) AS mae, avg(confidence) AS mean_confidence
"""
# Hour by hour, so that a question for some hours reads no more than these, by an index: a day of a month with
# 1,000,000 predictions takes 0.2 s, and 4.3 s where the hours are joined and grouped as a whole.
_VARIANT_PERFORMANCE_POSTGRESQL = """
CREATE VIEW v_variant_performance AS
SELECT
  variants.model_id, variants.model_version, variants.role, hours.hour, variants.predictions,
  variants.entities, variants.with_outcome, variants.accuracy, variants.mae, variants.mean_confidence,
  variants.p50_latency_ms, variants.p99_latency_ms
FROM (SELECT min(created_at) AS first, max(created_at) AS last FROM prediction_logs) logged
CROSS JOIN LATERAL generate_series(
  date_trunc('hour', logged.first, 'UTC'), logged.last, interval '1 hour'
) AS hours (hour)
CROSS JOIN LATERAL (
  SELECT
    model_id, model_version, role,
    {performance},
    percentile_cont(0.5) WITHIN GROUP (ORDER BY latency_ms) AS p50_latency_ms,
    percentile_cont(0.99) WITHIN GROUP (ORDER BY latency_ms) AS p99_latency_ms
  FROM v_prediction_outcomes
  WHERE created_at >= hours.hour AND created_at < hours.hour + interval '1 hour'
  GROUP BY model_id, model_version, role
) variants
"""
_VARIANT_PERFORMANCE_SQLITE = """
CREATE VIEW v_variant_performance AS
SELECT
  model_id, model_version, role, created_at - created_at % 3600000 AS hour,
  {performance}
FROM v_prediction_outcomes
GROUP BY 1, 2, 3, 4
"""

_DRIFT_LATEST = """
CREATE VIEW v_drift_latest AS
SELECT
  newest.model_id, newest.model_version, newest.created_at, {drift_columns}
FROM drift_reports newest
CROSS JOIN {drift_features}
WHERE newest.kind = 'drift' AND NOT EXISTS (
  SELECT 1 FROM drift_reports later
  WHERE later.model_id = newest.model_id AND later.model_version = newest.model_version
  AND later.kind = newest.kind AND (later.created_at, later.id) > (newest.created_at, newest.id)
)
"""
_INCIDENTS = """
CREATE VIEW v_incidents AS
SELECT
  id, model_id, model_version, kind, cause, severity, summary, status, opened_at, acknowledged_at,
  acknowledged_by, resolved_at, resolution
FROM incidents
"""
_RETRAIN_JOBS = """
CREATE VIEW v_retrain_jobs AS
SELECT
  id, model_id, model_version, reason, status, requested_at, updated_at, attempts, new_version, error
FROM retrain_jobs
"""
# What happened when, to be read from top to bottom or drawn into a graph.
_INCIDENT_TIMELINE = """
CREATE VIEW v_incident_timeline AS
SELECT opened_at AS at, model_id, model_version, 'incident opened' AS event, cause, summary AS text
FROM v_incidents
UNION ALL
SELECT acknowledged_at, model_id, model_version, 'incident acknowledged', cause, acknowledged_by
FROM v_incidents WHERE acknowledged_at IS NOT NULL
UNION ALL
SELECT resolved_at, model_id, model_version, 'incident resolved', cause, resolution
FROM v_incidents WHERE resolved_at IS NOT NULL
UNION ALL
SELECT requested_at, model_id, model_version, 'retraining requested', 'retraining', reason
FROM v_retrain_jobs
UNION ALL
SELECT
  updated_at, model_id, model_version, 'retraining ' || status, 'retraining', COALESCE(error, new_version)
FROM v_retrain_jobs WHERE status IN ('registered', 'rejected', 'failed')
"""
_NAMES = (
    "v_prediction_outcomes",
    "v_variant_performance",
    "v_drift_latest",
    "v_incidents",
    "v_retrain_jobs",
    "v_incident_timeline",
)


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        words, variant_performance = _POSTGRESQL, _VARIANT_PERFORMANCE_POSTGRESQL
    else:
        words, variant_performance = _SQLITE, _VARIANT_PERFORMANCE_SQLITE
    op.execute(_PREDICTION_OUTCOMES.format(**words))
    op.execute(variant_performance.format(performance=_PERFORMANCE.format(**words)))
    op.execute(_DRIFT_LATEST.format(**words))
    for view in (_INCIDENTS, _RETRAIN_JOBS, _INCIDENT_TIMELINE):
        op.execute(view)


def downgrade() -> None:
    for name in reversed(_NAMES):
        op.execute(f"DROP VIEW {name}")
