# python ppo.py lab/config/toy_ppo.py
import os

_out = os.environ.get("TOY_OUT", "out/lab-toy-1")
model = f"{_out}/sft/final"
reward_model = f"{_out}/rm/final"
data = _out + "/data/sft_{split}.jsonl"
out_dir = f"{_out}/ppo"
seed = 1
episodes = 36 * 64
batch_size = 64
micro_batch_size = 64
response_length = 24
lr = 3e-4
adam_eps = 1e-8
