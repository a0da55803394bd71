"""The same run on 1, 2 and 4 processes and with micro-batches of 1, 2 and 8 rows: how far are the numbers apart?

    python bench/invariance.py                                       # 36 short runs, about six minutes
    python bench/invariance.py dpo ppo                               # of these stages alone

Five updates of eight rows of each stage, on the embedded toy data and a tiny model, in float32. The reference is one
process with micro-batches of one row. Loss: the largest |a - b| / |b| of the losses in metrics.jsonl. Weights, biases:
the largest |a - b| of a final tensor, over the largest |b| in it. Stops if other texts were sampled. Prints a table in
Markdown.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pipeline import Pipeline, arguments, metrics  # noqa: E402

from hub.files import read_jsonl  # noqa: E402

# stage: what its configuration adds
STAGES = {
    "sft": {},
    "rm": {},
    "dpo": {},
    "ppo": {"samples_every": 1, "kl_target": 0.5},
}
PROCESSES = (1, 2, 4)
MICRO_BATCHES = (1, 2, 8)


def run(stage, cfg, processes):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, f"{stage}.py", *arguments(cfg)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


def distances(cfg, reference):
    """How far two runs are apart: in their losses, their weights and their biases."""
    losses = []
    for ours, theirs in zip(metrics(cfg), metrics(reference), strict=True):
        for name, loss in theirs.items():
            if "loss" in name:
                losses.append(abs(ours[name] - loss) / abs(loss))

    ours = load_file(Path(cfg.out_dir) / "final" / "model.safetensors")
    theirs = load_file(Path(reference.out_dir) / "final" / "model.safetensors")
    weights = []
    biases = []
    for name, tensor in theirs.items():
        largest = tensor.abs().max().clamp(min=1e-12)
        apart = ((ours[name] - tensor).abs().max() / largest).item()
        kind = biases if name.endswith("bias") else weights
        kind.append(apart)
    return max(losses), max(weights), max(biases)


def texts(cfg):
    path = Path(cfg.out_dir) / "samples.jsonl"
    if not path.exists():
        return []
    return [row["response"] for row in read_jsonl(path)]


def compare_stage(pipeline, stage):
    """Run a stage on all numbers of processes and micro-batches; returns its rows of the table."""
    module = importlib.import_module(stage)
    reference = None
    rows = []
    for processes in PROCESSES:
        cells = [stage, str(processes)]
        for micro in MICRO_BATCHES:
            name = f"{stage}_{processes}_{micro}"
            cfg = pipeline.config(module, name, episodes=40, micro_batch_size=micro, **STAGES[stage])
            run(stage, cfg, processes)
            if reference is None:
                reference = cfg
                cells.append("(reference)")
                continue
            if texts(cfg) != texts(reference):
                raise SystemExit(f"{cfg.out_dir} sampled other texts than {reference.out_dir}")
            cells.append(" / ".join(f"{distance:.0e}" for distance in distances(cfg, reference)))
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def main():
    pipeline = Pipeline(Path(tempfile.mkdtemp(prefix="invariance-")))
    rows = []
    for stage in sys.argv[1:] or STAGES:
        rows += compare_stage(pipeline, stage)
    print(f"\n| stage | processes | micro-batch {' | '.join(map(str, MICRO_BATCHES))} |")
    print("|---" * (2 + len(MICRO_BATCHES)) + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
