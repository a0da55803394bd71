"""The two sides that bench.py compares, each a process of its own: `python bench/sides.py SPEC.json`, from there.

A side does one unit of work (a batch of responses, or an update with all that belongs to it) for each line on its
standard input, and answers with a line of JSON. Between them it waits, and its threads sleep.

The trainers of the peer are held at their callbacks, ours at `Run.train`: both do what they do for a user.
"""

import gc
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Gate:
    """Lets one unit of work through for each line of standard input."""

    def __init__(self, spec):
        self.answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not look like an answer
        self.cuda, self.facts = spec["device"] == "cuda", {}

    def wait(self):
        if not sys.stdin.readline():
            os._exit(0)
        gc.collect()
        self.began = time.perf_counter()

    def answer(self, **facts):
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if self.cuda else peak
        print(json.dumps(dict(seconds=seconds, peak=peak, **self.facts, **facts)), file=self.answers, flush=True)


# ---------------------------------------------------------------------------- ours


def ours_generate(spec, gate):
    from data import pad_right, uniforms
    from model import GPTNeoX, generate

    model = GPTNeoX.from_pretrained(spec["policy"], dtype=getattr(torch, spec["dtype"])).to(spec["device"])
    model.requires_grad_(False)
    ids, lengths = (x.to(spec["device"]) for x in pad_right([row["query"] for row in spec["rows"]]))
    for step in range(10**9):
        greedy = step == 0
        draws = uniforms((len(ids), spec["new_tokens"]), 1, step).to(spec["device"])
        gate.wait()
        out = generate(model, ids, lengths, spec["new_tokens"], 0 if greedy else 0.7, draws, None, spec["n_vocab"])
        gate.answer(tokens=out.tolist() if greedy else None)


def ours_train(spec, gate):
    import datasets

    import runtime

    what, n = spec["what"], len(spec["rows"])
    stage = importlib.import_module(what)
    columns = [dict(batch="", confidence=0, policies="", target=1.0, **row) for row in spec["rows"]]
    rows = datasets.Dataset.from_list(columns)
    runtime.load_rows = lambda *_, **__: rows  # both sides get the same ids

    def train(run, *args, **kwargs):
        updates = original(run, *args, **kwargs)
        gate.wait()
        for step in updates:
            yield step
            gate.answer()
            gate.wait()

    def log(run, metrics, watch=()):
        gate.facts = {"loss": next(x for name, x in metrics.items() if name.startswith("loss/"))}
        original_log(run, metrics, watch)

    original, runtime.Run.train = runtime.Run.train, train
    original_log, runtime.Run.log = runtime.Run.log, log
    values = dict(model=spec["policy"], data="(the same ids)", eval_split="", out_dir=spec["out_dir"], batch_size=n,
                  episodes=10**6 // n * n, micro_batch_size=spec["micro_batch_size"], device=spec["device"],
                  dtype=spec["dtype"], schedule="constant", max_length=0)  # fmt: skip
    if what == "rm":  # the peer's head too, not one drawn anew
        load = runtime.load_model
        runtime.load_model = lambda run, cls, *_, **__: load(run, cls, spec["reward"], trainable=True)
        values |= dict(normalize_data="")
    if what == "ppo":
        values |= dict(reward_model=spec["reward"], response_length=spec["new_tokens"], n_epochs=spec["epochs"],
                       rollout_micro_batch_size=spec["rollout_micro_batch_size"], samples_every=0)  # fmt: skip
    values |= spec["options"]
    stage.main(stage.Config(**values))


# ---------------------------------------------------------------------------- the peers


