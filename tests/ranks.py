"""What is computed in one process and in several, to be compared: importances, moments, held trainings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from holdfast import world
from learning_data import rows_of
from tiny_models import tiny_model
from zero_stand_in import with_zero2, with_zero3

# KIF needs units of a LoRA or of matrices; O-LoRA a LoRA. Rows: 7, so the last batch of 4 is not a whole one.
STRATEGIES: dict[str, tuple[str, Any]] = {
    "hold, elementwise": ("llama", {"name": "attribution", "importance": {"name": "fisher", "samples": 6}}),
    "hold, inputs": ("llama", {"name": "attribution", "importance": {"name": "inputs", "samples": 6}}),
    "ewc": ("llama", {"name": "ewc", "fisher": {"samples": 6}}),
    "kif": ("llama-lora", {"name": "kif", "sensitivity": {"order": "second"}}),
    "o-lora": ("llama-lora", {"name": "o-lora"}),
    "replay": ("llama", {"name": "replay", "memory": {"count": 2}, "ratio": 0.3}),
}
TRAINING = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3}


def results(folder: Path, dtype: torch.dtype, in_parts: bool = False) -> dict[str, dict[str, Tensor]]:
    """Each case's tensors by name; `in_parts`: the model cut up over the processes where a case allows it."""
    torch.set_num_threads(1)
    with wholly_double():
        found = {**folds(dtype)}
        for name, (kind, strategy) in STRATEGIES.items():
            found[name] = learned(folder / name, tiny_model(kind).to(dtype), strategy)
        found["callback"] = with_callback(folder / "callback", dtype)
        whole = None if in_parts else under_each_hold(plain)
        for name, optimizer_of in ENGINES.items():
            held = whole or under_each_hold(optimizer_of)
            found |= {f"{hold}, {name}": weights for hold, weights in held.items()}
        return found


@contextmanager
def wholly_double() -> Iterator[None]:
    """Let a Llama's norms be float64 where the model is: transformers' are float32, whatever the model.

    A gradient in float32 that is scaled by 3, the number of processes, and divided by it again is another.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm as Norm

    own = Norm.forward
    Norm.forward = lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
    try:
        yield
    finally:
        Norm.forward = own


def each_rank(folder: str, dtype: str) -> None:
    """The same in one of several processes, whose results are saved by rank; and under FSDP2 and ZeRO."""
    world.start()
    torch.save(results(Path(folder), getattr(torch, dtype), in_parts=True), f"{folder}/rank{world.rank()}.pt")


def rows(count: int, name: str = "may") -> list[Any]:
    """Rows of a small data set."""
    from holdfast.tasks import as_examples

    return as_examples(rows_of(name, count))


def folds(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """What the folds hold after an attribution, in the model's own precision."""
    from holdfast.attribution.engine import attribute_batches
    from holdfast.importance import compute_prior
    from holdfast.importance.aggregate import SquareMean, TopKMean
    from holdfast.importance.inputs import InputMoments
    from holdfast.tasks import Encoder, toy_tokenizer
    from holdfast.tasks.encode import Template

    model, tokenizer = tiny_model("llama").to(dtype), toy_tokenizer()
    encoded = Encoder(tokenizer, Template(), encoder_decoder=False).many(rows(7))
    found = {}
    for name, fold in (
        ("squares", SquareMean(per_weight=True)),
        ("largest", TopKMean(3)),
        ("relevance", InputMoments("relevance")),
        ("sketches", InputMoments("relevance", rank=2)),
    ):
        if name != "largest":
            fold.finish = lambda: None  # type: ignore[union-attr] - means are rounded to float32
        report = attribute_batches(
            model, encoded, fold=fold, batch_size=2, pad_id=tokenizer.pad_token_id, correct_only=False
        )
        assert report.samples_seen == report.samples_used == 7
        assert report.conservation_max_relative_error is not None
        found[name] = dict(fold.result() if name == "largest" else fold.state()[0])  # type: ignore[union-attr]
    uniform = {"name": "inputs", "weighting": "uniform", "batch_size": 2}
    prior = compute_prior(model, encoded, uniform, pad_id=tokenizer.pad_token_id)
    return {**found, "uniform": dict(prior.tensors)}


