"""transformers.Trainer with one callback: the new task is learned, the old one is kept.

    python examples/trainer_callback.py          # offline, half a minute; an argument sets the steps

For a real model put `AutoModelForCausalLM.from_pretrained(...)` and its tokenizer where the tiny ones are
made, and your own rows, {"prompt": ..., "completion": ...}, where the toy tasks are.
"""

import sys
import tempfile

from transformers import Trainer, TrainingArguments

import holdfast
from holdfast.evaluation.evaluate import EvaluationOptions, evaluate_task
from holdfast.models import block_parameters, tiny_llama
from holdfast.tasks import Encoder, Template, collate, toy_tokenizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
FOLDER = tempfile.mkdtemp()  # yours: where checkpoints and the prior are kept
tokenizer = toy_tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
model = tiny_llama(tokenizer, hidden=64, layers=2)  # yours: AutoModelForCausalLM.from_pretrained(...)
old, new = holdfast.toy_suite(["head", "copy"], test_rows=50)
encoder = Encoder(tokenizer, Template(), encoder_decoder=False)

# Only the linear maps in the blocks are rated, so only they are trained (LoRA factors count too).
weights = list(block_parameters(model).values())
model.requires_grad_(False)
for weight in weights:
    weight.requires_grad_(True)


def train(task, callbacks=()):
    arguments = TrainingArguments(
        FOLDER,
        max_steps=STEPS,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        remove_unused_columns=False,
        report_to="none",
    )

    def batch(rows):  # yours: the collator that you have
        return collate(rows, tokenizer.pad_token_id, encoder_decoder=False)

    rows = encoder.many(task.train)
    Trainer(model, arguments, batch, rows, callbacks=list(callbacks)).train()


def score(task):
    return evaluate_task(model, tokenizer, task, encoder, options=EvaluationOptions()).score


train(old)
before = score(old)
prior = holdfast.attribute(model, tokenizer, old.train)  # 1: which inputs carried what the model knows
prior.save(f"{FOLDER}/prior")  # 2: keep it beside the model
train(new, [holdfast.ProtectCallback(f"{FOLDER}/prior")])  # 3: hold them (pull=5 is the default)
after = f"{score(old):.0f} after {new.name} was learned ({score(new):.0f})"
print(f"{old.name}: {before:.0f} when learned, {after}")
