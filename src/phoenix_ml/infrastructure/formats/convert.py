"""Any model file as the ONNX file that is registered, proven to answer the same."""

import importlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from msgspec import structs

from phoenix_ml.application.ports import Engines, ModelHints
from phoenix_ml.domain.errors import InferenceFailed, InvalidField, ModelRefused, PhoenixError
from phoenix_ml.domain.features import FeatureRule, FeatureType
from phoenix_ml.extras import install
from phoenix_ml.infrastructure.formats.parity import Conversion, Original, ask_onnx, compare
from phoenix_ml.infrastructure.formats.sample import Sample, choose_features

_PICKLES: Final = frozenset({".joblib", ".pkl", ".pickle"})
_MISSING_TEXTS: Final = (
    '. The sample has missing texts, which an ONNX file gets as "": train the model with "" for them'
)
# By chance a value lies just beside a threshold of a tree, where float32 takes it to the other side.
_ROUNDED_SHARE: Final = 0.01
_OPENERS: Final = {".json": "xgboost", ".ubj": "xgboost", ".txt": "lightgbm", ".lgb": "lightgbm"}


@dataclass(frozen=True)
class Wanted:
    """How a model is to be converted.

    ``columns`` are the sample's, of which ``left_out`` are no features; ``contract`` is what is known of these.
    """

    columns: Mapping[str, Sequence[Any]]
    left_out: Collection[str] = ()
    tolerance: float = 1e-4
    contract: Mapping[str, FeatureRule] = field(default_factory=dict)
    trust: bool = False


class Converted(NamedTuple):
    """``contract`` names the features in the order of the file, and says their types."""

    path: Path
    contract: dict[str, FeatureRule]
    conversion: Conversion


def needs_conversion(path: Path) -> bool:
    """Whether the file's name says that another library wrote it; all others are taken for ONNX."""
    return path.suffix.lower() in _PICKLES | set(_OPENERS)


def check_trust(path: Path, trust: bool) -> bool:
    """Whether the file is a pickle. Raises ModelRefused for one that nobody vouches for; nothing opens it here."""
    is_pickle = path.suffix.lower() in _PICKLES
    if is_pickle and not trust:
        raise ModelRefused(
            f"{path.name} is a pickle: opening it runs whatever code it holds, as you, on this machine. "
            "Give --trust if you know who made it"
        )
    return is_pickle


def convert(path: Path, wanted: Wanted, engines: Engines, folder: Path) -> Converted:
    """The ONNX file, in the folder, and what was compared.

    Raises ModelRefused for what cannot be opened or converted, and for a file that answers otherwise than the
    model; InvalidField for a sample that is not the model's.
    """
    check_trust(path, wanted.trust)
    _check_libraries()
    # What the libraries warn of is told once, with the report.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        original = _open(path)
        opened_with = [str(one.message) for one in caught if _is_about_versions(one)]
        names = original.names
        if names is None and len(wanted.contract) == original.width:
            names = list(wanted.contract)
        chosen = choose_features(wanted.columns, wanted.left_out, names, original.width)
        return _convert(original, Sample(chosen), wanted, engines, folder, opened_with)


