"""What both stores agree on: the values they take, and how a value reads as another type."""

from collections.abc import Mapping
from math import isfinite, isnan
from typing import Final

from phoenix_ml.domain.errors import FeatureInvalid, InvalidField
from phoenix_ml.domain.features import FeatureType, check_feature_name
from phoenix_ml.domain.rows import Scalar

Given = Mapping[str, Scalar | None]

NATIVE: Final[dict[FeatureType, type]] = {
    FeatureType.FLOAT: float,
    FeatureType.INTEGER: int,
    FeatureType.BOOLEAN: bool,
    FeatureType.STRING: str,
}

# After so many reads in a row that found no packed row, only each 64th looks for one: where others write the
# features, or wrote them before the model was registered, each would look in vain.
_MISSES: Final = 16
_RETRY: Final = 64


class PackedReads:
    """How many reads of one signature's packed rows in a row found none."""

    __slots__ = ("misses",)

    def __init__(self) -> None:
        self.misses = 0

    def are_hopeless(self) -> bool:
        """Whether a read had better not look for a packed row. It counts: of many at once, one looks."""
        self.misses += 1
        return self.misses > _MISSES and self.misses % _RETRY != 0


def checked(entities: Mapping[str, Given]) -> dict[str, dict[str, Scalar | None]]:
    """The entities as a store takes them; NaN, which is no value, has become None.

    Raises InvalidField for an entity id or a feature name that cannot be stored and FeatureInvalid,
    naming the feature, for a value that could not be read back equal.
    """
    return {
        _checked_entity(entity_id): {name: _checked_value(name, value) for name, value in features.items()}
        for entity_id, features in entities.items()
    }


def as_type(value: Scalar, native: type) -> Scalar:
    """The value in the wanted type, one of NATIVE, or as text where it is not of that type."""
    if type(value) is native:
        return value
    if native is float and type(value) is int:
        return float(value)
    return as_text(value)


def as_text(value: Scalar) -> str:
    """The value as JSON would write it, strings without quotes."""
    if type(value) is bool:
        return "true" if value else "false"
    return value if type(value) is str else repr(value)


def _checked_entity(entity_id: str) -> str:
    if not entity_id or not _is_unicode(entity_id) or "\0" in entity_id:
        raise InvalidField(
            f"entity id {entity_id!r} is not usable: it must be Unicode text, without U+0000",
            field="entity_id",
        )
    return entity_id


def _checked_value(name: str, value: Scalar | None) -> Scalar | None:
    check_feature_name(name)
    kind = type(value)
    if kind is float:
        # mypy does not narrow by type(); subclasses such as numpy's are refused on purpose.
        number = float(value)  # type: ignore[arg-type]
        if isfinite(number):
            problem = None
        elif isnan(number):
            return None
        else:
            problem = "is not finite"
    elif kind is int:
        problem = None if -(2**63) <= value < 2**63 else "does not fit 64 bits"  # type: ignore[operator]
    elif kind is str:
        problem = None if _is_unicode(value) else "is not Unicode text"  # type: ignore[arg-type]
        if "\0" in value:  # type: ignore[operator]
            problem = "contains U+0000, which no database can store in a text"
    elif kind is bool or value is None:
        problem = None
    else:
        problem = f"is a {kind.__module__}.{kind.__qualname__}, not a number, boolean or string"
    if problem is None and not name.isascii() and not _is_unicode(name):
        problem = "has a name that is not Unicode text"
    if problem is not None:
        raise FeatureInvalid(f"feature {name!r}: {str(value)[:80]!r} {problem}", feature=name)
    return value


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which no UTF-8 can hold."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
