# python sample.py config/tldr_sample_sample.py --model=out/tldr_sample/ppo/final --out_dir=out/tldr_sample/ppo/samples
import os

_data = os.environ.get("NPLUS_DATA", "../shared/data")  # pythia_tokenizer.json and tldr_sample/
data = _data + "/tldr_sample/sft_{split}.jsonl"
reward_model = "out/tldr_sample/rm/final"
reference = "out/tldr_sample/sft/final"
micro_batch_size = 16
split = "validation[:64]"
