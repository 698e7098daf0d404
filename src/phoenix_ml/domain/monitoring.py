"""What a person may set of how a model is watched and healed."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from phoenix_ml.domain.errors import InvalidField

# The settings of every model that has none of its own for a key.
ALL_MODELS = "*"
Share = Annotated[float, Meta(gt=0, lt=1)]
_CHALLENGER = r"^(shadow|none|ab:(0?\.[0-9]*[1-9][0-9]*))$"


class DriftPolicy(StrEnum):
    """``designed`` has a stated error budget; ``classic`` calls any p < 0.05 drift, of Kolmogorov-Smirnov or,
    for categories, of chi-square.
    """

    DESIGNED = "designed"
    CLASSIC = "classic"


class MonitorSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How one model is watched, and what may be done when it suffers.

    ``batch_rows`` predictions of a version make a batch, after which drift is looked for; ``arl`` is how many such
    checks go by between two false alarms, on average at least. ``effect`` is the least change of a distribution
    that matters, as a Kolmogorov-Smirnov distance, ``effects`` the same by feature, ``left_out`` features that
    nobody looks at. ``error_rate`` is an objective; without it the reference's own error is what a model is held to. A
    regression's answer is an error where it is off by more than ``tolerance``; without it, by more than nine in ten of the
    reference's are.
    A retraining needs ``min_outcomes`` fresh outcomes; there are at most ``budget`` in 30 days, ``cooldown_s``
    apart. ``policy`` None is that of PHOENIX_DRIFT_POLICY. ``challenger_policy``: ``shadow``, ``ab:0.1`` or ``none``.
    """

    batch_rows: Annotated[int, Meta(ge=200, le=1_000_000)] = 1000
    arl: Annotated[float, Meta(ge=10, le=1e9)] = 10_000.0
    effect: Share = 0.02
    effects: dict[str, Share] = {}
    left_out: tuple[str, ...] = ()
    error_rate: Share | None = None
    tolerance: Annotated[float, Meta(gt=0)] | None = None
    policy: DriftPolicy | None = None
    challenger_policy: Annotated[str, Meta(pattern=_CHALLENGER)] = "shadow"
    cooldown_s: Annotated[int, Meta(ge=0)] = 24 * 3600
    budget: Annotated[int, Meta(ge=0)] = 3
    min_outcomes: Annotated[int, Meta(ge=0)] = 200
    healing_paused: bool = False


def read_settings(document: Mapping[str, Any]) -> MonitorSettings:
    """The settings that the document holds, defaults for what it leaves out. Raises InvalidField.

    >>> read_settings({"batch_rows": 500}).batch_rows
    500
    """
    try:
        return msgspec.convert(dict(document), MonitorSettings)
    except msgspec.ValidationError as exc:
        message, _, path = str(exc).partition(" - at `$.")
        field = path.rstrip("`") or "settings"
        if "matching regex" in message:
            message = "write shadow, none, or ab:SHARE with a share between 0 and 1, such as ab:0.1"
        raise InvalidField(
            f"{field}: {message}; known settings are {', '.join(MonitorSettings.__struct_fields__)}",
            field=field,
        ) from exc


def parse_setting(text: str) -> tuple[str, Any]:
    """A setting as it is typed, ``key=value``; without a value it is None, which takes the default back.

    Raises InvalidField.

    >>> parse_setting("effects=income:0.05,age:0.1"), parse_setting("left_out=age"), parse_setting("budget=")
    (('effects', {'income': 0.05, 'age': 0.1}), ('left_out', ['age']), ('budget', None))
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise InvalidField(f"{text!r}: write key=value, such as batch_rows=500", field="set")
    if not value:
        return key, None
    parts = [part.strip() for part in value.split(",") if part.strip()]
    try:
        if key == "effects":
            pairs = [part.rpartition(":") for part in parts]
            return key, {name: float(number) for name, _, number in pairs}
        if key == "left_out":
            return key, parts
        if key in ("policy", "challenger_policy"):
            return key, value
        return key, msgspec.json.decode(value)
    except (ValueError, msgspec.DecodeError) as exc:
        advice = "FEATURE:NUMBER, such as income:0.05" if key == "effects" else "a number, true or false"
        raise InvalidField(f"{key}: {value!r} is no value for it: write {advice}", field=key) from exc