def peer_model(spec, scalar=False, dtype=None):
    """A model of transformers from the same weights: sdpa, and no cache of keys and values when it trains."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options = dict(dtype=getattr(torch, dtype or spec["weights"]), attn_implementation="sdpa")
    if not scalar:
        return AutoModelForCausalLM.from_pretrained(spec["policy"], **options)
    model = AutoModelForSequenceClassification.from_pretrained(spec["policy"], num_labels=1, **options)
    weights = load_file(f"{spec['reward']}/model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.config.pad_token_id = spec["pad_id"]
    return model


def peer_tokenizer(spec, side):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{spec['policy']}/tokenizer.json", eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    tokenizer.padding_side = side
    return tokenizer


def hf_generate(spec, gate):
    model = peer_model(spec, dtype=spec["dtype"]).to(spec["device"]).eval().requires_grad_(False)
    width = max(len(row["query"]) for row in spec["rows"])
    ids = [[spec["pad_id"]] * (width - len(row["query"])) + row["query"] for row in spec["rows"]]
    ids = torch.tensor(ids, device=spec["device"])
    options = dict(attention_mask=ids != spec["pad_id"], max_new_tokens=spec["new_tokens"], pad_token_id=0,
                   min_new_tokens=None, eos_token_id=None, suppress_tokens=spec["unused"],
                   cache_implementation=spec["cache"])  # fmt: skip
    torch.manual_seed(1)
    for step in range(10**9):
        how = dict(do_sample=False) if step == 0 else dict(do_sample=True, temperature=0.7, top_k=0, top_p=1.0)
        if step:
            options.pop("suppress_tokens", None)  # a filter that our side does by a slice, and the timed peer without
        gate.wait()
        with torch.inference_mode():
            out = model.generate(ids.masked_fill(ids == spec["pad_id"], 0), **options, **how)
        gate.answer(tokens=out[:, width:].tolist() if step == 0 else None)


def trl_train(spec, gate):
    import datasets
    import transformers
    import trl

    class Held(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            gate.wait()

        def on_step_end(self, args, state, control, **_):
            gate.answer()
            gate.wait()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                gate.facts = {"loss": logs["loss"]}

    what, n, rows = spec["what"], len(spec["rows"]), spec["rows"]
    micro = spec["micro_batch_size"] or n
    values = dict(output_dir=spec["out_dir"], per_device_train_batch_size=micro, gradient_accumulation_steps=n // micro,
                  report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=spec["device"] == "cpu",
                  bf16=spec["autocast"], gradient_checkpointing=False, learning_rate=3e-6, seed=1,
                  lr_scheduler_type="constant", dataloader_pin_memory=False, max_grad_norm=0.0,
                  remove_unused_columns=False)  # fmt: skip
    values |= dict(logging_steps=10**9 if what == "ppo" else 1, **spec["options"])
    options = dict(processing_class=peer_tokenizer(spec, "left" if what == "ppo" else "right"), callbacks=[Held()])
    if what == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        data = datasets.Dataset.from_list([{"input_ids": row["query"]} for row in rows])
        args = PPOConfig(num_ppo_epochs=spec["epochs"], num_mini_batches=1, total_episodes=10**6 // n * n,
                         local_rollout_forward_batch_size=spec["rollout_micro_batch_size"], num_sample_generations=0,
                         response_length=spec["new_tokens"], stop_token="eos", missing_eos_penalty=1.0,
                         **values)  # fmt: skip
        scalars = [peer_model(spec, scalar=True) for _ in range(2)]
        return PPOTrainer(args, model=peer_model(spec), ref_model=peer_model(spec), reward_model=scalars[0],
                          value_model=scalars[1], train_dataset=data, **options).train()  # fmt: skip
    values |= dict(max_steps=10**6, max_length=None)
    if what == "sft":
        columns = [{name: row["query"] + row["responses"][0] for name in ("input_ids", "labels")} for row in rows]
        config, trainer = trl.SFTConfig, trl.SFTTrainer
    elif what == "dpo":
        names, config, trainer = ("prompt_ids", "chosen_ids", "rejected_ids"), trl.DPOConfig, trl.DPOTrainer
        columns = [dict(zip(names, (row["query"], *row["responses"]))) for row in rows]
        values |= dict(precompute_ref_log_probs=True, beta=0.05)
        options |= dict(ref_model=peer_model(spec))
    else:
        names, config, trainer = ("chosen_ids", "rejected_ids"), trl.RewardConfig, trl.RewardTrainer
        columns = [dict(zip(names, [row["query"] + response for response in row["responses"]])) for row in rows]
    ready = {"_prepare_dataset": lambda self, dataset, *_, **__: dataset}  # the ids are there
    model, data = peer_model(spec, scalar=what == "rm"), datasets.Dataset.from_list(columns)
    type("Ready", (trainer,), ready)(model, args=config(**values), train_dataset=data, **options).train()


def main(path):
    spec = json.loads(Path(path).read_text())
    gate = Gate(spec)
    kind = "generate" if spec["what"] == "generate" else "train"
    globals()[f"{spec['side']}_{kind}"](spec, gate)


if __name__ == "__main__":
    main(sys.argv[1])
