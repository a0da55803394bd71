"""Bad input ends with one line that names the thing and the mend, exit code 1, and an unchanged directory."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from pipeline import ROOT, arguments, write_rows
from safetensors.torch import load_file, save_file

import dpo
import ppo
import rm
import sample
import sft
from configurator import UserError
from variants import dpo_losses, ppo_max

POST = {"subreddit": "pets", "title": "a cat", "post": "it slept.", "summary": "a cat slept"}
PAIR = {
    "info": {key: POST[key] for key in ("subreddit", "title", "post")}, "choice": 0,
    "summaries": [{"text": " a cat", "policy": "x"}, {"text": " a dog", "policy": "y"}],
}  # fmt: skip


@pytest.fixture
def bad(pipeline, tmp_path, monkeypatch):
    """A playground: copies of the data and the models, free to be damaged; changes of the environment are undone."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("data", "sft", "rm"):
        shutil.copytree(pipeline.directory / name, tmp_path / name)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def change(pipeline, bad, stage, **changes):
    cfg = pipeline.config(stage, "new", **changes)
    moved = {key: value.replace(str(pipeline.directory), str(bad))
             for key, value in dataclasses.asdict(cfg).items() if isinstance(value, str)}  # fmt: skip
    return dataclasses.replace(cfg, **moved)


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def old_samples(directory):
    """The results of `sample.py --seed=4`, where this run wants to write its own."""
    (directory / "new").mkdir()
    write_rows(directory / "new/samples.jsonl", [{"query": "a", "response": " b"}])
    (directory / "new/config.json").write_text('{"seed": 4}')


