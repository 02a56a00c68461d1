"""Runs in llama.cpp's environment: greedy answers of one loaded model under several adapters, prompt by prompt.

stdin: {"base": file, "adapters": [file or null], "prompts": [[id]], "tokens": int, "ends": [id], "cache": name}.
stdout: token ids `[adapter][prompt]`. All adapters lie in the same context, and take turns at every prompt.
"""

import ctypes
import json
import sys

import llama_cpp


def main() -> None:
    task = json.load(sys.stdin)
    kind = {"float32": llama_cpp.GGML_TYPE_F32, "float16": llama_cpp.GGML_TYPE_F16}[task["cache"]]
    model = llama_cpp.Llama(
        task["base"], n_ctx=512, n_threads=1, n_threads_batch=1, type_k=kind, type_v=kind, verbose=False
    )
    adapters = [
        [] if file is None else [llama_cpp.llama_adapter_lora_init(model.model, file.encode())]
        for file in task["adapters"]
    ]
    assert [None] not in adapters, "llama.cpp rejects an adapter"
    answers: list[list[list[int]]] = [[] for _ in adapters]
    for prompt in task["prompts"]:
        for adapter, of_adapter in zip(adapters, answers, strict=True):
            count = len(adapter)
            handles = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*adapter)
            rc = llama_cpp.llama_set_adapters_lora(model.ctx, handles, count, (ctypes.c_float * count)(*[1.0] * count))
            assert rc == 0, "the adapter was not set"
            model.reset()
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
            answer: list[int] = []
            for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
                if token in task["ends"] or len(answer) == task["tokens"]:
                    break
                answer.append(token)
            of_adapter.append(answer)
    json.dump(answers, sys.stdout)


main()
