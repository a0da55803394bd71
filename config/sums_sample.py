# python sample.py config/sums_sample.py --scorer=toy.sums --model=out/sums/grpo/final --out_dir=out/sums/grpo/samples
model = "out/sums/sft/final"
data = "out/sums/data/sft_{split}.jsonl"
response_length = 4
temperature = 1.0
micro_batch_size = 256
