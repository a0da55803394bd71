"""What torchrun's processes run for tests: stages in turn, for imports take longer than the tests' stages.

Its argument is a JSON file: [[the stage's module, the fields of its configuration], ...].
"""

import importlib
import json
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distributed.processes import join_process_group  # noqa: E402

join_process_group(gpu=None)
for name, fields in json.loads(Path(sys.argv[1]).read_text()):
    stage = importlib.import_module(name)
    stage.main(stage.Config(**fields))
dist.barrier()
dist.destroy_process_group()
