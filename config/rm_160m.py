# python rm.py config/rm_160m.py
# 92,858 pairs / 64 = 1,450 updates; 64 pairs = 1 GPU x 4 micro-batches of 16
# The rate is that of a published reward model of this size (mnoukhov's); the paper's 3e-6 is for 1b and larger.
model = "out/sft_160m/final"
out_dir = "out/rm_160m"
lr = 1e-5
batch_size = 64
micro_batch_size = 16
save_every = 200
