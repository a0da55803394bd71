# python rm.py config/tldr_sample_rm.py
import os

_data = os.environ.get("NPLUS_DATA", "../shared/data")  # pythia_tokenizer.json and tldr_sample/
model = "out/tldr_sample/sft/final"
data = _data + "/tldr_sample/comparisons_{split}.jsonl"
normalize_data = _data + "/tldr_sample/sft_validation.jsonl"  # a seventh of the rows; the paper takes those of training
out_dir = "out/tldr_sample/rm"
episodes = 8 * 700
batch_size = 16
micro_batch_size = 4
lr = 5e-4
adam_eps = 1e-8
warmup_steps = 10
