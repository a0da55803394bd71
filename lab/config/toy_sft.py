# python toy/make_data.py out/lab-toy-1/data --seed=1 && python sft.py lab/config/toy_sft.py
import os

_out = os.environ.get("TOY_OUT", "out/lab-toy-1")
model = "lab/config/toy_model"
scratch = True  # a model of 1.0 million parameters
tokenizer = f"{_out}/data"
data = _out + "/data/sft_{split}.jsonl"
out_dir = f"{_out}/sft"
seed = 1
loss_on = "response"  # with the query in the loss it takes twice as long until words are copied
episodes = 500 * 32
batch_size = 32
micro_batch_size = 32
eval_every = 100
lr = 2e-3
adam_eps = 1e-8
warmup_steps = 30
