"""`make demo`: all stages in one pair of processes, what it shows, and what a second run leaves alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import configure
from toy import demo

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"vocab_size": 896, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# what the demo's configuration files end with here: few updates of a small model
SHORTER = {
    "sft": "model = '{model}'\nepisodes = 12 * 16\neval_split = 'validation[:16]'",
    "rm": "episodes = 2 * 48\neval_split = 'validation[:16]'\nnormalize_data = ''",
    "ppo": "episodes = 2 * 16\nbatch_size = 16\ncritic_steps = 1",
    "dpo": "episodes = 2 * 64\neval_split = 'validation[:16]'\ntrain_split = 'train[:128]'",
    "sample": "split = 'validation[:20]'",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A directory like config/, with the demo's files made shorter."""
    directory = tmp_path_factory.mktemp("config")
    (directory / "config.json").write_text(json.dumps(SHAPE))
    for stage, lines in SHORTER.items():
        text = (ROOT / "config" / f"toy_{stage}.py").read_text()
        (directory / f"toy_{stage}.py").write_text(text + lines.format(model=directory))
    return directory


def run(out, config):
    command = [sys.executable, "-m", "toy.demo", out, f"--config={config}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_demo_runs_every_stage_and_leaves_finished_ones_alone(config, tmp_path):
    out = tmp_path / "toy"
    output = run(out, config)
    for stage in demo.PARTS:
        assert (out / stage / "final" / "model.safetensors").exists()
        assert f"(log: {out}/{stage}.log)" in output
    # SFT's curve and samples are shown before the reward model begins.
    assert output.index(" |*") < output.index("what SFT writes") < output.index("[2/4]")
    assert len(re.findall(r"^  [123]\..*gold -?[\d.]+$", output, re.MULTILINE)) == 3 * demo.N_SHOWN
    assert "20 held-out posts" in output and re.search(r"\nPPO +-?\d", output)
    n_ranks = min(2, os.cpu_count())
    assert f"12 updates: 1 minibatches x {n_ranks} ranks x {16 // n_ranks} rows" in (out / "sft.log").read_text()

    before = (out / "dpo" / "final" / "model.safetensors").stat().st_mtime_ns
    again = run(out, config)
    assert (out / "dpo" / "final" / "model.safetensors").stat().st_mtime_ns == before
    assert again.split("held-out posts")[1] == output.split("held-out posts")[1]
    assert "final is there already" in (out / "ppo.log").read_text()


def test_demo_stops_where_a_stage_fails(config, tmp_path):
    (tmp_path / "toy_sft.py").write_text((config / "toy_sft.py").read_text() + "\ntrain_split = 'nothing'")
    command = [sys.executable, "-m", "toy.demo", tmp_path / "out", f"--config={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "rm").exists()


def test_chart_draws_means_from_left_to_right():
    assert demo.chart([0.0, 2.0, 4.0, 4.0, 4.0, 4.0], width=3, height=4) == [
        "    4.00 | **",
        "    3.00 |",
        "    2.00 |",
        "    1.00 |*",
    ]
    assert demo.chart([7.0, 7.0], height=2) == ["    8.00 |", "    7.00 |**"]


@pytest.mark.parametrize("stage", demo.PARTS)
def test_the_laboratorys_toy_is_configured_as_the_demos(stage):
    """The same data and models, each in its own directory."""
    places = []
    for directory, out in (("config", "out/toy"), ("lab/config", "out/lab-toy-1")):
        cfg = configure(demo.PARTS[stage].script.Config, [str(ROOT / directory / f"toy_{stage}.py")])
        assert cfg.out_dir == f"{out}/{stage}" and cfg.seed == 1
        names = ("model", "reward_model", "data", "normalize_data")
        found = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
        places.append({name: value.removeprefix(out) for name, value in found.items()})
    if stage == "sft":
        assert [place.pop("model") for place in places] == ["config/toy_model", "lab/config/toy_model"]
    assert places[0] == places[1]
