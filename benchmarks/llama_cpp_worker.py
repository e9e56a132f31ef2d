"""One llama.cpp model, measured when asked; runs under an interpreter that has llama-cpp-python.

    python llama_cpp_worker.py quantize FROM TO     F16 to Q4_0
    python llama_cpp_worker.py serve FILE THREADS PROMPT_TOKENS NEW_TOKENS

`serve` reads "run" or "memory" from each line of standard input and writes JSON: seconds of the prompt and of the tokens after
it, or bytes at most. See vs_llama_cpp.py.
"""

from __future__ import annotations

import random
import sys
import time

import llama_cpp as cpp

from answering import answer


def main() -> None:
    what, *given = sys.argv[1:]
    cpp.llama_backend_init()
    if what == "quantize":
        quantize(*given)
    else:
        serve(given[0], *(int(n) for n in given[1:]))


def quantize(source: str, target: str) -> None:
    options = cpp.llama_model_quantize_default_params()
    options.ftype = cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if cpp.llama_model_quantize(source.encode(), target.encode(), options) != 0:
        raise SystemExit(f"llama.cpp could not quantize {source}")


def serve(file: str, threads: int, prompt_tokens: int, new_tokens: int) -> None:
    model = cpp.llama_model_load_from_file(file.encode(), cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp could not load {file}")
    options = cpp.llama_context_default_params()
    options.n_ctx = prompt_tokens + new_tokens + 1
    options.n_batch = options.n_ubatch = prompt_tokens
    options.n_threads = options.n_threads_batch = threads
    context = cpp.llama_init_from_model(model, options)
    tokens = [random.Random(0).randrange(1000) for _ in range(prompt_tokens)]

    def decode(some: list[int]) -> None:
        batch = (cpp.llama_token * len(some))(*some)
        if cpp.llama_decode(context, cpp.llama_batch_get_one(batch, len(some))) != 0:
            raise SystemExit("llama.cpp could not decode")
        cpp.llama_get_logits(context)  # waits for them

    def run() -> list[float]:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        started = time.perf_counter()
        decode(tokens)
        filled = time.perf_counter()
        for token in tokens[:new_tokens]:
            decode([token])
        return [filled - started, time.perf_counter() - filled]

    answer(run)


if __name__ == "__main__":
    main()
