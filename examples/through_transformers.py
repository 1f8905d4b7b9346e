"""transformers' own from_pretrained, pipelines and save_pretrained around quantized layers.

python examples/through_transformers.py FLOAT_MODEL [OUT]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import qzo

path, out = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "quantized"
config = qzo.QZOConfig(bits=4, group_size=64)
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
tokenizer = AutoTokenizer.from_pretrained(path)
print(sum(isinstance(module, qzo.QZOLinear) for module in model.modules()), "layers of 4 bits")

model.save_pretrained(out)  # compressed-tensors, which vLLM reads
tokenizer.save_pretrained(out)
with qzo.loading():  # inside, transformers loads 4-bit folders with QZOLinear
    writer = pipeline("text-generation", model=out, tokenizer=out)
print(writer("Headline : red", max_new_tokens=3, do_sample=False)[0]["generated_text"])
