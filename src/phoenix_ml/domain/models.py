"""What a model is: a name with versions, each one immutable artifact with a signature and a stage."""

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final

from msgspec import Struct

from phoenix_ml.domain.baselines import Baseline
from phoenix_ml.domain.errors import InvalidField, ModelRefused, StageConflict, TakesTensors
from phoenix_ml.domain.features import FeatureRule
from phoenix_ml.domain.rows import Column, ElementType, Scalar

# Names appear in URLs, file names and metric labels.
_MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# The expression that semver.org recommends.
_SEMANTIC_VERSION: Final = re.compile(
    r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})"
    r"(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?"
    r"(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?",
    re.ASCII,
)


def check_model_id(model_id: str) -> None:
    """Raises InvalidField unless the name can stand in a URL, a file name and a metric label."""
    if not _MODEL_ID.fullmatch(model_id):
        raise InvalidField(
            f"model id {model_id!r} is not usable: 1 to 128 letters, digits, '.', '_' or '-', "
            "the first a letter or digit",
            field="id",
        )


def check_version(version: str) -> None:
    """Raises InvalidField unless the version is semantic (semver.org) and at most 64 long."""
    if len(version) > 64 or not _SEMANTIC_VERSION.fullmatch(version):
        raise InvalidField(
            f"version {version!r} is not a semantic version: write MAJOR.MINOR.PATCH, such as 1.0.0",
            field="version",
        )


def version_precedence(version: str) -> tuple[Any, ...]:
    """A key that sorts semantic versions by their precedence (semver.org, 11).

    >>> sorted(["1.10.0", "1.9.0", "1.10.0-rc.1"], key=version_precedence)
    ['1.9.0', '1.10.0-rc.1', '1.10.0']
    """
    found = _SEMANTIC_VERSION.fullmatch(version)
    if found is None:
        raise InvalidField(f"{version!r} is not a semantic version", field="version")
    major, minor, patch, prerelease, _build = found.groups()
    parts = [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in (prerelease or "").split(".") if p]
    return int(major), int(minor), int(patch), prerelease is None, parts


def next_version(versions: Sequence[str]) -> str:
    """The next minor version after the highest.

    >>> next_version(["1.0.0", "1.10.3", "1.9.0"])
    '1.11.0'
    """
    major, minor, *_ = version_precedence(max(versions, key=version_precedence))
    return f"{major}.{minor + 1}.0"


class Stage(StrEnum):
    DEV = "dev"
    STAGING = "staging"
    PROD = "prod"


_LADDER: Final = (Stage.DEV, Stage.STAGING, Stage.PROD)


def check_promotion(current: Stage, wanted: Stage) -> None:
    """Raises StageConflict unless ``wanted`` is one step up or down the ladder, or no step."""
    if abs(_LADDER.index(current) - _LADDER.index(wanted)) > 1:
        raise StageConflict(
            f"a version goes {' → '.join(_LADDER)} one step at a time: move it from {current} to "
            f"{Stage.STAGING} first",
            current=current,
            wanted=wanted,
        )


class Task(StrEnum):
    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    TENSORS = "tensors"


class TensorSpec(Struct, frozen=True):
    """One input or output of a graph; ``None`` in the shape is a dimension the caller chooses.

    ``has_rank`` is False where the graph does not say how many dimensions there are: the shape is empty then.
    """

    name: str
    type: str
    shape: tuple[int | None, ...]
    has_rank: bool = True


class Signature(Struct, frozen=True):
    """The ordered, typed inputs and outputs of a version, read from the artifact.

    A tabular input has the shape ``[rows]`` or ``[rows, width]``. An input of width one is one
    feature that bears the input's name; a wider one holds ``width`` features of the same type.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """How many features each input takes. Raises ModelRefused for what is not a table's row."""
        widths = []
        for spec in self.inputs:
            known = {element.value for element in ElementType if element is not ElementType.TENSOR}
            if spec.type not in known:
                raise ModelRefused(
                    f"input {spec.name!r} has elements of type {spec.type}; features are {', '.join(sorted(known))}"
                )
            if len(spec.shape) not in (1, 2) or (len(spec.shape) == 2 and spec.shape[1] is None):
                raise ModelRefused(
                    f"input {spec.name!r} has shape {list(spec.shape)}; a tabular input is [rows] or [rows, width]"
                )
            if spec.shape[0] not in (None, 1):
                raise ModelRefused(
                    f"input {spec.name!r} takes exactly {spec.shape[0]} rows; export it with a free first dimension"
                )
            widths.append(1 if len(spec.shape) == 1 else int(spec.shape[1] or 0))
        return tuple(widths)

    def columns(self, names: Sequence[str] = ()) -> tuple[Column, ...]:
        """One column a feature, in the order of the inputs; ``names`` replace the derived names."""
        columns: list[Column] = []
        for spec, width in zip(self.inputs, self.widths, strict=True):
            for position in range(width):
                derived = spec.name if width == 1 else f"{spec.name}_{position}"
                name = names[len(columns)] if names else derived
                columns.append(Column(name, ElementType(spec.type)))
        return tuple(columns)


class Metadata(Struct, frozen=True):
    """What is known of a version beside its bytes; stored as one JSON document.

    ``sample`` is one row that the model is known to answer: it warms the engine up at each load.
    ``row_independent`` says that rows were seen to get the same answers alone and together; without it
    each row runs by itself. A version whose task is ``tensors`` has inputs and outputs of any shape and no features;
    ``not_tabular`` says why.
    """

    signature: Signature
    features: tuple[str, ...]
    contract: dict[str, FeatureRule]
    task: Task
    class_labels: tuple[str | int, ...] = ()
    label_output: str | None = None
    scores_output: str | None = None
    sample: tuple[Scalar | None, ...] = ()
    runtime: str = ""
    baseline: Baseline | None = None
    row_independent: bool = False
    not_tabular: str = ""

    @property
    def columns(self) -> tuple[Column, ...]:
        if self.task is Task.TENSORS:
            return tuple(Column(spec.name, ElementType.TENSOR) for spec in self.signature.inputs)
        return self.signature.columns(self.features)


def check_takes_rows(metadata: Metadata) -> None:
    """Raises TakesTensors for a version whose inputs are no rows of features."""
    if metadata.task is Task.TENSORS:
        raise TakesTensors(
            "the version takes tensors, not rows of features; POST /v2/models/{model}/infer answers for it"
            + (f" ({metadata.not_tabular})" if metadata.not_tabular else "")
        )


class Framework(StrEnum):
    """What runs a version: ONNX Runtime's own kernels, or TensorRT where there is a GPU for it."""

    ONNX = "onnx"
    TENSORRT = "tensorrt"


class ModelVersion(Struct, frozen=True):
    """One immutable artifact under a name, with the two things about it that may change."""

    model_id: str
    version: str
    framework: Framework
    uri: str
    sha256: str
    stage: Stage
    is_active: bool
    created_at_ms: int
    metadata: Metadata
