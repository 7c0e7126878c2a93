#!/usr/bin/env bash
# gguf 0.19.0 (numpy 2.3.5): Q4_1 and Q5_1, the better formats for a dense matrix, move every zero of a pruned one.
# Expected: Q4_1 (a minimum and a step for each 32 weights) at least as good as Q4_0 (a step), and a 0 that stays a 0,
#   as it does with Q4_0.
# Seen: 0 is none of the 16 or 32 values of a block with a minimum of its own, so all removed weights of that block
#   become one and the same number. Equal errors do not cancel: behind a ReLU, whose outputs have one sign, they add
#   up. With 10 % of the weights kept the outputs of a Q4_1 layer are off by a third, 6 times as far as those of Q4_0;
#   Q5_1 with its 5 bits is off 3 times as far as Q4_0 with 4. The zeros that are left are those of blocks without a
#   negative weight. On a dense matrix both formats are as good as they should be.
# Hit: pruned networks in GGUF files: whoever picks the format by its error on dense weights, counts on sparsity behind
#   the conversion, or looks at the error of the weights, which tells less than half of it.
# Output seen:
#   gguf 0.19.0; zeros that stay 0, error of the weights, of outputs behind a ReLU
#         100% kept             50% kept              10% kept              5% kept
#   Q4_0      -  0.086  0.087    100%  0.076  0.077    100%  0.049  0.050    100%  0.038  0.037
#   Q4_1      -  0.078  0.079      0%  0.095  0.180     21%  0.109  0.326     48%  0.095  0.278
#   Q5_0      -  0.043  0.043    100%  0.038  0.037    100%  0.024  0.024    100%  0.019  0.019
#   Q5_1      -  0.038  0.039      0%  0.046  0.090     21%  0.053  0.152     47%  0.046  0.144
#   Q8_0      -  0.005  0.005    100%  0.005  0.005    100%  0.003  0.003    100%  0.002  0.002
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile gguf==0.19.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
from importlib.metadata import version

import numpy
from gguf import GGMLQuantizationType, quants

densities = (1.0, 0.5, 0.1, 0.05)


def off(after, before):
    return numpy.linalg.norm(after - before) / numpy.linalg.norm(before)


def case(kind, density):
    rng = numpy.random.default_rng(0)
    kept = rng.random((512, 1024)) < density
    weight = (rng.standard_normal((512, 1024)) * kept).astype(numpy.float32)
    inputs = numpy.maximum(rng.standard_normal((64, 1024)), 0).astype(numpy.float32)
    back = quants.dequantize(quants.quantize(weight, kind), kind)
    zeros = f"{(back[~kept] == 0).mean():.0%}" if density < 1 else "-"
    return zeros, off(back, weight), off(inputs @ back.T, inputs @ weight.T)


seen = {}
print(f"gguf {version('gguf')}; zeros that stay 0, error of the weights, of outputs behind a ReLU")
print((" " * 6 + "".join(f"{f'{density:.0%} kept':22}" for density in densities)).rstrip())
for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
    cells = [case(GGMLQuantizationType[name], density) for density in densities]
    print(f"{name:6}" + "   ".join(f"{zeros:>5}{weights:7.3f}{outputs:7.3f}" for zeros, weights, outputs in cells))
    seen[name] = dict(zip(densities, cells))
for name in ("Q4_0", "Q5_0", "Q8_0"):
    assert [zeros for zeros, _, _ in seen[name].values()] == ["-", "100%", "100%", "100%"], "behaviour has changed"
assert seen["Q4_1"][1.0][2] < seen["Q4_0"][1.0][2], "a dense matrix has changed"
for name, times in (("Q4_1", 4), ("Q5_1", 2)):
    assert seen[name][0.5][0] == "0%" and seen[name][0.1][2] > times * seen["Q4_0"][0.1][2], "behaviour has changed"
EOF