def edit_weights(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def environment(**variables):
    """Set environment variables (the fixture unsets them), with no process group there yet."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.update(variables)


def directory_for(path):
    path.unlink()
    path.mkdir()


def index(directory, names):
    (directory / "model.safetensors.index.json").write_text(json.dumps(names))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


NORM = "gpt_neox.final_layer_norm.weight"
# name: (stage, what is done to the playground (it may return changes of the configuration), the words of the line)
CASES = {
    "no such device": (sft, lambda d: dict(device="tpu"), "'device' is 'tpu'.*cuda"),
    "no such dtype": (sft, lambda d: dict(dtype="float8"), "float8.*float32"),
    "negative seed": (sft, lambda d: dict(seed=-1), "'seed' takes int from 0"),
    "unknown loss_on": (sft, lambda d: dict(loss_on="query"), "loss_on.*'query'.*response"),
    "unknown reduction": (sft, lambda d: dict(reduction="sum"), "reduction.*sequence"),
    "unknown schedule": (sft, lambda d: dict(schedule="cosin"), "'schedule' is 'cosin'.*cosine"),
    "unknown loss_type": (dpo, lambda d: dict(loss_type="hings"), "'loss_type' is 'hings'.*hinge"),
    "smoothing that does nothing": (dpo, lambda d: dict(loss_type="ipo", label_smoothing=0.1), "label_smoothing.*ipo"),
    "smoothing for a variant's loss": (dpo_losses, lambda d: dict(loss_type="ipo_norm", label_smoothing=0.1),
                                       "label_smoothing.*ipo_norm"),
    "batch of 0": (sft, lambda d: dict(batch_size=0), "'batch_size' takes int from 1"),
    "micro-batch of 0": (sft, lambda d: dict(micro_batch_size=0), "'micro_batch_size' takes int from 1"),
    "batch not divisible": (ppo, lambda d: dict(n_minibatches=3), "batch_size must be a multiple of 3"),
    "batch larger than the data": (sft, lambda d: dict(batch_size=64, episodes=0), "60 rows are less than a batch"),
    "out_dir is a file": (sft, lambda d: (d / "new").write_text("") and None, "new.*File exists.*run the same command"),
    "out_dir without a name": (sft, lambda d: dict(out_dir=""), "out_dir is empty"),
    "out_dir is a model's": (sft, lambda d: dict(out_dir=str(d / "sft/final")), "final holds.*choose another out_dir"),
    "missing model": (rm, lambda d: dict(model=str(d / "nowhere")), "nowhere.*no directory .*is that stage done"),
    "missing reward model": (ppo, lambda d: dict(reward_model="no/where"), "no/where"),
    "missing tokenizer": (rm, lambda d: (d / "sft/final/tokenizer.json").unlink(), "tokenizer.json"),
    "truncated tokenizer": (rm, lambda d: truncate(d / "sft/final/tokenizer.json"), "tokenizer.json.*JSON"),
    "tokenizer of another kind": (rm, lambda d: edit_json(d / "sft/final/tokenizer.json", model={"type": "Unigram"}),
                                  "tokenizer.json.*byte-level BPE"),
    "missing config.json": (rm, lambda d: (d / "sft/final/config.json").unlink(), "config.json"),
    "config.json of another model": (rm, lambda d: edit_json(d / "sft/final/config.json", model_type="llama"), "llama"),
    "heads that do not divide": (rm, lambda d: edit_json(d / "sft/final/config.json", num_attention_heads=5),
                                 "do not fit together .*num_attention_heads=5"),
    "width as text": (rm, lambda d: edit_json(d / "sft/final/config.json", hidden_size="32"),
                      "config.json: 'hidden_size'.*int.*str"),
    "shape unlike config.json": (rm, lambda d: edit_json(d / "sft/final/config.json", hidden_size=64), r"\(.*64"),
    "missing weights": (rm, lambda d: (d / "sft/final/model.safetensors").unlink(), "model.safetensors"),
    "truncated weights": (rm, lambda d: truncate(d / "sft/final/model.safetensors"), "model.safetensors"),
    "garbage weights": (rm, lambda d: (d / "sft/final/model.safetensors").write_bytes(b"x" * 1000) and None,
                        "model.safetensors"),
    "missing tensor": (dpo, lambda d: edit_weights(d / "sft/final", drop(NORM)), f"missing {NORM}"),
    "extra tensor": (dpo, lambda d: edit_weights(d / "sft/final", put("extra", torch.ones(1))), "unexpected extra"),
    "mis-shaped tensor": (dpo, lambda d: edit_weights(d / "sft/final", put(NORM, torch.ones(31))), f"{NORM}.*31"),
    "integer tensor": (dpo, lambda d: edit_weights(d / "sft/final", put(NORM, torch.ones(32, dtype=torch.int32))),
                       f"{NORM}.*I32"),
    "NaN tensor": (dpo, lambda d: edit_weights(d / "sft/final", put(NORM, torch.full((32,), float("nan")))),
                   f"{NORM} is not finite"),
    "reward model as a policy": (ppo, lambda d: dict(model=str(d / "rm/final")), "missing embed_out.weight"),
    "policy as a reward model": (ppo, lambda d: dict(reward_model=str(d / "sft/final")), "missing score"),
    "missing data": (sft, lambda d: dict(data=str(d / "no_{split}.jsonl")), "no_train.jsonl"),
    "missing split": (sft, lambda d: dict(train_split="trian"), "sft_trian.jsonl"),
    "no rows": (sft, lambda d: dict(data=write_rows(d / "empty.jsonl", [])), "empty.jsonl"),
    "broken json": (sft, lambda d: (d / "data/sft_train.jsonl").write_text('{"post": ') and None, "sft_train.jsonl"),
    "unknown columns": (sft, lambda d: dict(data=write_rows(d / "x.jsonl", [{"body": "a"}])),
                        "columns with a value .body. fit no schema"),
    "no summary": (sft, lambda d: dict(data=write_rows(d / "x.jsonl", [{**POST, "summary": None}] * 8)),
                   "line 1.*'summary' is None"),
    "half a pair": (rm, lambda d: dict(data=write_rows(d / "x.jsonl", [{"prompt": "a", "chosen": " b"}])),
                    "line 1: .* 0 responses come of the columns prompt, chosen, but a query and 2"),
    "posts instead of pairs": (rm, lambda d: dict(data=str(d / "data/sft_{split}.jsonl")),
                               "line 1: .* 1 responses come of the columns .*, but a query and 2"),
    "choice of 2": (rm, lambda d: dict(data=write_rows(d / "x.jsonl", [PAIR, {**PAIR, "choice": 2}])),
                    "line 2.*choice 2"),
    "row too long": (sft, lambda d: dict(max_length=60), "line 1 has .* tokens, more than 60.*--too_long=drop"),
    "all rows too long": (sft, lambda d: dict(max_length=9), "60 such rows of 60"),
    "empty prompt": (ppo, lambda d: dict(data=write_rows(d / "x.jsonl", [{"prompt": ""}])), "line 1: 0 query tokens"),
    "prompt too long": (ppo, lambda d: dict(data=write_rows(d / "x.jsonl", [{"prompt": "a " * 600}])),
                        "more than 512"),
    "chat without a role": (rm, lambda d: dict(data=write_rows(d / "x.jsonl", [
        {"chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}])), "'role'"),
    "longer than the model": (sft, lambda d: dict(data=write_rows(d / "x.jsonl", [{"prompt": "a " * 3000,
        "completion": " b"}] * 8), max_length=0, eval_split=""), "line 1 has 3\\d{3} tokens, more than 2048"),
    "greedy PPO": (ppo, lambda d: dict(temperature=-1.0), "'temperature' takes finite float above 0"),
    "PPO at temperature 0": (ppo, lambda d: dict(temperature=0.0), "'temperature' takes finite float above 0"),
    "PPO without epochs": (ppo, lambda d: dict(n_epochs=0), "'n_epochs' takes int from 1"),
    "PPO in 0 minibatches": (ppo, lambda d: dict(n_minibatches=0), "'n_minibatches' takes int from 1"),
    "PPO without room for queries": (ppo, lambda d: dict(response_length=2048), "response_length: .*no positions left"),
    "PPO without a response": (ppo, lambda d: dict(response_length=0), "'response_length' takes int from 1"),
    "rollout micro-batch of 0": (ppo, lambda d: dict(rollout_micro_batch_size=0),
                                 "'rollout_micro_batch_size' takes int from 1"),
    "no KL horizon": (ppo, lambda d: dict(kl_horizon=0), "'kl_horizon' takes int from 1"),
    "no pull to the reference": (dpo, lambda d: dict(beta=0.0), "'beta' takes finite float above 0"),
    "negative learning rate": (sft, lambda d: dict(lr=-1.0), "'lr' takes finite float from 0"),
    "no decay of the moments": (rm, lambda d: dict(adam_beta2=1.0), "'adam_beta2' takes float from 0 and below 1"),
    "more noise than labels": (rm, lambda d: dict(label_noise=1.5), "'label_noise' takes float from 0 and below 1"),
    "no reward model to normalise": (rm, lambda d: dict(normalize_only=True), "missing score.bias, score.weight"),
    "negative clamp": (rm, lambda d: dict(target_clamp=-0.4), "'target_clamp' takes finite float from 0"),
    "the critic alone to the end": (ppo, lambda d: dict(critic_steps=2), "critic_steps must be below 2"),
    "nothing to adapt": (ppo, lambda d: dict(kl_coef=0.0, kl_target=1.0), "kl_target adapts kl_coef.*above 0"),
    "no such end": (ppo, lambda d: dict(truncate_token=99999), "truncate_token must be below"),
    "no end in time": (ppo, lambda d: dict(truncate_after=10), "truncate_after must be below 10"),
    "pre-training row too long": (ppo_max, lambda d: dict(ptx_coef=0.1, ptx_data=write_rows(d / "x.jsonl", [
        {"prompt": "a", "completion": " b" * 900}])), "x.jsonl .*line 1 has .* tokens, more than 522"),
    "reference too long": (rm, lambda d: dict(normalize_data=write_rows(d / "x.jsonl", [
        {"prompt": "a", "completion": " b" * 900}])), "x.jsonl .*line 1 has .* tokens, more than 638"),
    "rank without a world": (sft, lambda d: environment(RANK="0"), "no process group; .*torchrun.*WORLD_SIZE"),
    "world of no size": (sft, lambda d: environment(RANK="0", WORLD_SIZE="two", MASTER_ADDR="a", MASTER_PORT="1"),
                         "no process group; .*two"),
    "no such port": (sft, lambda d: environment(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="x"),
                     "no process group; .*'x'"),
    "shards that do not divide": (sft, lambda d: dict(shard_size=3), "shard_size 3 does not divide the 1 processes"),
    "no such offload": (sft, lambda d: dict(offload="adam"), "'offload' is 'adam'; use one of none, frozen, all"),
    "no such answer to NaN": (sft, lambda d: dict(on_nonfinite="ignore"), "'on_nonfinite' is 'ignore'; .*stop, skip"),
    "directory for weights": (rm, lambda d: directory_for(d / "sft/final/model.safetensors"),
                              "model.safetensors: cannot be read as safetensors"),
    "directory for a tokenizer": (rm, lambda d: directory_for(d / "sft/final/tokenizer.json"), "tokenizer.json.*JSON"),
    "directory for data": (sft, lambda d: directory_for(d / "data/sft_train.jsonl"),
                           "sft_train.jsonl doesn't contain any data files"),
    "config.json of another kind": (rm, lambda d: (d / "sft/final/config.json").write_text("[1]") and None,
                                    "config.json: holds a list, not a JSON object"),
    "config.json of bytes": (rm, lambda d: (d / "sft/final/config.json").write_bytes(b"\xff\xfe{") and None,
                             "config.json: cannot be read as JSON"),
    "more layers than are stored": (rm, lambda d: edit_json(d / "sft/final/config.json", num_hidden_layers=3),
                                    "missing gpt_neox.layers.2"),
    "fewer layers than are stored": (rm, lambda d: edit_json(d / "sft/final/config.json", num_hidden_layers=1),
                                     "unexpected gpt_neox.layers.1"),
    "index without files": (rm, lambda d: index(d / "sft/final", {"weight_map": {NORM: "gone.safetensors"}}),
                            "missing gpt_neox|gone.safetensors: cannot be read"),
    "index of nothing": (rm, lambda d: index(d / "sft/final", {"weight_map": None}), "index.json: no weight_map"),
    "samples over others": (sample, old_samples, r"new holds a run with another configuration: .*seed \(4 -> "),
    "no training split": (sft, lambda d: dict(train_split="", data=str(d / "data")), "has no split ''"),
    "vocabulary too small": (sft, lambda d: edit_json(d / "data/config.json", vocab_size=300),
                             "vocab_size 300 is less than the tokenizer's"),
    "sample in micro-batches of 0": (sample, lambda d: dict(micro_batch_size=0), "'micro_batch_size' takes int from 1"),
    "samples into a training run": (sample, lambda d: (d / "sft").rename(d / "new") and dict(
        model=str(d / "new/final"), reward_model="", reference=""), "new holds a run with another configuration"),
    "sampling from nothing": (sample, lambda d: dict(model=str(d / "nowhere")), "nowhere"),
    "truncated posts": (sft, lambda d: truncate(d / "data/sft_train.jsonl"),
                        "sft_train.jsonl: line .* is not a JSON object"),
    "data of bytes": (sft, lambda d: (d / "data/sft_train.jsonl").write_bytes(b"\xff\xfe\x00") and None,
                      "sft_train.jsonl: line .* is not a JSON object"),
    "a number for a post": (sft, lambda d: dict(data=write_rows(d / "x.jsonl", [{**POST, "post": 7}] * 8)),
                            "line 1.*'post' is 7"),
    "summaries without a choice": (rm, lambda d: dict(data=write_rows(d / "x.jsonl", [
        {key: value for key, value in PAIR.items() if key != "choice"}])), "line 1.*choice"),
    "a target of 2": (rm, lambda d: dict(data=write_rows(d / "x.jsonl", [
        {"prompt": "a", "chosen": " b", "rejected": " c", "target": 2.0}])), "line 1: target 2.0"),
    "other configuration": (sft, lambda d: (d / "sft").rename(d / "new") and None, "configuration: .*lr .0.005"),
}  # fmt: skip


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(pipeline, bad, case):
    stage, damage, words = CASES[case]
    changes = damage(bad)
    before = contents(bad)
    with pytest.raises(UserError, match=words) as error:
        stage.main(change(pipeline, bad, stage, **(changes if isinstance(changes, dict) else {})))
    assert "\n" not in str(error.value)
    after = contents(bad)
    # a run that gets as far as its directory writes its configuration there, and a lock; nothing else may change
    new = {path for path in after if path not in before}
    assert all(path.is_relative_to(bad / "new") and path.name in ("config.json", "lock") for path in new)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("argument", ["--leraning_rate=1", "--lr=fast", "config/none.py", "lr=3"])
def test_bad_command_line_is_one_line_and_exit_code_1(pipeline, argument):
    """As a user sees it: one line on stderr, no traceback."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "sft.py", *arguments(pipeline.config(sft, "never")), argument]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.strip().split("\n")) == 1
    assert argument.split("=")[0].lstrip("-") in result.stderr
    assert not (pipeline.directory / "never").exists()
