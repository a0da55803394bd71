#!/usr/bin/env bash
# torch 2.13.0: to make any optimizer of torch.optim, or an nn.Embedding on the "meta" device, imports PyTorch's compiler
# (torch._dynamo, with sympy): 822 modules, where `import torch` has 1,136, and about two thirds of its time again.
# No torch.compile is asked for. The functions behind the optimizers (torch.optim.adamw.adamw) do without, and so do
# nn.Linear on "meta" and parameters made of torch.empty.
#
# A command-line program that trains a small model, or fills a large one from a file, meets it at every start.
# Seen:
#     import torch: False
#     nn.Linear on meta: False
#     the function adamw: False
#     torch.optim.AdamW: True
#     nn.Embedding on meta: True
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.0
cat > first.py <<'PYTHON'
import sys

import torch
from torch.optim.adamw import adamw

before = len(sys.modules)


def is_imported():
    return "torch._dynamo" in sys.modules


def optimizer():
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])


def function():
    w, gradient, mean, square = torch.zeros(4, 3)
    numbers = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, amsgrad=False, maximize=False)
    adamw([w], [gradient], [mean], [square], [], [torch.zeros(())], fused=True, **numbers)


def on_meta(cls):
    with torch.device("meta"):
        cls(4, 4)


if sys.argv[1] == "optimizer":
    print("import torch:", is_imported())
    on_meta(torch.nn.Linear)
    print("nn.Linear on meta:", is_imported())
    function()
    print("the function adamw:", is_imported())
    optimizer()
    print("torch.optim.AdamW:", is_imported())
else:
    on_meta(torch.nn.Embedding)
    print("nn.Embedding on meta:", is_imported())
assert len(sys.modules) - before > 500
PYTHON
(env/bin/python first.py optimizer; env/bin/python first.py embedding) | tee seen
diff seen - <<'SEEN'
import torch: False
nn.Linear on meta: False
the function adamw: False
torch.optim.AdamW: True
nn.Embedding on meta: True
SEEN