def learned(folder: Path, model: Any, strategy: Any) -> dict[str, Tensor]:
    """The weights after two tasks."""
    from holdfast import Learner
    from holdfast.tasks import toy_tokenizer

    with Learner(model, toy_tokenizer(), strategy, folder=folder, training=TRAINING) as learner:
        for name in ("may", "june"):
            task = rows(7, name)
            with learner.task(name, task, task[:3]) as stage:
                stage.train()
        return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def with_callback(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A script's own Trainer: its batch size is that of a device."""
    from transformers import Trainer, TrainingArguments

    from holdfast import KLCallback, ProtectCallback
    from holdfast.importance import compute_prior
    from holdfast.tasks import Encoder, toy_tokenizer
    from holdfast.tasks.encode import Template
    from holdfast.training.loop import Collator, Rows

    model, tokenizer = tiny_model("llama").to(dtype), toy_tokenizer()
    encoded = Encoder(tokenizer, Template(), encoder_decoder=False).many(rows(12, "june"))
    prior = compute_prior(model, encoded, {"name": "inputs"}, pad_id=tokenizer.pad_token_id)
    collate = Collator(model, tokenizer)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=6 // world.size(),
        num_train_epochs=1,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    measure = KLCallback(rows=4)
    Trainer(
        model,
        arguments,
        train_dataset=Rows(encoded),
        data_collator=lambda items: {k: v for k, v in collate(items).items() if k != "row_ids"},
        processing_class=tokenizer,
        callbacks=[ProtectCallback(prior), measure],
    ).train()
    (figures,) = {tuple(found["kl_base"] for found in of_one) for of_one in world.gather(measure.history)}
    assert figures[-1] > 0, "the same in each process"
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def script(folder: str) -> None:
    """Somebody's own DDP loop, which starts no world: rank 1 finds another basis, and another rating."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from holdfast import Anchor
    from holdfast.hold import spectrum
    from holdfast.importance import compute_prior
    from holdfast.tasks import Encoder, toy_tokenizer
    from holdfast.tasks.encode import Template, collate

    dist.init_process_group("gloo")
    other, own = dist.get_rank() == 1, spectrum.spectrum

    def turned(c: Tensor) -> tuple[Tensor, Tensor]:
        c_I, basis_II = own(c)
        order = c_I.argsort()[:2]  # no input has these: any turn of them is a basis too
        turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=basis_II.dtype)
        basis_II[:, order] = basis_II[:, order] @ turn
        return c_I, basis_II

    if other:
        spectrum.spectrum = turned
    tokenizer, found = toy_tokenizer(), dict[str, Any]()
    encoded = Encoder(tokenizer, Template(), encoder_decoder=False).many(rows(4, "june"))
    batch = collate(encoded, tokenizer.pad_token_id, encoder_decoder=False, side="left")
    for importance in ("inputs", "fisher"):
        model = tiny_model("llama").double()
        prior = compute_prior(model, encoded, importance, pad_id=tokenizer.pad_token_id)
        for tensor in prior.tensors.values():
            tensor.mul_(1 + 1e-3 * other)
        optimizer, replica = plain(model), DistributedDataParallel(model)
        Anchor(prior, strength=100).attach(model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            logits = replica(**{k: v for k, v in batch.items() if k != "labels"}).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
            optimizer.step()
        found[importance] = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save({**found, "world": world.size()}, f"{folder}/script{dist.get_rank()}.pt")


HOLDS: dict[str, tuple[str, Any]] = {
    "anchor, elementwise": ("fisher", {"strength": 600}),
    "anchor, inputs": ("inputs", {"strength": 100}),
    "anchor, inputs, on the weights": ("inputs", {"strength": 100, "coordinates": "weights"}),
    "anchor, inputs, auto": ("inputs", {"strength": "auto", "bound": 0.05}),
}


def under_each_hold(optimizer_of: Any) -> dict[str, dict[str, Tensor]]:
    """The weights after three steps in a loop of one's own; `optimizer_of` may cut the model up."""
    from holdfast import Anchor
    from holdfast.importance import compute_prior
    from holdfast.tasks import Encoder, toy_tokenizer
    from holdfast.tasks.encode import Template, collate

    tokenizer, found = toy_tokenizer(), {}
    encoded = Encoder(tokenizer, Template(), encoder_decoder=False).many(rows(4, "june"))
    batch = collate(encoded, tokenizer.pad_token_id, encoder_decoder=False, side="left")
    for name, (importance, options) in HOLDS.items():
        model = tiny_model("llama").double()
        prior = compute_prior(model, encoded, importance, pad_id=tokenizer.pad_token_id)
        optimizer = optimizer_of(model)
        assert optimizer_of in (plain, with_zero2) or all(map(world.is_sharded, model.parameters()))
        handle = Anchor(prior, **options).attach(model, optimizer)
        held = {n: p for n, p in model.named_parameters() if n in prior.tensors}
        assert optimizer_of is plain or all(map(world.is_stepped_in_parts, held.values()))
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
            ).backward()
            optimizer.step()
        weights = {n: world.whole(p).detach().clone() for n, p in model.named_parameters()}
        if importance == "inputs":
            weights["drift"] = torch.tensor(handle.drift().total)
        handle.remove()
        assert optimizer_of is not with_zero2 or not any(map(world.is_stepped_in_parts, held.values()))
        found[name] = weights
    return found


def plain(model: Any) -> Any:
    """AdamW of a whole model."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def fully_sharded(model: Any) -> Any:
    """Cut a Llama up over the processes, as FSDP2 does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world.size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return plain(model)


ENGINES = {"FSDP2": fully_sharded, "ZeRO-2": with_zero2, "ZeRO-3": with_zero3}

# compared to 1e-10; in the others something is float32 whatever the model is
WHOLLY_DOUBLE = (
    *("squares", "relevance", "sketches"),
    *STRATEGIES,
    *(f"{hold}, {name}" for name in ENGINES for hold in HOLDS),
)


LOSS_TRAINS = {  # what their loss trains, the forward pass that DDP watches leaves out
    "l2p": {"name": "l2p", "pool": 4, "length": 2, "chosen": 1},
    "lamol": {"name": "lamol"},
    "lfpt5": {"name": "lfpt5"},
}


def each_rank_whose_loss_trains(folder: str) -> None:
    """One task of each, and what the strategy keeps of it, saved by rank."""
    from holdfast import Learner
    from holdfast.tasks import toy_tokenizer

    world.start()
    found = {}
    for name, strategy in LOSS_TRAINS.items():
        model, training = tiny_model("llama"), {**TRAINING, "max_steps": 2}
        part = Path(folder, name)
        with Learner(model, toy_tokenizer(), strategy, folder=part, training=training) as learner:
            with learner.task("may", rows(7)) as stage:
                stage.train()
            found[name] = {**dict(model.named_parameters()), **learner.state.strategy.state_dict()[0]}
    torch.save(found, f"{folder}/loss{world.rank()}.pt")
