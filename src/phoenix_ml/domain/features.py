"""Features: what a contract asks of them, and how a row's values are found, each with its source."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Final

from msgspec import UNSET, Struct, UnsetType

from phoenix_ml.domain.errors import (
    FeatureCountWrong,
    FeatureInvalid,
    FeatureMissing,
    FeatureUnknown,
    InvalidField,
    ModelRefused,
)
from phoenix_ml.domain.rows import Column, ElementType, RowFormat, Scalar

Given = Mapping[str, Scalar | None] | Sequence[Scalar | None]


class FeatureType(StrEnum):
    FLOAT = "float"
    INTEGER = "integer"
    BOOLEAN = "boolean"
    STRING = "string"


_NATURAL_TYPE: Final = {
    ElementType.FLOAT32: FeatureType.FLOAT,
    ElementType.FLOAT64: FeatureType.FLOAT,
    ElementType.INT64: FeatureType.INTEGER,
    ElementType.INT32: FeatureType.INTEGER,
    ElementType.BOOL: FeatureType.BOOLEAN,
    ElementType.STRING: FeatureType.STRING,
}
# Which feature types an element can hold without losing what was meant.
_HOLDS: Final = {
    FeatureType.FLOAT: {FeatureType.FLOAT, FeatureType.INTEGER, FeatureType.BOOLEAN},
    FeatureType.INTEGER: {FeatureType.INTEGER, FeatureType.BOOLEAN},
    FeatureType.BOOLEAN: {FeatureType.BOOLEAN},
    FeatureType.STRING: {FeatureType.STRING},
}
PYTHON_TYPES: Final[dict[FeatureType, frozenset[type]]] = {
    FeatureType.FLOAT: frozenset({float, int}),
    FeatureType.INTEGER: frozenset({int}),
    FeatureType.BOOLEAN: frozenset({bool}),
    FeatureType.STRING: frozenset({str}),
}


def check_feature_name(name: str) -> None:
    """Raises InvalidField for a name that no feature store takes.

    Names with a leading underscore are the stores' own: ``_updated_at`` and ``_at:<feature>``.
    """
    if not name or name.startswith("_"):
        raise InvalidField(
            f"feature name {_shorten(name)} is not usable: it must not be empty nor start with '_'",
            field="features",
        )


class FeatureRule(Struct, frozen=True, forbid_unknown_fields=True):
    """What a contract says of one feature. Without a default the feature is required.

    A default of ``None`` (JSON ``null``) means that missing is allowed: a float receives NaN, a
    string ``""``; integers and booleans have no such value and cannot have that default.
    """

    type: FeatureType
    default: Scalar | UnsetType | None = UNSET
    max_age_s: float | None = None
    description: str = ""


class StoredFeatures(Struct):
    """What a feature store holds for one entity.

    ``updated_at_ms`` is when the whole entity was last written, ``at_ms`` when single features
    were; both in milliseconds since the epoch.
    """

    values: dict[str, Scalar]
    updated_at_ms: int | None = None
    at_ms: dict[str, int] = {}

    def written_at_ms(self, feature: str) -> int | None:
        """When the feature was written; None where nobody recorded it."""
        return self.at_ms.get(feature, self.updated_at_ms)


class PackedSignature(Struct, frozen=True):
    """The names of an all-float32 signature, in order, and a digest of them that names its packed rows.

    ``types`` is what ``read`` asks for where no packed row is stored.
    """

    digest: str
    types: Mapping[str, FeatureType]


class PackedFeatures(Struct, frozen=True, gc=False):
    """All features of a signature as the engine takes them: little-endian float32 in signature order.

    Every value is finite and came from the store as a number; nobody recorded more than the one time.
    """

    row: bytes
    updated_at_ms: int | None


def packed_signature(columns: Sequence[Column]) -> PackedSignature | None:
    """What a store needs to keep rows of these columns packed; None unless all are float32."""
    if not columns or any(column.element is not ElementType.FLOAT32 for column in columns):
        return None
    names = [column.name for column in columns]
    # Lengths keep ("ab", "c") and ("a", "bc") apart.
    text = "".join(f"{len(name)}:{name}" for name in names)
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return PackedSignature(digest, dict.fromkeys(names, FeatureType.FLOAT))


class Source(StrEnum):
    """Where a feature's value came from; the letter is its form in the journal."""

    STORE = "store"
    REQUEST = "request"
    DEFAULT = "default"
    STALE = "stale"
    MISSING = "missing"


SOURCE_LETTER: Final = {
    Source.STORE: "s",
    Source.REQUEST: "r",
    Source.DEFAULT: "d",
    Source.STALE: "o",
    Source.MISSING: "m",
}
SOURCE_OF_LETTER: Final = {letter: source.value for source, letter in SOURCE_LETTER.items()}


