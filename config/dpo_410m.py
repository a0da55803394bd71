# python dpo.py config/dpo_410m.py
# 92,858 pairs / 64 = 1,450 updates; 64 pairs = 1 GPU x 8 micro-batches of 8
# All numbers are the paper's for 1b: no source has offline DPO on these labels at this size.
model = "out/sft_410m/final"
out_dir = "out/dpo_410m"
batch_size = 64
micro_batch_size = 8
beta = 0.05
save_every = 200
