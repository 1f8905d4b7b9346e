"""A reward of what the model writes, here the share of its words that are numbers: no labels, no gradient.

python examples/train_on_a_reward.py MODEL
"""

import sys

import qzo

model, tokenizer = qzo.from_pretrained(sys.argv[1]), qzo.load_tokenizer(sys.argv[1])
prompts = ["Headline : red one", "Headline : sky", "fire up", "cold water : two three"]
numbers = {"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}
directions = 8
optimizer = qzo.QZO(model, lr=0.2, eps=0.1, directions=directions)


def reward(texts):
    """The share of numbers among the words of each text."""
    return [sum(word in numbers for word in text.split()) / max(1, len(text.split())) for text in texts]


def replies(evaluations):
    """Every prompt's reply under each evaluation."""
    return qzo.generate_texts(model, tokenizer, prompts, evaluations, max_new_tokens=6)


def loss():
    """The reward's mean under each evaluation, negative: float32 [16]."""
    return qzo.objective(reward, replies(2 * directions), 2 * directions, maximize=True)


before = replies(1)
for step in range(12):
    mean = -optimizer.step(loss)
    if step % 4 == 0:
        print(f"step {step}: mean reward {mean:.2f}")
after = replies(1)
for prompt, old, new in zip(prompts, before, after, strict=True):
    print(f"{prompt!r}: {old!r} -> {new!r}")
print(f"reward: {sum(reward(before)) / len(prompts):.2f} -> {sum(reward(after)) / len(prompts):.2f}")
