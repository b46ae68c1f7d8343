"""A PyTorch loop of your own: learn a task, rate the weights, learn the next one while they are held.

    python examples/bare_loop.py          # offline, half a minute; an argument sets the number of steps

For a real model put `AutoModelForCausalLM.from_pretrained(...)` and its tokenizer where the tiny ones are
made, and your own rows, {"prompt": ..., "completion": ...}, where the toy tasks are.
"""

import random
import sys

import torch

import holdfast
from holdfast.evaluation.evaluate import EvaluationOptions, evaluate_task
from holdfast.models import block_parameters, tiny_llama
from holdfast.tasks import Encoder, Template, collate, toy_tokenizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200

tokenizer = toy_tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
model = tiny_llama(tokenizer, hidden=64, layers=2)  # yours: AutoModelForCausalLM.from_pretrained(...)
old, new = holdfast.toy_suite(["head", "copy"], test_rows=50)
encoder = Encoder(tokenizer, Template(), encoder_decoder=False)

# Only the linear maps in the blocks have a relevance, so only they are trained (LoRA factors count too).
weights = list(block_parameters(model).values())
model.requires_grad_(False)
for weight in weights:
    weight.requires_grad_(True)


def train(task, protection=None):
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    handle = protection.attach(model, optimizer) if protection else None
    rows, draw = encoder.many(task.train), random.Random(0)
    model.train()
    for _ in range(STEPS):
        batch = collate(draw.sample(rows, 32), tokenizer.pad_token_id, encoder_decoder=False)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle:
        handle.remove()


def score(task):
    return evaluate_task(model, tokenizer, task, encoder, options=EvaluationOptions()).score


train(old)
before = score(old)
prior = holdfast.attribute(model, tokenizer, old.train)
# Half of the directions of each map's inputs, those that mattered most, don't move at all.
train(new, holdfast.Gate(prior, shape="top", fraction=0.5))
after = f"{score(old):.0f} after {new.name} was learned ({score(new):.0f})"
print(f"{old.name}: {before:.0f} when learned, {after}")
