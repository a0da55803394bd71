# python ppo.py config/tldr_sample_ppo.py
import os

_data = os.environ.get("NPLUS_DATA", "../shared/data")  # pythia_tokenizer.json and tldr_sample/
model = "out/tldr_sample/sft/final"
reward_model = "out/tldr_sample/rm/final"
data = _data + "/tldr_sample/sft_{split}.jsonl"
out_dir = "out/tldr_sample/ppo"
episodes = 32 * 32
batch_size = 32
micro_batch_size = 8
rollout_micro_batch_size = 16
lr = 2e-4
