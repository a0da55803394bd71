# python sample.py lab/config/toy_sample.py --model=out/lab-toy-1/ppo/final --out_dir=out/lab-toy-1/ppo/samples
import os

_out = os.environ.get("TOY_OUT", "out/lab-toy-1")
model = f"{_out}/ppo/final"
reward_model = f"{_out}/rm/final"
reference = f"{_out}/sft/final"
data = _out + "/data/sft_{split}.jsonl"
seed = 1
response_length = 24
