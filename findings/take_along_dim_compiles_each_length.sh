#!/usr/bin/env bash
# torch 2.13.0: under torch.compile(dynamic=True), torch.take_along_dim with an index that is broadcast (here over the
# last dimension) fixes the sizes of its input: every new length compiles again. At the eighth (recompile_limit) the
# function stays uncompiled for the other lengths, with one warning. gather of the index expanded by hand, the same
# numbers, compiles once.
#
# Documented: take_along_dim is gather that also broadcasts; dynamic=True asks for one kernel that serves all sizes.
# Seen, with 12 lengths:
#     take_along_dim 8 graphs
#     gather 1 graphs
# Whoever picks hidden states or log-probabilities at given positions of rows of many lengths meets it.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.0

cat > compiled.py <<'PYTHON'
import torch
from torch._dynamo.testing import CompileCounter


def take_along_dim(x, positions):
    return torch.take_along_dim(x, positions[..., None], dim=-2)


def gather(x, positions):
    return x.gather(-2, positions[..., None].expand(-1, -1, x.shape[-1]))


for function in (take_along_dim, gather):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, dynamic=True, backend=counter)
    for length in range(20, 32):
        x = torch.randn(3, length, 8)
        positions = torch.randint(length, (3, 5))
        assert torch.equal(compiled(x, positions), function(x, positions))
    print(function.__name__, counter.frame_count, "graphs")
PYTHON

env/bin/python compiled.py 2> warnings | tee seen
diff seen <(printf 'take_along_dim 8 graphs\ngather 1 graphs\n')
grep -q "hit config.recompile_limit (8)" warnings
