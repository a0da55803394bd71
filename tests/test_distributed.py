"""Two processes under torchrun (gloo) are the same run as one process, up to float32 rounding."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipeline import EVERYTHING, ROOT, ROUNDING, arguments, metrics, ranked, same_metrics, write_rows
from safetensors.torch import load_file

import runtime
import sample

RANKED = dict(rows=ranked(24), eval_split="train", normalize_data="", label_noise=0.1)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(stage, cfg, n=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command += [f"{stage}.py", *arguments(cfg)]
    result = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("name, options", [("sft", {}), ("rm", {}), ("ppo", {}), ("dpo", {}),
                                           ("ppo", {**EVERYTHING, "critic_steps": 1}), ("rm", RANKED)])  # fmt: skip
def test_two_processes_are_one_run(pipeline, name, options, tmp_path):
    """Same rows, same sampled tokens, same losses; evaluation rows (21, 15) do not divide by 2."""
    stage, options = importlib.import_module(name), dict(options)
    if "rows" in options:
        options["data"] = write_rows(tmp_path / "rows.jsonl", options.pop("rows"))
    one, two = (pipeline.config(stage, f"{name}_{len(options)}_{n}", micro_batch_size=3, **options) for n in (1, 2))
    stage.main(one)
    torchrun(name, two)
    first, second = metrics(one), metrics(two)
    for rows in (first, second):
        rows[0].pop("rewards/accuracies", None)  # DPO starts with all rewards 0: rounding decides the sign
    same_metrics(first, second)
    weights = [load_file(Path(cfg.out_dir) / "final" / "model.safetensors") for cfg in (one, two)]
    for key, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][key], atol=ROUNDING, err_msg=key)


def test_two_processes_sample_the_same_texts(pipeline):
    one, two = (pipeline.config(sample, f"sample_{n}") for n in ("one", "two"))
    sample.main(one)
    torchrun("sample", two)
    rows = [[json.loads(line) for line in (Path(cfg.out_dir) / "samples.jsonl").read_text().splitlines()]
            for cfg in (one, two)]  # fmt: skip
    assert len(rows[0]) == 21
    for a, b in zip(*rows):
        assert a["response"] == b["response"]
        np.testing.assert_allclose([a["score"], a["kl"]], [b["score"], b["kl"]], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n, micro", [(8, 1), (21, 4), (5, 8), (1, 2)])
def test_share_deals_every_row_and_equal_counts(size, n, micro):
    """Ranks run sharded models in lockstep, so all must have the same number of micro-batches of the same size."""
    lengths = np.random.default_rng(n).integers(1, 50, n)
    dealt = []
    for rank in range(size):
        run = object.__new__(runtime.Run)
        run.rank, run.size = rank, size
        dealt.append(run.share(lengths, micro))
    assert len({tuple(len(index) for index in mine) for mine in dealt}) == 1
    rows = np.concatenate([index for mine in dealt for index in mine])
    assert set(rows) == set(range(n)) and len(rows) == -(-n // size) * size
    for mine in dealt:
        ordered = lengths[np.concatenate(mine)[: n // size]]
        assert (np.diff(ordered) <= 0).all()  # longest first
