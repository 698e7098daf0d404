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
    errors.Unavailable: 503,
    errors.PhoenixError: 500,
}


def status_of(error: errors.PhoenixError) -> int:
    """The status of the error's nearest class in the table."""
    return next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)


def retry_after_s(error: errors.PhoenixError) -> int | None:
    """Seconds for the Retry-After header; None where asking again is no use."""
    return int(error.details.get("retry_after_s", 1)) if isinstance(error, errors.Unavailable) else None
