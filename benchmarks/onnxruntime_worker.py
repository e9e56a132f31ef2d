"""One model of ONNX Runtime GenAI, measured when asked; runs under an interpreter that has onnxruntime-genai.

    python onnxruntime_worker.py FOLDER THREADS PROMPT_TOKENS NEW_TOKENS

Reads "run" or "memory" from each line of standard input and writes JSON: seconds of the prompt and of the tokens after it, or
bytes at most. See vs_onnxruntime.py.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime_genai as genai

from answering import answer


def main() -> None:
    folder, (threads, prompt_tokens, new_tokens) = sys.argv[1], (int(n) for n in sys.argv[2:])
    config = genai.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)
    ids = np.random.default_rng(0).integers(0, 1000, prompt_tokens).astype(np.int32)
    length = prompt_tokens + new_tokens + 1

    def run() -> list[float]:
        options = genai.GeneratorParams(model)
        options.set_search_options(do_sample=False, min_length=length, max_length=length)  # no token ends it early
        generator = genai.Generator(model, options)
        started = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()  # chooses a token from the prompt's logits; the next call reads it
        filled = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        return [filled - started, time.perf_counter() - filled]

    answer(run)


if __name__ == "__main__":
    main()