class FeatureContract:
    """Turns what is stored and what was sent into the values of a row, each with its source."""

    def __init__(self, columns: Sequence[Column], rules: Mapping[str, FeatureRule]) -> None:
        self.names = tuple(column.name for column in columns)
        self.rules = tuple(rules[name] for name in self.names)
        self.types = {name: rules[name].type for name in self.names}
        self._positions = {name: i for i, name in enumerate(self.names)}
        self.has_ages = any(rule.max_age_s is not None for rule in self.rules)
        kinds = {rule.type for rule in self.rules}
        # Types of a whole row are checked by one set comparison (0.5 µs for 30 features) where all
        # features are alike; a loop over the rules costs 3 µs.
        self._uniform = PYTHON_TYPES[kinds.pop()] if len(kinds) == 1 else None

    @classmethod
    def check(cls, columns: Sequence[Column], rules: Mapping[str, FeatureRule]) -> dict[str, FeatureRule]:
        """The complete rules, in column order: features the contract is silent on are required.

        Raises ModelRefused for a rule that no feature has, or that its column cannot keep.
        """
        elements = {column.name: column.element for column in columns}
        if unknown := sorted(set(rules) - set(elements)):
            raise ModelRefused(
                f"the feature contract names {unknown}, which the model does not take; it takes {list(elements)}",
                features=unknown,
            )
        complete = {}
        for name, element in elements.items():
            try:
                check_feature_name(name)
            except InvalidField as exc:
                raise ModelRefused(f"{exc.message}; rename the model's input", feature=name) from exc
            natural = _NATURAL_TYPE[element]
            rule = rules.get(name, FeatureRule(natural))
            if rule.type not in _HOLDS[natural]:
                raise ModelRefused(
                    f"the feature contract says {name!r} is of type {rule.type}, the model takes {element}",
                    feature=name,
                )
            if rule.default is None and rule.type in (FeatureType.INTEGER, FeatureType.BOOLEAN):
                raise ModelRefused(
                    f"feature {name!r}: {rule.type} has no value for missing, so its default cannot be null",
                    feature=name,
                )
            if rule.default not in (None, UNSET) and type(rule.default) not in PYTHON_TYPES[rule.type]:
                raise ModelRefused(
                    f"feature {name!r}: the default {rule.default!r} is not of type {rule.type}", feature=name
                )
            if rule.default is not None and not isinstance(rule.default, UnsetType):
                try:
                    RowFormat([Column(name, element)]).pack([rule.default])
                except FeatureInvalid as exc:
                    raise ModelRefused(f"the default of {exc.message}", feature=name) from exc
            if rule.max_age_s is not None and not rule.max_age_s > 0:
                raise ModelRefused(f"feature {name!r}: max_age_s must be above 0", feature=name)
            complete[name] = rule
        return complete

    def resolve(
        self, stored: StoredFeatures | None, given: Given | None, now_ms: int
    ) -> tuple[list[Scalar], str]:
        """The row's values in signature order and a letter each for their source.

        A value is taken from the store, else from the request, else from the default. One letter
        alone stands for all features. Raises FeatureCountWrong, FeatureUnknown, FeatureMissing and
        FeatureInvalid, each naming the feature.
        """
        uniform = self._uniform
        if uniform is not None:
            values: list[Any] | None = None
            letter = "s"
            if stored is not None and not self.has_ages and given is None:
                values = list(map(stored.values.get, self.names))
            elif stored is None and type(given) is list and len(given) == len(self.names):
                values, letter = given, "r"
            if values is not None and uniform.issuperset(map(type, values)):
                return values, letter
        return self._resolve_one_by_one(stored, given, now_ms)

    def _resolve_one_by_one(
        self, stored: StoredFeatures | None, given: Given | None, now_ms: int
    ) -> tuple[list[Scalar], str]:
        sent = self._by_name(given)
        kept = stored.values if stored is not None else {}
        values: list[Scalar] = []
        letters = []
        for name, rule in zip(self.names, self.rules, strict=True):
            value = kept.get(name)
            source = Source.STORE
            stale = False
            if value is not None and rule.max_age_s is not None and stored is not None:
                written_at_ms = stored.written_at_ms(name)
                stale = written_at_ms is None or now_ms - written_at_ms > rule.max_age_s * 1000
            if value is None or stale:
                value, source = sent.get(name), Source.REQUEST
            if value is None:
                value, source = self._default(name, rule, stale)
            elif type(value) not in PYTHON_TYPES[rule.type]:
                raise FeatureInvalid(
                    f"feature {name!r} from the {source} is {_shorten(value)}, which is not of type {rule.type}",
                    feature=name,
                    source=source,
                )
            values.append(value)
            letters.append(SOURCE_LETTER[source])
        return values, letters[0] if len(set(letters)) == 1 else "".join(letters)

    def _by_name(self, given: Given | None) -> Mapping[str, Scalar | None]:
        if given is None:
            return {}
        if isinstance(given, Mapping):
            for name in given:
                if name not in self._positions:
                    raise FeatureUnknown(
                        f"the model has no feature {_shorten(name)}; it takes {', '.join(self.names)}",
                        feature=name,
                    )
            return given
        if len(given) != len(self.names):
            raise FeatureCountWrong(
                f"the list has {len(given)} values, the model takes {len(self.names)}: {', '.join(self.names)}",
                expected=len(self.names),
                given=len(given),
            )
        return dict(zip(self.names, given, strict=True))

    def _default(self, name: str, rule: FeatureRule, stale: bool) -> tuple[Scalar, Source]:
        if isinstance(rule.default, UnsetType):
            why = "too old in the store" if stale else "missing"
            raise FeatureMissing(
                f"feature {name!r} is required and {why}: store it for the entity or send it in 'features'",
                feature=name,
                reason="stale" if stale else "missing",
            )
        if rule.default is None:
            empty: Scalar = "" if rule.type is FeatureType.STRING else float("nan")
            return empty, Source.STALE if stale else Source.MISSING
        return rule.default, Source.STALE if stale else Source.DEFAULT


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def describe_sources(letters: str, names: Sequence[str]) -> str | dict[str, str]:
    """One word when all features came from the same place, else a word a feature."""
    if len(letters) == 1:
        return SOURCE_OF_LETTER[letters]
    return {name: SOURCE_OF_LETTER[letter] for name, letter in zip(names, letters, strict=True)}
