"""TRL's SFTTrainer with LoRA and one callback: the new task is learned, the old one is kept.

    python examples/trl_sft.py          # offline, half a minute; an argument sets the number of steps

For a real model put its folder or hub id where the tiny one is made, and your own data sets where the
toy tasks are: the rows are TRL's usual {"prompt": ..., "completion": ...}.
"""

import sys
import tempfile

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import holdfast
from holdfast.evaluation.evaluate import EvaluationOptions, evaluate_task
from holdfast.models import tiny_llama
from holdfast.tasks import Encoder, Template, toy_tokenizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
FOLDER = tempfile.mkdtemp()  # yours: where checkpoints and the prior are kept

set_seed(0)  # LoRA's factors are drawn
tokenizer = toy_tokenizer()  # yours: AutoTokenizer.from_pretrained(...)
model = tiny_llama(tokenizer, hidden=64, layers=2)  # yours: AutoModelForCausalLM.from_pretrained(...)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
old, new = holdfast.toy_suite(["head", "copy"], test_rows=50)
template = Template(prompt="{prompt}")  # what TRL does with a text prompt: no <s> before it
encoder = Encoder(tokenizer, template, encoder_decoder=False)


def train(task, callbacks=()):
    arguments = SFTConfig(
        FOLDER,
        max_steps=STEPS,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        bf16=False,  # yours: True on a GPU
        report_to="none",
    )
    rows = Dataset.from_list([{"prompt": row.prompt, "completion": row.completion} for row in task.train])
    SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks)
    ).train()


def score(task):
    return evaluate_task(model, tokenizer, task, encoder, options=EvaluationOptions()).score


train(old)
before = score(old)
prior = holdfast.attribute(model, tokenizer, old.train, template=template)
prior.save(f"{FOLDER}/prior")
protect = holdfast.ProtectCallback(f"{FOLDER}/prior", pull=5)  # larger keeps more and learns less
train(new, [protect])
after = f"{score(old):.0f} after {new.name} was learned ({score(new):.0f})"
print(f"{old.name}: {before:.0f} when learned, {after}")
