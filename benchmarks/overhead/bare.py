"""The comparison: two tasks learned one after another with nothing but transformers' Trainer."""

import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

model_dir, data_dir, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
for name, parameter in model.named_parameters():  # the blocks' matrices, as holdfast's default does
    parameter.requires_grad_(".layers." in name and "norm" not in name)


def encode(row: dict) -> dict:
    prompt = tokenizer("<s>" + row["prompt"], add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["completion"] + "</s>", add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


for number, task in enumerate(sorted(Path(data_dir).iterdir())):
    rows = [encode(json.loads(line)) for line in (task / "train.jsonl").open()]
    arguments = TrainingArguments(
        output_dir=f"{out}/{task.name}",
        num_train_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=number,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)
    )
    trainer.train()
    trainer.save_model(f"{out}/{task.name}")
