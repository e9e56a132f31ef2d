"""One OpenVINO model, measured when asked; runs under an interpreter that has optimum-intel[openvino].

    python openvino_worker.py export FOLDER TO GROUP     a model of transformers as OpenVINO's, its weights rounded to 4 bits
    python openvino_worker.py serve FOLDER THREADS PROMPT_TOKENS NEW_TOKENS

`serve` reads "run" or "memory" from each line of standard input and writes JSON: seconds of the prompt and of the tokens after
it, or bytes at most. See vs_openvino.py.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from answering import answer


def main() -> None:
    what, *given = sys.argv[1:]
    if what == "export":
        export(given[0], given[1], int(given[2]))
    else:
        serve(given[0], *(int(n) for n in given[1:]))


def export(source: str, target: str, group: int) -> None:
    # Slow to import, and the measured process needs none of it.
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    # Codes of 4 bits in every linear, of 8 in the embedding and the head, which is OpenVINO's own default.
    how = OVWeightQuantizationConfig(bits=4, sym=True, group_size=group, ratio=1.0)
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=how)
    model.save_pretrained(target)


def last_only(model: ov.Model) -> None:
    """Let the head multiply the last token alone, as every other engine here does, and OpenVINO GenAI for its users."""
    head = model.get_results()[0].input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    last = ops.slice(head.input_value(0), *(np.array([n]) for n in (-1, -2, -1, 1)))
    head.input(0).replace_source_output(last.output(0))


def serve(folder: str, threads: int, prompt_tokens: int, new_tokens: int) -> None:
    core = ov.Core()
    read = core.read_model(Path(folder) / "openvino_model.xml")
    last_only(read)
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    model = core.compile_model(read, "CPU", options)
    request = model.create_infer_request()
    names = {name for port in model.inputs for name in port.names}
    ids = np.random.default_rng(0).integers(0, 1000, (1, prompt_tokens))

    def forward(some: np.ndarray, before: int) -> int:
        places = np.arange(before, before + some.shape[1])[None]
        given = {
            "input_ids": some, "attention_mask": np.ones((1, before + some.shape[1]), np.int64), "position_ids": places,
            "beam_idx": np.zeros(1, np.int32),
        }  # fmt: skip
        out = request.infer({k: v for k, v in given.items() if k in names}, share_inputs=True, share_outputs=True)
        return int(next(iter(out.values()))[0, -1].argmax())

    def run() -> list[float]:
        request.reset_state()
        started = time.perf_counter()
        token = forward(ids, 0)
        filled = time.perf_counter()
        for i in range(new_tokens):
            token = forward(np.array([[token]]), prompt_tokens + i)
        return [filled - started, time.perf_counter() - filled]

    answer(run)


if __name__ == "__main__":
    main()
