# python dpo.py config/toy_dpo.py
import os

_out = os.environ.get("TOY_OUT", "out/toy")
model = f"{_out}/sft/final"
data = _out + "/data/comparisons_{split}.jsonl"
out_dir = f"{_out}/dpo"
seed = 1
batch_size = 64
micro_batch_size = 64
episodes = 100 * 64
beta = 0.15
lr = 4e-4
adam_eps = 1e-8
warmup_steps = 20
shard_size = 1  # each process has a whole model
