# python toy/make_data.py out/toy/data --seed=1 && python sft.py config/toy_sft.py
import os

_out = os.environ.get("TOY_OUT", "out/toy")  # toy/demo.py sets it
model = "config/toy_model"  # its initializer_range: with 0.02 words are copied after twice as many updates
scratch = True  # a model of 0.6 million parameters
tokenizer = f"{_out}/data"
data = _out + "/data/sft_{split}.jsonl"
out_dir = f"{_out}/sft"
seed = 1
loss_on = "response"  # with the query in the loss it takes twice as long until words are copied
episodes = 400 * 16
batch_size = 16
micro_batch_size = 16
eval_every = 100
lr = 4e-3
adam_eps = 1e-8
warmup_steps = 30
shard_size = 1  # each process has a whole model
