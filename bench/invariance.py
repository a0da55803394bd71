"""The same run on 1, 2 and 4 processes and with micro-batches of 1, 2 and 8 rows: how far are the numbers apart?

    python bench/invariance.py                                       # 36 short runs, about six minutes
    python bench/invariance.py dpo ppo                               # of these stages alone

Five updates of eight rows of each stage, on the embedded toy data and a tiny model, in float32. The reference is one
process with micro-batches of one row. Loss: the largest |a - b| / |b| of the losses in metrics.jsonl. Weights, biases:
the largest |a - b| of a final tensor, over the largest |b| in it. Stops if other texts were sampled. Prints a table in
Markdown.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pipeline import Pipeline, arguments, metrics  # noqa: E402

STAGES = dict(sft={}, rm={}, dpo={}, ppo=dict(samples_every=1, kl_target=0.5))


def run(stage, cfg, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, f"{stage}.py", *arguments(cfg)], cwd=ROOT, env=env, check=True, capture_output=True)


def distance(cfg, reference):
    """Of the losses, of the weights and of the biases."""
    losses = [abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(metrics(cfg), metrics(reference), strict=True)
              for name in b if "loss" in name]  # fmt: skip
    ours, theirs = (load_file(Path(c.out_dir) / "final" / "model.safetensors") for c in (cfg, reference))
    apart = {name: ((ours[name] - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for name, b in theirs.items()}
    weights, biases = (max(x for n, x in apart.items() if n.endswith("bias") == which) for which in (False, True))
    return max(losses), weights, biases


def texts(cfg):
    path = Path(cfg.out_dir) / "samples.jsonl"
    return [json.loads(line)["response"] for line in path.read_text().splitlines()] if path.exists() else []


def main():
    pipeline, micro_batches = Pipeline(Path(tempfile.mkdtemp(prefix="invariance-"))), (1, 2, 8)
    rows = ["| stage | processes | micro-batch " + " | ".join(map(str, micro_batches)) + " |", "|" + "---|" * 5]
    for stage in sys.argv[1:] or STAGES:
        reference = None
        for processes in (1, 2, 4):
            cells = []
            for micro in micro_batches:
                options = dict(STAGES[stage], episodes=40, micro_batch_size=micro)
                cfg = pipeline.config(importlib.import_module(stage), f"{stage}_{processes}_{micro}", **options)
                run(stage, cfg, processes)
                if reference and texts(cfg) != texts(reference):
                    raise SystemExit(f"{cfg.out_dir} sampled other texts than {reference.out_dir}")
                cells.append(" / ".join(f"{x:.0e}" for x in distance(cfg, reference)) if reference else "(reference)")
                reference = reference or cfg
            rows.append(f"| {stage} | {processes} | " + " | ".join(cells) + " |")
            print(rows[-1], flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
