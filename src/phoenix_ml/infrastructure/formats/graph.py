"""What every converted graph has in common."""

from typing import Any, Final

TARGET_OPSETS: Final = {"": 18, "ai.onnx.ml": 3}
# A fixed name: the one that converters make up differs each time, and with it the file's digest.
GRAPH_NAME: Final = "converted"
INPUT_NAME: Final = "features"


def tidy(model: Any, source: str, *, only_label: bool = False) -> bytes:
    """The ``onnx.ModelProto`` as a file's bytes, the same for the same model.

    ``only_label`` drops scores that are no probabilities.
    """
    from onnx.helper import set_model_props

    # Converters list a domain twice, or in the order of a set.
    newest: dict[str, int] = {}
    for opset in model.opset_import:
        newest[opset.domain] = max(opset.version, newest.get(opset.domain, 0))
    del model.opset_import[:]
    for domain in sorted(newest):
        model.opset_import.add(domain=domain, version=newest[domain])
    if only_label:
        del model.graph.output[1:]
    for output in model.graph.output:
        # onnxmltools writes that there is one label, however many rows.
        dimensions = output.type.tensor_type.shape.dim
        if dimensions and dimensions[0].dim_value:
            dimensions[0].Clear()
    set_model_props(model, {"converted_from": source})
    return bytes(model.SerializeToString(deterministic=True))
