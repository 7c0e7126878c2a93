#!/usr/bin/env bash
# onnx 1.23.2, onnx-ir 1.1.0, onnxscript 0.7.2, onnxruntime 1.32.0: of a valid model whose weight is stored as a sparse
# initializer, three tools lose the weight and five more fail.
# Expected: tools that keep the weight, or say that they do not take sparse initializers, which are a part of the format
#   since its IR version 6 (2019).
# Seen: onnx.checker accepts the model and onnxruntime runs it. onnx_ir, onnxscript's optimizer and onnx's printer write
#   it without the weight and raise nothing: onnx_ir logs that the input cannot be found, as if the file were at fault.
#   The checker with full_check, the reference evaluator, the version converter and onnxruntime's quantization raise
#   errors that do not name the cause; the float16 converter leaves the weight in float32, and the result does not load.
# Hit: whoever stores a pruned network this way and then converts, optimizes or quantizes it.
# Known of old for onnx-optimizer: https://github.com/onnx/optimizer/issues/5 (open).
# Output seen:
#   onnx 1.23.2, onnx-ir 1.1.0, onnxscript 0.7.2, onnxruntime 1.32.0
#   then onnxruntime                 dense     sparse initializer
#   nothing                          runs      runs
#   onnx shape inference             runs      runs
#   onnx checker, full_check         runs      raises InferenceError
#   onnx reference evaluator         runs      raises ValueError
#   onnx version converter           runs      raises ConvertError
#   onnx printer and parser          runs      weight lost
#   onnx_ir load and save            runs      weight lost
#   onnxscript optimizer             runs      weight lost
#   onnxruntime quantization         runs      raises RuntimeError
#   onnxruntime float16              runs      does not load
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile numpy==2.3.5 \
    onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$work"
venv/bin/python - <<'EOF'
import logging
from importlib.metadata import version

import numpy
import onnx
import onnx.reference
import onnx_ir
import onnxruntime
import onnxscript.optimizer
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

logging.disable()
onnxruntime.set_default_logger_severity(4)
rng = numpy.random.default_rng(0)
weight = (rng.standard_normal((64, 32)) * (rng.random((64, 32)) < 0.1)).astype(numpy.float32)
inputs = rng.standard_normal((3, 64)).astype(numpy.float32)


def make(sparse):
    """A layer with a ReLU, whose weight is a sparse or a dense initializer."""
    places = numpy.flatnonzero(weight)
    values = helper.make_tensor("W", TensorProto.FLOAT, [len(places)], weight.ravel()[places])
    indices = helper.make_tensor("places", TensorProto.INT64, [len(places)], places)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        initializer=[] if sparse else [numpy_helper.from_array(weight, "W")],
        sparse_initializer=[helper.make_sparse_tensor(values, indices, [64, 32])] if sparse else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, "model.onnx")
    return model


def check(model):
    onnx.checker.check_model(model, full_check=True)
    return model


def refer(model):
    onnx.reference.ReferenceEvaluator(model).run(None, {"x": inputs})
    return model


def through_ir(model):
    onnx_ir.save(onnx_ir.load("model.onnx"), "other.onnx")
    return onnx.load("other.onnx")


def quantize(model):
    quantize_dynamic("model.onnx", "other.onnx")
    return onnx.load("other.onnx")


tools = {
    "nothing": lambda model: model,
    "onnx shape inference": onnx.shape_inference.infer_shapes,
    "onnx checker, full_check": check,
    "onnx reference evaluator": refer,
    "onnx version converter": lambda model: onnx.version_converter.convert_version(model, 20),
    "onnx printer and parser": lambda model: onnx.parser.parse_model(onnx.printer.to_text(model)),
    "onnx_ir load and save": through_ir,
    "onnxscript optimizer": onnxscript.optimizer.optimize,
    "onnxruntime quantization": quantize,
    "onnxruntime float16": lambda model: convert_float_to_float16(model, keep_io_types=True),
}


def outcome(tool, sparse):
    try:
        model = tool(make(sparse))
    except Exception as error:
        return f"raises {type(error).__name__}"
    if not model.graph.initializer and not model.graph.sparse_initializer:
        return "weight lost"
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:
        return "does not load"
    (outputs,) = session.run(None, {"x": inputs})
    return "runs" if abs(outputs - numpy.maximum(inputs @ weight, 0)).max() < 0.1 else "other outputs"


print(", ".join(f"{name} {version(name)}" for name in ("onnx", "onnx-ir", "onnxscript", "onnxruntime")))
print("then onnxruntime                 dense     sparse initializer")
seen = {}
for name, tool in tools.items():
    dense, sparse = outcome(tool, False), outcome(tool, True)
    print(f"{name:32} {dense:9} {sparse}")
    assert dense == "runs", f"a dense initializer after {name}: {dense}"
    seen[name] = sparse
for name in ("nothing", "onnx shape inference"):
    assert seen[name] == "runs", "behaviour has changed"
for name in ("onnx printer and parser", "onnx_ir load and save", "onnxscript optimizer"):
    assert seen[name] == "weight lost", "behaviour has changed"
assert sum(sparse.startswith("raises") for sparse in seen.values()) == 4, "behaviour has changed"
EOF
