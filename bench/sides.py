"""The two sides that bench.py compares, each a process of its own: `python bench/sides.py SPEC.json`, from there.

A side does one unit of work (a batch of responses, or an update with all that belongs to it) for each line on its
standard input, and answers with a line of JSON. Between them it waits, and its threads sleep.

The trainers of the peer are held at their callbacks, ours behind the last optimizer step of an update: both do what
they do for a user.
"""

import gc
import importlib
import itertools
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

    def __init__(self, device):
        self.on_gpu = device == "cuda"
        self.answers = sys.stdout
        sys.stdout = sys.stderr  # whatever else prints must not look like an answer

    def wait(self):
        if not sys.stdin.readline():
            os._exit(0)
        gc.collect()
        self.began = time.perf_counter()

    def answer(self, **facts):
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated()
        print(json.dumps({"seconds": seconds, "peak": peak, **facts}), file=self.answers, flush=True)


# ---------------------------------------------------------------------------- ours


def ours_generate(spec, gate):
    from data import pad_right, uniforms
    from model import GPTNeoX, generate

    device = spec["device"]
    model = GPTNeoX.from_pretrained(spec["policy"], dtype=getattr(torch, spec["dtype"])).to(device)
    model.requires_grad_(False)
    ids, lengths = pad_right([row["query"] for row in spec["rows"]])
    ids = ids.to(device)
    lengths = lengths.to(device)
    for step in itertools.count():
        is_greedy = step == 0
        temperature = 0 if is_greedy else 0.7
        draws = uniforms((len(ids), spec["new_tokens"]), spec["seed"], step).to(device)
        gate.wait()
        responses = generate(model, ids, lengths, spec["new_tokens"], temperature, draws, None, spec["n_vocab"])
        gate.answer(tokens=responses.tolist() if is_greedy else None)


def ours_train(spec, gate):
    from distributed.optimizer import AdamW

    stage = importlib.import_module("variants.rloo" if spec["side"] == "rloo" else spec["what"])
    cfg = stage.Config(**our_values(spec))
    steps_of_an_update = getattr(cfg, "n_epochs", 1) * getattr(cfg, "n_minibatches", 1)
    numbers = itertools.count(1)

    def after_step():
        if next(numbers) % steps_of_an_update == 0:
            gate.answer()
            gate.wait()

    AdamW.watchers = (after_step,)
    gate.wait()  # the first unit is with all that is loaded before
    stage.main(cfg)


def our_values(spec):
    """The fields of our configuration."""
    n = len(spec["rows"])
    values = dict(
        model=spec["policy"], data=spec["data"], train_split=spec["split"], eval_split="", out_dir=spec["out_dir"],
        seed=spec["seed"], batch_size=n, episodes=10**6 // n * n, micro_batch_size=spec["micro_batch_size"],
        device=spec["device"], dtype=spec["dtype"], schedule="constant", max_length=0,
    )  # fmt: skip
    if spec["what"] == "rm":
        values["normalize_data"] = ""
    if spec["what"] == "ppo":
        values.update(
            reward_model=spec["reward"], response_length=spec["new_tokens"], n_epochs=spec["epochs"],
            rollout_micro_batch_size=spec["rollout_micro_batch_size"], samples_every=0,
        )  # fmt: skip
    return {**values, **spec["options"]}


# ---------------------------------------------------------------------------- the peers


