# python dpo.py config/tldr_sample_dpo.py
import os

_data = os.environ.get("NPLUS_DATA", "../shared/data")  # pythia_tokenizer.json and tldr_sample/
model = "out/tldr_sample/sft/final"
data = _data + "/tldr_sample/comparisons_{split}.jsonl"
out_dir = "out/tldr_sample/dpo"
batch_size = 16
micro_batch_size = 4
lr = 1e-4
