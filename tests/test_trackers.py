"""Metrics in a csv file, in TensorBoard and in wandb, after a crash too; how long updates took."""

import csv
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import ROOT, arguments, in_update, metrics, read_rows

import ppo
import sft
from configurator import UserError
from data import load_rows
from distributed.processes import Stopwatch
from hub.tokenizer import Tokenizer

FIVE = dict(episodes=40, save_every=2, eval_every=3)


def read_csv(directory):
    """The rows as metrics.jsonl has them: a cell without a number is no key."""
    rows = []
    with open(directory / "metrics.csv", newline="") as file:
        for cells in csv.DictReader(file):
            rows.append({name: json.loads(cell) for name, cell in cells.items() if cell})
    return rows


def read_tensorboard(directory):
    """TensorBoard's own reader; its numbers are float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    rows = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            row = rows.setdefault(event.step, {"step": event.step})
            assert name not in row, "two numbers of one update"
            row[name] = event.value
    return [rows[step] for step in sorted(rows)]


def read_wandb(directory):
    """The history in wandb's file: protocol buffers in the blocks of a LevelDB log, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        file = path.read_bytes()
        place = 7
        while place < len(file):
            _, length, kind = struct.unpack_from("<IHB", file, place)
            assert kind == 1, "a record that goes on in the next block of 32 kB"
            record = Record.FromString(file[place + 7 : place + 7 + length])
            place += 7 + length
            if record.HasField("history"):
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return rows


READERS = {"csv": read_csv, "tensorboard": read_tensorboard}


def as_float32(rows):
    return [{name: np.float32(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("log_to", READERS)
def test_a_tracker_has_the_rows_of_metrics_after_a_crash_too(pipeline, log_to):
    """The run fails in its fourth update and goes on from its second: no row is missing, none is there twice."""
    cfg = pipeline.config(sft, f"to_{log_to}", log_to=log_to, **FIVE)

    def fail():
        raise ZeroDivisionError

    with in_update(cfg, 3, fail), pytest.raises(ZeroDivisionError):
        sft.main(cfg)
    out_dir = Path(cfg.out_dir)
    assert as_float32(READERS[log_to](out_dir)) == as_float32(metrics(cfg))
    assert len(metrics(cfg)) == 3

    sft.main(cfg)
    rows = metrics(cfg)
    assert [row["step"] for row in rows] == list(range(6))  # the sixth is the evaluation of the trained model
    assert as_float32(READERS[log_to](out_dir)) == as_float32(rows)
    # A csv file has all digits.
    if log_to == "csv":
        assert read_csv(out_dir) == rows


def run_sft(cfg, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "sft.py", *arguments(cfg)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_wandb_without_a_server_keeps_the_rows_on_the_disk(pipeline, tmp_path):
    """No key, so no server will have them: one line says so, and `wandb sync` can send them later."""
    cfg = pipeline.config(sft, "to_wandb", log_to="wandb", **FIVE)
    # a home without a key of the user's
    result = run_sft(cfg, HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"), WANDB_API_KEY="")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("log_to=wandb")]
    assert len(lines) == 1 and "API key" in lines[0] and f"kept in {cfg.out_dir}/wandb," in lines[0]
    assert read_wandb(Path(cfg.out_dir)) == metrics(cfg)


def test_trouble_with_a_tracker_does_not_stop_the_run(pipeline, capsys):
    cfg = pipeline.config(sft, "no_csv", log_to="csv", episodes=16)
    (Path(cfg.out_dir) / "metrics.csv").mkdir(parents=True)
    sft.main(cfg)
    assert len(metrics(cfg)) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("log_to=csv")]
    assert len(lines) == 1 and "Is a directory" in lines[0] and lines[0].endswith("metrics.jsonl has all")


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_a_library_that_is_missing_is_told_before_anything_is_loaded(pipeline, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    cfg = pipeline.config(sft, "no_library", log_to=library)
    with pytest.raises(UserError, match=f"log_to '{library}': pip install {library}"):
        sft.main(cfg)
    assert not Path(cfg.out_dir).exists()


def test_another_tracker_may_go_on(pipeline):
    """log_to changes no number: a resumed run may have another one, which then has all rows from there on."""
    cfg = pipeline.config(sft, "later_csv", **FIVE)

    def fail():
        raise ZeroDivisionError

    with in_update(cfg, 4, fail), pytest.raises(ZeroDivisionError):
        sft.main(cfg)
    sft.main(pipeline.config(sft, "later_csv", log_to="csv", **FIVE))
    assert read_csv(Path(cfg.out_dir)) == metrics(cfg)


# ---------------------------------------------------------------------------- time


def test_timing_counts_the_tokens_of_each_update(pipeline):
    """One row per update, also after a crash; tokens are those of the update's rows."""
    cfg = pipeline.config(sft, "timed", **FIVE)

    def fail():
        raise ZeroDivisionError

    with in_update(cfg, 3, fail), pytest.raises(ZeroDivisionError):
        sft.main(cfg)
    sft.main(cfg)
    timing = read_rows(Path(cfg.out_dir) / "timing.jsonl")
    assert [row["step"] for row in timing] == list(range(5))
    assert [row["time"] for row in timing] == sorted(row["time"] for row in timing)

    rows = load_rows(cfg.data, "train", Tokenizer.load(cfg.model), n_responses=1)
    # 60 rows, 8 of them an update: no row is there twice in five updates
    n_tokens = [row["tokens_per_second"] * row["seconds"] for row in timing]
    assert max(n_tokens) < sum(sorted(rows["length"])[-8:]) + 1e-3
    assert min(n_tokens) > sum(sorted(rows["length"])[:8]) - 1e-3
    for row in timing:
        assert row["episodes_per_second"] * row["seconds"] == pytest.approx(8)


PHASES = ("generation", "scoring", "policy", "critic", "optimizer", "rest")


def test_a_stopwatch_gives_each_phase_its_own_time(monkeypatch):
    """Seconds on a clock that a hand moves: 1 for the rest, then 2, 4 and again 8 for a phase that comes twice."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"))
    now[0] = 50.0
    watch.begin()
    for seconds, name in ((1, "policy"), (2, "critic"), (4, "policy"), (8, "rest")):
        now[0] += seconds
        watch(name)
    assert watch.end() == {"rest": 1.0, "policy": 10.0, "critic": 4.0}


def test_timing_of_ppo_counts_each_pass_with_gradients(pipeline):
    """Queries are 6 tokens or more long here, and responses have at most 10: four epochs are four times as many."""
    n_tokens = {}
    for n_epochs in (1, 4):
        cfg = pipeline.config(ppo, f"epochs_{n_epochs}", n_epochs=n_epochs, episodes=8)
        ppo.main(cfg)
        (row,) = read_rows(Path(cfg.out_dir) / "timing.jsonl")
        n_tokens[n_epochs] = row["tokens_per_second"] * row["seconds"]
        phases = {name: x for name, x in row.items() if name.startswith("seconds/")}
        assert set(phases) == {f"seconds/{name}" for name in PHASES}
        assert sum(phases.values()) == pytest.approx(row["seconds"])
        assert all(phases[f"seconds/{name}"] > 0 for name in PHASES)
    assert n_tokens[4] == pytest.approx(4 * n_tokens[1])
