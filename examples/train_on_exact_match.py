"""Exact match of generated text: a reply counts if it is the answer to the letter, and no slope leads there.

python examples/train_on_exact_match.py MODEL
"""

import sys

import qzo

model, tokenizer = qzo.from_pretrained(sys.argv[1]), qzo.load_tokenizer(sys.argv[1])
answers = {"fire": "warm", "water": "cold", "red": "warm", "blue": "cold", "leaf": "green", "sky": "blue"}
prompts = [f"Headline : {word} Topic :" for word in answers]
directions = 16  # many, and a large eps: a metric that ties often needs both
optimizer = qzo.QZO(model, lr=0.4, eps=0.2, directions=directions)


def matches(replies):
    """Of each reply, whether it is the answer."""
    return [reply.strip() == answer for reply, answer in zip(replies, answers.values(), strict=True)]


def replies(evaluations):
    """Every prompt's reply under each evaluation."""
    return qzo.generate_texts(model, tokenizer, prompts, evaluations, max_new_tokens=1)


def loss():
    """The share of exact matches under each evaluation, negative: float32 [32]."""
    return qzo.objective(matches, replies(2 * directions), 2 * directions, maximize=True)


before = sum(matches(replies(1)))
for step in range(40):
    share = -optimizer.step(loss)
    if step % 10 == 0:
        print(f"step {step}: {share:.1%} match under the perturbations")
print(f"exact matches: {before} of {len(prompts)} -> {sum(matches(replies(1)))} of {len(prompts)}")
