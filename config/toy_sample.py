# python sample.py config/toy_sample.py --model=out/toy/ppo/final --out_dir=out/toy/ppo/samples
import os

_out = os.environ.get("TOY_OUT", "out/toy")
model = f"{_out}/ppo/final"
reward_model = f"{_out}/rm/final"
reference = f"{_out}/sft/final"
data = _out + "/data/sft_{split}.jsonl"
seed = 1
response_length = 24
shard_size = 1  # each process has a whole model
