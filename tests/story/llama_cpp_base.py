"""Runs llama.cpp's converter of whole models, in the folder that the first argument names, on the bundled base.

The converter knows pre-tokenizers by a hash that a new tokenizer is not in. The bundled base's one is GPT-2's.
"""

import runpy
import sys

folder = sys.argv.pop(1)
sys.path.insert(0, folder)

from conversion.base import TextModel  # noqa: E402
from conversion.llama import LlamaModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
LlamaModel.set_vocab = TextModel._set_vocab_gpt2
runpy.run_path(f"{folder}/convert_hf_to_gguf.py", run_name="__main__")
