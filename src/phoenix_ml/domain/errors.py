"""Everything that can go wrong, on one screen.

Each error has a stable ``code`` that clients may match on; HTTP and gRPC own one table each from
class to status. ``docs/reference/errors.md`` lists the codes, and a test compares the two.

PhoenixError
├── InvalidRequest                what was sent cannot be answered
│   ├── MalformedBody             malformed_body           not JSON, or text no database can hold
│   ├── InvalidField              invalid_field            JSON of another shape than documented
│   ├── FeatureMissing            feature_missing          required, and neither stored nor sent
│   ├── FeatureUnknown            feature_unknown          the model has no such feature
│   ├── FeatureInvalid            feature_invalid          a value of the wrong type or range
│   ├── FeatureCountWrong         feature_count_wrong      a list of another length than the signature
│   ├── TensorInvalid             tensor_invalid           a tensor of the wrong name, type, shape or length
│   ├── TakesTensors              takes_tensors            the version's rows are no features: ask /v2
│   ├── ModelRefused              model_refused            an artifact that does not load, or is unsafe
│   ├── EngineUnavailable         engine_unavailable       an artifact for an engine that is not installed
│   ├── RoutingInvalid            routing_invalid          arms that no strategy can follow
│   └── InferenceFailed           inference_failed         the runtime refused these values
├── NotFound
│   ├── ModelUnknown              model_unknown
│   ├── VersionUnknown            version_unknown
│   ├── EntityUnknown             entity_unknown           no features are stored for the entity
│   ├── PredictionUnknown         prediction_unknown
│   ├── IncidentUnknown           incident_unknown
│   ├── JobUnknown                job_unknown
│   └── PathUnknown               path_unknown
├── Conflict
│   ├── VersionConflict           version_conflict         the version exists with other bytes
│   ├── VersionInactive           version_inactive         registered, but not serving
│   ├── StageConflict             stage_conflict           not a legal promotion
│   ├── JobConflict               job_conflict             the retrain job cannot take this step
│   ├── NoBaseline                no_baseline              nothing to compare with
│   ├── IncidentResolved          incident_resolved        it has ended already
│   └── RoutingConflict           routing_conflict         a version that the routing still names
├── TooLarge
│   ├── BodyTooLarge              body_too_large
│   ├── BatchTooLarge             batch_too_large
│   └── HeadersTooLarge           headers_too_large
├── Forbidden                     what a web page of another site may not do
│   ├── CrossSiteRequest          cross_site_request
│   └── HostNotAllowed            host_not_allowed         a name that is not this server's
├── MethodNotAllowed              method_not_allowed
├── Unsupported                   unsupported              a part of a protocol that is not for this server
├── Unavailable                   try again later; Retry-After says when
│   ├── FeatureStoreUnavailable   feature_store_unavailable
│   ├── DatabaseUnavailable       database_unavailable
│   ├── EventsUnavailable         events_unavailable       Kafka does not answer
│   ├── ArtifactStoreUnavailable  artifact_store_unavailable  no space, or no permission
│   ├── ServerUnreachable         server_unreachable       said by the command line
│   └── Overloaded                overloaded
│       └── JournalFull           journal_full             the answer could not be put on record
├── Misconfigured                 misconfigured            settings that cannot work together
├── ModelLoadFailed               model_load_failed        a stored artifact that no longer loads
└── InternalError                 internal_error           a defect of ours
"""

from typing import Any, ClassVar

_MESSAGE_CHARACTERS = 8000
_DETAIL_CHARACTERS = 2000


class PhoenixError(Exception):
    """An error with a stable code, a message that says what to do, and details for machines.

    What somebody sent may be of any length, so of long texts the middle is left out.
    """

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, **details: Any) -> None:
        self.message = _cut(message, _MESSAGE_CHARACTERS)
        super().__init__(self.message)
        self.details = {
            name: _cut(value, _DETAIL_CHARACTERS) if isinstance(value, str) else value
            for name, value in details.items()
        }


def _cut(text: str, characters: int) -> str:
    half = characters // 2
    return text if len(text) <= characters else f"{text[:half]}…{text[-half:]}"


class InvalidRequest(PhoenixError):
    pass


class MalformedBody(InvalidRequest):
    code = "malformed_body"


class InvalidField(InvalidRequest):
    code = "invalid_field"


class FeatureMissing(InvalidRequest):
    code = "feature_missing"


class FeatureUnknown(InvalidRequest):
    code = "feature_unknown"


class FeatureInvalid(InvalidRequest):
    code = "feature_invalid"


class FeatureCountWrong(InvalidRequest):
    code = "feature_count_wrong"


class TensorInvalid(InvalidRequest):
    code = "tensor_invalid"


class TakesTensors(InvalidRequest):
    code = "takes_tensors"


class ModelRefused(InvalidRequest):
    code = "model_refused"


class EngineUnavailable(InvalidRequest):
    code = "engine_unavailable"


class RoutingInvalid(InvalidRequest):
    code = "routing_invalid"


class InferenceFailed(InvalidRequest):
    code = "inference_failed"


class RowCountWrong(InferenceFailed):
    """The model answered with more or fewer rows than it was given."""


class NotFound(PhoenixError):
    pass


class ModelUnknown(NotFound):
    code = "model_unknown"


class VersionUnknown(NotFound):
    code = "version_unknown"


class EntityUnknown(NotFound):
    code = "entity_unknown"


class PredictionUnknown(NotFound):
    code = "prediction_unknown"


class IncidentUnknown(NotFound):
    code = "incident_unknown"


class JobUnknown(NotFound):
    code = "job_unknown"


class PathUnknown(NotFound):
    code = "path_unknown"


class Conflict(PhoenixError):
    pass


class VersionConflict(Conflict):
    code = "version_conflict"


class VersionInactive(Conflict):
    code = "version_inactive"


class StageConflict(Conflict):
    code = "stage_conflict"


class JobConflict(Conflict):
    code = "job_conflict"


class RoutingConflict(Conflict):
    code = "routing_conflict"


class NoBaseline(Conflict):
    code = "no_baseline"


class IncidentResolved(Conflict):
    code = "incident_resolved"


class TooLarge(PhoenixError):
    pass


class BodyTooLarge(TooLarge):
    code = "body_too_large"


class BatchTooLarge(TooLarge):
    code = "batch_too_large"


class HeadersTooLarge(TooLarge):
    code = "headers_too_large"


class Forbidden(PhoenixError):
    pass


class CrossSiteRequest(Forbidden):
    code = "cross_site_request"


class HostNotAllowed(Forbidden):
    code = "host_not_allowed"


class MethodNotAllowed(PhoenixError):
    code = "method_not_allowed"


class Unsupported(PhoenixError):
    code = "unsupported"


class Unavailable(PhoenixError):
    pass


class FeatureStoreUnavailable(Unavailable):
    code = "feature_store_unavailable"


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"


class EventsUnavailable(Unavailable):
    code = "events_unavailable"


class ArtifactStoreUnavailable(Unavailable):
    code = "artifact_store_unavailable"


class ServerUnreachable(Unavailable):
    code = "server_unreachable"


class Overloaded(Unavailable):
    code = "overloaded"


class JournalFull(Overloaded):
    code = "journal_full"


class Misconfigured(PhoenixError):
    code = "misconfigured"


class ModelLoadFailed(PhoenixError):
    code = "model_load_failed"


class InternalError(PhoenixError):
    code = "internal_error"
