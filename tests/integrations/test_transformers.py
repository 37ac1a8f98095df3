"""Hugging Face's own Trainer and models, and the same steps in a plain loop: the same numbers."""

import pytest
import torch
from helpers import F64, flat, generator, relative
from torch import nn

transformers = pytest.importorskip("transformers", reason="not installed: make test-trainers installs it")

import fastmtl  # noqa: E402
from fastmtl.integrations.transformers import MultiTaskTrainer  # noqa: E402

STEPS, BATCH = 6, 4


class TwoHeads(nn.Module):
    """A BERT of one layer, with a head that tags tokens and one that classifies; float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        config = transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.tags, self.kind = nn.Linear(8, 3), nn.Linear(8, 2)
        self.to(F64)

    def forward(self, input_ids):
        h = self.bert(input_ids).last_hidden_state
        return {"h": h, "tags": self.tags(h), "kind": self.kind(h[:, 0])}


def losses_of(outputs, inputs):
    tags = nn.functional.cross_entropy(outputs["tags"].flatten(0, 1), inputs["labels"].flatten())
    kind = None if (inputs["kind"] < 0).all() else 3 * nn.functional.cross_entropy(outputs["kind"], inputs["kind"])
    return {"tags": tags, "kind": kind}


class MyTrainer(MultiTaskTrainer):
    """What a user writes."""

    way = "exact"

    def compute_losses(self, model, inputs):
        outputs = model(inputs["input_ids"])
        given = {"losses": losses_of(outputs, inputs), "outputs": outputs}
        return given if self.way == "exact" else given | {self.way: outputs["h"]}


def examples():
    """Of the third batch no example is of a kind."""
    draw = generator(3)
    ids = torch.randint(20, (STEPS * BATCH, 7), generator=draw)
    tags, kinds = torch.randint(3, ids.shape, generator=draw), torch.randint(2, (len(ids),), generator=draw)
    kinds[2 * BATCH : 3 * BATCH] = -1
    return [{"input_ids": x, "labels": y, "kind": k} for x, y, k in zip(ids, tags, kinds, strict=True)]


def collated(i):
    batch = examples()[i * BATCH : (i + 1) * BATCH]
    return {name: torch.stack([example[name] for example in batch]) for name in batch[0]}


def train(folder, method, way="exact", resume=None, **options):
    arguments = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": 2, "max_grad_norm": 0.5} | options
    kinds = {key: arguments.pop(key) for key in ("shared", "every", "accumulate", "engine") if key in arguments}
    trainer = type("Way", (MyTrainer,), {"way": way})(
        model=TwoHeads(),
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH,
            learning_rate=0.01,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            train_sampling_strategy="sequential",
            **arguments,
        ),
        train_dataset=examples(),
        method=method,
        **({"shared": None if way == "representation" else "bert"} | kinds),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_hand(step, pieces=1, steps=STEPS):
    model = TwoHeads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: max(0.0, 1 - n / steps))
    for n in range(steps):
        for i in range(pieces):
            inputs = collated((n * pieces + i) % STEPS)
            outputs = model(inputs["input_ids"])
            losses = {k: None if v is None else v / pieces for k, v in losses_of(outputs, inputs).items()}
            step(model, losses, outputs["h"], i == pieces - 1)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def same(trainer, model, limit=1e-9):
    assert relative(flat(list(trainer.model.parameters())), flat(list(model.parameters()))) <= limit


@pytest.mark.parametrize("way", ["exact", "representation", "features"])
def test_steps_are_those_of_a_plain_loop(way, tmp_path):
    trainer, method = train(tmp_path, fastmtl.AlignedMTL(), way), fastmtl.AlignedMTL()

    def step(model, losses, h, _):
        where = {} if way == "exact" else {way: h}
        method.backward(losses, None if way == "representation" else model.bert, **where)

    same(trainer, by_hand(step))
    assert trainer.info.names == ("tags", "kind")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == STEPS / 2
    wanted = {"alpha/tags", "alpha/kind", "norm/tags", "norm/kind", "condition_number", "conflicts"}
    assert all({f"mtl/{name}" for name in wanted} <= line.keys() for line in lines)
    assert lines[-1]["mtl/alpha/tags"] == trainer.info.alpha[0].item()


def test_accumulation_sums_before_it_aggregates(tmp_path):
    trainer = train(tmp_path, fastmtl.AlignedMTL(), gradient_accumulation_steps=2, max_steps=3)
    method, accumulators = fastmtl.AlignedMTL(), []

    def step(model, losses, h, last):
        accumulators[:] = accumulators or [method.accumulate(model.bert)]
        accumulators[0].add(losses)
        if last:
            accumulators[0].backward()

    same(trainer, by_hand(step, pieces=2, steps=3))


def test_a_loss_scaler_is_seen(tmp_path):
    """Gradients come scaled, and Nash-MTL's length is that of the unscaled ones; in bfloat16, without a scaler, too."""
    trainer = train(tmp_path, fastmtl.NashMTL(max_norm=0.1), max_steps=1, bf16=True)
    for factor in (None, 64.0):
        scaler = None if factor is None else torch.amp.GradScaler("cpu", init_scale=factor)
        trainer.accelerator.scaler = scaler
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, collated(0))
        norm = flat([p.grad for p in trainer.model.bert.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(0.1 * (factor or 1.0), rel=1e-2)


@pytest.mark.parametrize("make", [lambda: fastmtl.NashMTL(every=4), fastmtl.MoCo], ids=["Nash", "MoCo"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(make, tmp_path):
    whole = train(tmp_path / "whole", make(), save_strategy="steps", save_steps=3, save_only_model=False)
    again = train(tmp_path / "again", make(), resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.state.global_step == STEPS
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_evaluation_and_what_does_not_go(tmp_path):
    trainer = train(tmp_path, fastmtl.AlignedMTL(), max_steps=1)
    trainer.model.eval()
    result = trainer.evaluate([example for example in examples() if example["kind"] >= 0])
    assert result["eval_loss"] > 0
    with pytest.raises(ValueError, match="compute_loss_func: expected None"):
        MyTrainer(model=TwoHeads(), method=fastmtl.AlignedMTL(), compute_loss_func=sum)
    with pytest.raises(TypeError, match="method: expected a method of fastmtl"):
        MyTrainer(model=TwoHeads(), method="aligned")
    with pytest.raises(ValueError, match="every: expected its default where micro-batches are accumulated"):
        train(tmp_path, fastmtl.AlignedMTL(), every=3, gradient_accumulation_steps=2)
