"""What the Open Inference Protocol says of the server and of its models, as plain data for REST and gRPC alike."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from phoenix_ml.application.catalogue import activate
from phoenix_ml.application.infer import Inferred, InferRequest, carried_outputs, describe_shape
from phoenix_ml.application.ports import ArtifactStore, Engines, Registry
from phoenix_ml.application.serving import LiveModel, LiveModels, Loaded, ServedVersion
from phoenix_ml.domain.errors import InvalidField, ModelLoadFailed, Unsupported
from phoenix_ml.domain.models import Metadata, ModelVersion, TensorSpec, version_precedence
from phoenix_ml.domain.routing import Role
from phoenix_ml.domain.tensors import DATATYPE_OF, Tensor

_ROUTING_KEY: Final = "routing_key"
_ENTITY_ID: Final = "entity_id"
PREDICTION_IDS: Final = "prediction_ids"
EXTENSIONS: Final = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
# What Triton's clients know of ONNX Runtime.
_PLATFORM: Final = "onnxruntime_onnx"
_BACKEND: Final = "onnxruntime"


def infer_request(
    model_id: str,
    model_version: str | None,
    request_id: str,
    inputs: dict[str, Tensor],
    outputs: Sequence[str],
    parameters: Mapping[str, Any],
) -> InferRequest:
    """The request with what its parameters say. Raises InvalidField for those of ours that are no texts."""
    texts = []
    for name in (_ENTITY_ID, _ROUTING_KEY):
        value = parameters.get(name)
        if value is not None and (not isinstance(value, str) or not 0 < len(value) <= 512 or "\0" in value):
            raise InvalidField(f"the parameter {name!r} is a text of 1 to 512 characters", field=name)
        texts.append(value)
    if len(request_id) > 128 or "\0" in request_id:
        raise InvalidField("the request's id has at most 128 characters, and no U+0000", field="id")
    entity_id, routing_key = texts
    return InferRequest(model_id, inputs, model_version, outputs, request_id, entity_id, routing_key)


def answer_parameters(answer: Inferred, with_all_ids: bool) -> dict[str, str]:
    """What the protocol has no field for: the role, the id under which the answer is on record, and the device."""
    parameters = {
        "role": answer.role.value,
        "prediction_id": answer.prediction_id,
        "device": answer.device,
    }
    if with_all_ids:
        parameters[PREDICTION_IDS] = ",".join(answer.prediction_ids())
    return parameters


def describe_server(version: str) -> dict[str, Any]:
    return {"name": "phoenix-ml", "version": version, "extensions": list(EXTENSIONS)}


def find_version(live: LiveModels, model_id: str, version: str | None) -> Loaded:
    """The version that is loaded; without one, the champion.

    Raises ModelUnknown, VersionUnknown, VersionInactive, or the version's ModelLoadFailed.
    """
    model = live.model(model_id)
    return model.pick_any(version or _champion(model), "")[0]


def _champion(model: LiveModel) -> str | None:
    if model.router is None:
        return None
    arms = model.router.routing.arms
    return next((arm.version for arm in arms if arm.role is Role.CHAMPION), arms[0].version)


def describe_model(live: LiveModels, model_id: str, version: str | None) -> dict[str, Any]:
    """Inputs and outputs of the version, or of the champion. Raises what ``find_version`` raises."""
    metadata = find_version(live, model_id, version).version.metadata
    served = live.model(model_id).served
    versions = [name for name, loaded in served.items() if isinstance(loaded, Loaded)]
    return {
        "name": model_id,
        "versions": sorted(versions, key=version_precedence) if version is None else [version],
        "platform": _PLATFORM,
        "inputs": [_describe_tensor(spec) for spec in metadata.signature.inputs],
        "outputs": [_describe_tensor(spec) for spec in carried_outputs(metadata)],
    }


def _describe_tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": DATATYPE_OF[spec.type], "shape": describe_shape(spec)}


def describe_config(live: LiveModels, model_id: str, version: str | None, batch_limit: int) -> dict[str, Any]:
    """The configuration as Triton has it. Where rows may be batched their dimension is left out of the shapes."""
    loaded = find_version(live, model_id, version)
    metadata = loaded.version.metadata
    batches = isinstance(loaded, ServedVersion) and _has_free_rows(metadata)
    return {
        "name": model_id,
        "platform": _PLATFORM,
        "backend": _BACKEND,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": batch_limit if batches else 0,
        "input": [_configure(spec, batches) for spec in metadata.signature.inputs],
        "output": [_configure(spec, batches) for spec in carried_outputs(metadata)],
    }


def _has_free_rows(metadata: Metadata) -> bool:
    specs = (*metadata.signature.inputs, *carried_outputs(metadata))
    return all(spec.shape and spec.shape[0] is None for spec in specs)


def _configure(spec: TensorSpec, batches: bool) -> dict[str, Any]:
    datatype = DATATYPE_OF[spec.type]
    dims = describe_shape(spec)[1:] if batches else describe_shape(spec)
    return {
        "name": spec.name,
        "data_type": "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}",
        "dims": dims,
    }


def list_index(live: LiveModels, *, ready_only: bool = False) -> list[dict[str, str]]:
    """Every registered version, whether it is ready, and if not why."""
    index = []
    for model_id, model in sorted(live.models.items()):
        for version in sorted(model.registered, key=version_precedence):
            state, reason = _state(model.served.get(version))
            if state == "READY" or not ready_only:
                index.append({"name": model_id, "version": version, "state": state, "reason": reason})
    return index


def _state(served: Loaded | ModelLoadFailed | None) -> tuple[str, str]:
    if served is None:
        return "UNAVAILABLE", "not active"
    if isinstance(served, ModelLoadFailed):
        return "UNAVAILABLE", served.message
    return "READY", ""


def describe_statistics(
    live: LiveModels,
    model_id: str | None,
    version: str | None,
    counts: Mapping[tuple[str, str], Mapping[str, float]],
) -> dict[str, Any]:
    """What Triton calls statistics, from what was counted of each (model, version): requests, request_s, rows, runs,
    run_s; those in seconds.

    Requests that were refused before a version was chosen are no version's, and queueing is not told apart.
    """
    if model_id is not None:
        find_version(live, model_id, version)
    wanted = live.models if model_id is None else {model_id: live.model(model_id)}
    described = [
        _describe_counts(name, number, counts.get((name, number), {}))
        for name, model in sorted(wanted.items())
        for number in sorted(model.served, key=version_precedence)
        if version in (None, number)
    ]
    return {"model_stats": described}


def _describe_counts(model_id: str, version: str, counted: Mapping[str, float]) -> dict[str, Any]:
    requests, runs = int(counted.get("requests", 0)), int(counted.get("runs", 0))
    nothing = {"count": 0, "ns": 0}
    return {
        "name": model_id,
        "version": version,
        "last_inference": 0,
        "inference_count": int(counted.get("rows", 0)),
        "execution_count": runs,
        "inference_stats": {
            "success": {"count": requests, "ns": int(counted.get("request_s", 0.0) * 1e9)},
            "fail": nothing,
            "queue": {"count": requests, "ns": 0},
            "compute_input": {"count": requests, "ns": 0},
            "compute_infer": {"count": runs, "ns": int(counted.get("run_s", 0.0) * 1e9)},
            "compute_output": {"count": requests, "ns": 0},
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
    }


def load_model(
    registry: Registry,
    artifacts: ArtifactStore,
    engines: Engines,
    model_id: str,
    parameters: Mapping[str, Any],
    *,
    actor: str,
) -> None:
    """Activates the version that ``parameters`` name; without one, the highest of the highest stage if none is active.

    Raises ModelUnknown, VersionUnknown, ModelRefused where it does not load, and Unsupported for a model that comes
    with the request.
    """
    foreign = [name for name in parameters if name == "config" or name.startswith("file:")]
    if foreign:
        raise Unsupported(
            f"{', '.join(foreign)}: a model is not registered by loading it; upload it to POST /models, then load it"
        )
    versions = registry.list_versions(model_id)
    version = parameters.get("version")
    if version is None:
        if any(known.is_active for known in versions):
            return
        version = max(versions, key=_rank).version
    activate(registry, artifacts, engines, model_id, str(version), actor=actor)


def _rank(version: ModelVersion) -> tuple[Any, ...]:
    return list(type(version.stage)).index(version.stage), version_precedence(version.version)


def unload_model(registry: Registry, model_id: str, *, actor: str) -> None:
    """No version of the model answers any more, and its routing is the default's. Raises ModelUnknown."""
    versions = registry.list_versions(model_id)
    if model_id in registry.routings():
        registry.clear_routing(model_id, actor)
    for version in versions:
        if version.is_active:
            registry.set_active(model_id, version.version, False, actor)
