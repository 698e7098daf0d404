"""The one table from error to HTTP status."""

from typing import Final

from phoenix_ml.domain import errors

STATUS_OF: Final[dict[type[errors.PhoenixError], int]] = {
    errors.MalformedBody: 400,
    errors.InvalidRequest: 422,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.HeadersTooLarge: 431,
    errors.Unsupported: 501,
    errors.Unavailable: 503,
    errors.PhoenixError: 500,
}


def status_of(error: errors.PhoenixError) -> int:
    """The status of the error's nearest class in the table."""
    return next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)


def inference_status_of(error: errors.PhoenixError) -> int:
    """The status in the Open Inference Protocol: 400 for whatever is wrong with a request, 503 for what is not ready."""
    if isinstance(error, errors.InvalidRequest):
        return 400
    if isinstance(error, errors.VersionInactive | errors.ModelLoadFailed):
        return 503
    return status_of(error)


def retry_after_s(error: errors.PhoenixError) -> int | None:
    """Seconds for the Retry-After header; None where asking again is no use."""
    return int(error.details.get("retry_after_s", 1)) if isinstance(error, errors.Unavailable) else None
