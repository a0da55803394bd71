# python rm.py config/rm_410m.py
# 92,858 pairs / 64 = 1,450 updates; 64 pairs = 1 GPU x 8 micro-batches of 8
# The rate is that of arXiv:2410.18252's models of this size; the paper's 3e-6 is for 1b and larger.
model = "out/sft_410m/final"
out_dir = "out/rm_410m"
lr = 1e-5
batch_size = 64
micro_batch_size = 8
save_every = 200
