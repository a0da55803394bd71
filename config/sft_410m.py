# python sft.py config/sft_410m.py
# 116,722 posts / 128 = 911 updates; 128 rows = 1 GPU x 8 micro-batches of 16
# The rate is that of arXiv:2410.18252's models of this size; the paper's 3e-6 is for 1b and larger.
model = "EleutherAI/pythia-410m-deduped"
out_dir = "out/sft_410m"
lr = 1e-5
batch_size = 128
micro_batch_size = 16
save_every = 200
