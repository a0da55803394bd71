# python rm.py config/toy_rm.py
import os

_out = os.environ.get("TOY_OUT", "out/toy")
model = f"{_out}/sft/final"
data = _out + "/data/comparisons_{split}.jsonl"
normalize_data = _out + "/data/sft_{split}.jsonl"
out_dir = f"{_out}/rm"
seed = 1
episodes = 200 * 48
batch_size = 48
micro_batch_size = 48
lr = 1e-3
adam_eps = 1e-8
warmup_steps = 20
shard_size = 1  # each process has a whole model
