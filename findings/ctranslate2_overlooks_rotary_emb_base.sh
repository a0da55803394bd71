#!/usr/bin/env bash
# ctranslate2 4.8.5: TransformersConverter takes from a GPT-NeoX's config.json how many dimensions rotary embeddings
# turn (rotary_pct), but not by which angles (rotary_emb_base): the converted model always has base 10000. Nothing is
# said; the logits are those of another model.
#
# Documented: the converter supports GPTNeoXForCausalLM; rotary_emb_base is in transformers' GPTNeoXConfig, and the
# converter's own specification has a rotary_base, which it sets for other models.
# Seen, of the logits of random weights:
#     base 10000: equal up to rounding
#     base 500: not equal
#     base 500 read as 10000: equal up to rounding
# Whoever converts a GPT-NeoX with another base, as models of long contexts have it, meets it.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0 transformers==4.57.6 ctranslate2==4.8.5 numpy==2.4.6

cat > convert.py <<'PYTHON'
import ctranslate2
import numpy as np
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models

ids = list(range(2, 34))
letters = {f"t{number}": number for number in range(64)}
tokenizer = Tokenizer(models.WordLevel(letters, unk_token="t0"))
special = dict(bos_token="t0", eos_token="t0", unk_token="t0")
transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained("model")

shape = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)


def logits_of_transformers(base):
    config = transformers.GPTNeoXConfig(**shape, rotary_pct=0.5, rotary_emb_base=base, initializer_range=0.2)
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    model.save_pretrained("model")
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def logits_of_ctranslate2():
    TransformersConverter("model").convert("converted", force=True)
    generator = ctranslate2.Generator("converted", intra_threads=1)
    return np.array(generator.forward_batch([ids]))[0]


def compare(name, ours, theirs):
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    assert difference < 1e-5 or difference > 1e-2
    print(f"{name}:", "equal up to rounding" if difference < 1e-5 else "not equal")


usual = logits_of_transformers(10000)
compare("base 10000", usual, logits_of_ctranslate2())
other = logits_of_transformers(500)
converted = logits_of_ctranslate2()
compare("base 500", other, converted)
compare("base 500 read as 10000", usual, converted)
PYTHON
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 env/bin/python convert.py | tee seen
diff seen - <<'SEEN'
base 10000: equal up to rounding
base 500: not equal
base 500 read as 10000: equal up to rounding
SEEN
