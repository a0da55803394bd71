# python sft.py config/tldr_sample_sft.py        real posts, a Pythia-14m shape from random weights, on a CPU
import os

_data = os.environ.get("NPLUS_DATA", "../shared/data")  # pythia_tokenizer.json and tldr_sample/
model = "config/pythia_14m"
scratch = True
tokenizer = f"{_data}/pythia_tokenizer.json"
data = _data + "/tldr_sample/sft_{split}.jsonl"
out_dir = "out/tldr_sample/sft"
loss_on = "response"  # a tenth of the tokens, and so of the time in the LM head
episodes = 3 * 1362
batch_size = 16
micro_batch_size = 8
eval_every = 85
lr = 1e-3
adam_eps = 1e-8
warmup_steps = 10
