#!/usr/bin/env bash
# trl 1.12.0 (transformers 5.24.0): the losses "aot" and "aot_unpaired" of DPOTrainer sort the log-ratios of one
# micro-batch on one device. With gradient accumulation the same batch gives another loss and another gradient, and with
# per_device_train_batch_size=1 "aot" is DPO's sigmoid loss to the last digit, without a word.
#
# Documented: with gradient accumulation a batch is split for its memory; of "aot", that it sorts over the batch
# (arXiv:2406.05882: quantiles of the chosen responses against quantiles of the rejected ones).
# Seen: loss / norm of the gradient of the same 8 pairs, in micro-batches of 8, 4, 2 and 1:
#     sigmoid 0.344/3.53 0.344/3.53 0.344/3.53 0.344/3.53
#     aot 0.061/0.99 0.079/1.22 0.344/3.53 0.344/3.53
# Whoever trains a large model, with one or two pairs at a time, has chosen another loss than the one that is named.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0 trl==1.12.0 transformers==5.24.0 tokenizers==0.23.3 \
    datasets==5.2.0 accelerate==1.15.0

cat > aot.py <<'PYTHON'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

WORDS = ["<end>", "a", "b", "c", "d", "e", "f", "g", "h"]
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="<end>")
rows = [{"prompt": "a b", "chosen": f" {word} c d", "rejected": f" {word} e"} for word in WORDS[1:]]


def model(seed):
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=9)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, initializer_range=1.0, bos_token_id=0, eos_token_id=0))


def first_step(loss_type, micro_batch):
    config = DPOConfig(
        output_dir="out", loss_type=[loss_type], beta=0.5, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch, max_steps=1, logging_steps=1, learning_rate=0.0, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )
    trainer = DPOTrainer(model=model(1), ref_model=model(2), args=config, train_dataset=Dataset.from_list(rows),
                         processing_class=tokenizer)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    return f"{row['loss']:.3f}/{row['grad_norm']:.2f}"


for loss_type in ("sigmoid", "aot"):
    print(loss_type, *[first_step(loss_type, micro_batch) for micro_batch in (8, 4, 2, 1)])
PYTHON

env/bin/python aot.py 2> warnings | grep -v "^{" | tee seen
diff seen - <<'EXPECTED'
sigmoid 0.344/3.53 0.344/3.53 0.344/3.53 0.344/3.53
aot 0.061/0.99 0.079/1.22 0.344/3.53 0.344/3.53
EXPECTED
if grep -qi "aot" warnings; then exit 1; fi