def peer_model(spec, dtype=None):
    """A language model of transformers from the same weights: sdpa, and no cache of keys and values when it trains."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, dtype or spec["weights"])
    return AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=dtype, attn_implementation="sdpa")


def peer_scalar_model(spec):
    """A model of transformers with a scalar head, all of it from our reward model."""
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    options = {"dtype": getattr(torch, spec["weights"]), "attn_implementation": "sdpa", "num_labels": 1}
    model = AutoModelForSequenceClassification.from_pretrained(spec["policy"], **options)
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
    model = peer_model(spec, spec["dtype"]).to(spec["device"]).eval().requires_grad_(False)
    queries = [row["query"] for row in spec["rows"]]
    width = max(map(len, queries))
    ids = [[spec["pad_id"]] * (width - len(query)) + query for query in queries]
    ids = torch.tensor(ids, device=spec["device"])
    is_query = ids != spec["pad_id"]
    ids = ids.where(is_query, 0)
    options = {
        "attention_mask": is_query,
        "max_new_tokens": spec["new_tokens"],
        "min_new_tokens": None,
        "pad_token_id": 0,
        "eos_token_id": None,
        "cache_implementation": spec["cache"],
    }
    # Ours leaves out the unused ids by a slice; the peer needs a filter for it, without which it is timed.
    greedy = {"do_sample": False, "suppress_tokens": spec["unused"]}
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(spec["seed"])
    for step in itertools.count():
        is_greedy = step == 0
        how = greedy if is_greedy else sampled
        gate.wait()
        with torch.inference_mode():
            responses = model.generate(ids, **options, **how)[:, width:]
        gate.answer(tokens=responses.tolist() if is_greedy else None)


def trl_train(spec, gate):
    """A trainer of trl. `Held` stops it after each update; what it logs then goes with the next answer."""
    import transformers

    class Held(transformers.TrainerCallback):
        facts = {}

        def on_train_begin(self, args, state, control, **_):
            gate.wait()

        def on_step_end(self, args, state, control, **_):
            gate.answer(**self.facts)
            gate.wait()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                self.facts = {"loss": logs["loss"]}

    trainers = {"sft": trl_sft, "rm": trl_rm, "dpo": trl_dpo, "ppo": trl_ppo}
    trainers[spec["what"]](spec, Held()).train()


def peer_values(spec, **own):
    """What all trainers of trl are told, what one of them is, and what the command line says."""
    n = len(spec["rows"])
    micro = spec["micro_batch_size"] or n
    return {
        "output_dir": spec["out_dir"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": n // micro,
        "learning_rate": 3e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": spec["seed"],
        "bf16": spec["autocast"],
        "use_cpu": spec["device"] == "cpu",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10**9 if spec["what"] == "ppo" else 1,
        **own,
        **spec["options"],
    }


def trl_sft(spec, held):
    import trl

    rows = []
    for row in spec["rows"]:
        ids = row["query"] + row["responses"][0]
        rows.append({"input_ids": ids, "labels": ids})
    config = trl.SFTConfig(**peer_values(spec, max_steps=10**6, max_length=None))
    return ready(trl.SFTTrainer, spec, held, peer_model(spec), config, rows)


def trl_rm(spec, held):
    import trl

    rows = []
    for row in spec["rows"]:
        chosen, rejected = row["responses"]
        rows.append({"chosen_ids": row["query"] + chosen, "rejected_ids": row["query"] + rejected})
    config = trl.RewardConfig(**peer_values(spec, max_steps=10**6, max_length=None))
    return ready(trl.RewardTrainer, spec, held, peer_scalar_model(spec), config, rows)


def trl_dpo(spec, held):
    import trl

    rows = []
    for row in spec["rows"]:
        chosen, rejected = row["responses"]
        rows.append({"prompt_ids": row["query"], "chosen_ids": chosen, "rejected_ids": rejected})
    own = {"max_steps": 10**6, "max_length": None, "precompute_ref_log_probs": True, "beta": 0.05}
    config = trl.DPOConfig(**peer_values(spec, **own))
    return ready(trl.DPOTrainer, spec, held, peer_model(spec), config, rows, ref_model=peer_model(spec))


def ready(trainer, spec, held, model, config, rows, **options):
    """A trainer of trl that takes the rows as they are: their ids are there."""
    import datasets

    class Ready(trainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    data = datasets.Dataset.from_list(rows)
    options.update(processing_class=peer_tokenizer(spec, "right"), callbacks=[held])
    return Ready(model, args=config, train_dataset=data, **options)


def trl_ppo(spec, held):
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    n = len(spec["rows"])
    own = {
        "num_ppo_epochs": spec["epochs"],
        "num_mini_batches": 1,
        "total_episodes": 10**6 // n * n,
        "local_rollout_forward_batch_size": spec["rollout_micro_batch_size"],
        "num_sample_generations": 0,
        "response_length": spec["new_tokens"],
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
    }
    config = PPOConfig(**peer_values(spec, **own))
    return PPOTrainer(
        config,
        model=peer_model(spec),
        ref_model=peer_model(spec),
        reward_model=peer_scalar_model(spec),
        value_model=peer_scalar_model(spec),
        train_dataset=datasets.Dataset.from_list([{"input_ids": row["query"]} for row in spec["rows"]]),
        processing_class=peer_tokenizer(spec, "left"),
        callbacks=[held],
    )


SIDES = {
    ("ours", "generate"): ours_generate,
    ("hf", "generate"): hf_generate,
    ("ours", "train"): ours_train,
    ("rloo", "train"): ours_train,
    ("trl", "train"): trl_train,
}


def main(path):
    spec = json.loads(Path(path).read_text())
    kind = "generate" if spec["what"] == "generate" else "train"
    SIDES[spec["side"], kind](spec, Gate(spec["device"]))


if __name__ == "__main__":
    main(sys.argv[1])