def _convert(
    original: Original, sample: Sample, wanted: Wanted, engines: Engines, folder: Path, notes: Sequence[str]
) -> Converted:
    from phoenix_ml.infrastructure.formats.graph import tidy

    one_tensor = original.takes_one_tensor(sample)
    # Some transformers cannot be converted with integers beside floats.
    layouts = [True] if one_tensor or FeatureType.INTEGER not in sample.types.values() else [False, True]
    try:
        exact = original.answer(sample.exact())
        answers = {floats_only: original.answer(sample.rounded(floats_only)) for floats_only in layouts}
    except PhoenixError:
        raise
    except Exception as exc:  # libraries raise all there is
        raise ModelRefused(f"the original cannot answer the sample: {_said(exc)}") from exc
    source = original.library
    model, floats_only = _export(original, sample, layouts)
    rounded = answers[floats_only]
    path = folder / "converted.onnx"
    path.write_bytes(tidy(model, source, only_label=original.is_classifier and rounded.numbers is None))
    contract = _contract(sample, wanted.contract, floats_only)
    task = "classification" if original.is_classifier else "regression"
    metadata = engines.inspect(path, ModelHints(task, tuple(contract)))
    inputs = sample.inputs(floats_only)
    # A file with an input a column leaves out those that the model never looks at.
    if not one_tensor:
        contract = {name: rule for name, rule in contract.items() if name in metadata.features}
    engine = engines.load(path, metadata, on_cpu=True)
    try:
        served = ask_onnx(engine, metadata, {name: inputs[name] for name in metadata.features}, sample.rows)
    except InferenceFailed as exc:
        raise ModelRefused(f"{source}: the ONNX file cannot answer the sample: {_said(exc)}") from exc
    hint = _MISSING_TEXTS if sample.lacks_text else ""
    if blurred := sample.blurred(floats_only):
        hint += f". It takes numbers as float32, which cannot tell all values of {', '.join(blurred)} apart"
    conversion = compare(source, exact, rounded, served, wanted.tolerance, hint)
    if conversion.rounded_rows:
        notes = [*notes, _check_rounding(conversion, hint)]
    return Converted(path, contract, structs.replace(conversion, notes=tuple(notes)))


def _check_rounding(conversion: Conversion, hint: str) -> str:
    """What there is to say of rows that rounding moves. Raises ModelRefused for more than a few."""
    said = (
        f"{conversion.rounded_rows} of {conversion.rows} rows are answered as the original answers their numbers "
        "rounded to float32, not as it answers the exact ones"
    )
    if conversion.rounded_rows > _ROUNDED_SHARE * conversion.rows:
        raise ModelRefused(f"{said}; nothing was registered{hint}", rows=conversion.rounded_rows)
    return said


def _check_libraries() -> None:
    """Raises ModelRefused where the extra is not installed."""
    try:
        for name in ("sklearn", "skl2onnx", "onnxmltools"):
            importlib.import_module(name)
    except ModuleNotFoundError as exc:
        raise ModelRefused(f"converting a model to ONNX takes {exc.name}: {install('convert')}") from exc


def _open(path: Path) -> Original:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        from phoenix_ml.infrastructure.formats.sklearn import open_pickle

        return open_pickle(path)
    opener = importlib.import_module(f"phoenix_ml.infrastructure.formats.{_OPENERS[suffix]}")
    original: Original = opener.open_model(path)
    return original


def _export(original: Original, sample: Sample, layouts: Sequence[bool]) -> tuple[Any, bool]:
    """The ``onnx.ModelProto``, and the layout that it came out with: whether integers are float32."""
    said = ""
    for floats_only in layouts:
        try:
            return original.export(sample, floats_only), floats_only
        except PhoenixError:
            raise
        except Exception as exc:  # noqa: BLE001 - converters raise all there is
            said = _said(exc)
    raise ModelRefused(f"{original.library}: the model cannot be converted to ONNX: {said}")


def _contract(sample: Sample, given: Mapping[str, FeatureRule], floats_only: bool) -> dict[str, FeatureRule]:
    """The given rules in the model's order, and for the others what the sample shows: types, and what may be missing."""
    if unknown := [name for name in given if name not in sample.names]:
        raise InvalidField(
            f"the feature contract names {', '.join(unknown)}, which the model does not take; "
            f"it takes {', '.join(sample.names)}",
            field="features",
        )
    rules = {}
    for name in sample.names:
        kind = sample.types[name]
        if floats_only and kind is FeatureType.INTEGER:
            kind = FeatureType.FLOAT
        shown = FeatureRule(kind, default=None) if name in sample.lacking else FeatureRule(kind)
        rules[name] = given.get(name, shown)
    return rules


def _is_about_versions(warning: warnings.WarningMessage) -> bool:
    return warning.category.__name__ == "InconsistentVersionWarning"


def _said(exc: Exception) -> str:
    words = " ".join(str(exc).split())
    words = words if len(words) <= 300 else f"{words[:299]}…"
    return f"{type(exc).__name__}: {words}"
