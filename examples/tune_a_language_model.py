"""A transformers model on sentences: load, tune, save in the source's format, and generate with the result.

python examples/tune_a_language_model.py MODEL [OUT]
"""

import sys

import torch

import qzo

path, out = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "tuned"
model, tokenizer = qzo.from_pretrained(path), qzo.load_tokenizer(path)
texts = ["red one : warm", "blue two : cold", "fire three : warm", "water four : cold"]
batch = {name: tensor.to(model.device) for name, tensor in tokenizer(texts, return_tensors="pt").items()}
batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)

directions = 4
optimizer = qzo.QZO(model, lr=8e-2, directions=directions, journal=f"{out}.qzo")


def losses(batch):
    """The loss of each evaluation, float32 [2 x directions]."""
    return qzo.losses(model, batch, 2 * directions)


for step in range(10):
    print(f"step {step}: loss {optimizer.step(losses, batch=batch):.4f}")
optimizer.close()
qzo.save_pretrained(model, out)
prompt = tokenizer(texts[0][:7], return_tensors="pt").to(model.device)
reply = model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=4, do_sample=False)
print(tokenizer.decode(reply[0]))
