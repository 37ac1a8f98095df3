"""The training API inside what training loops are made of: the numbers of the same method done by hand.

By hand (`by_hand`) means separate passes, a float64 SVD of the gradient matrix, and plain writes to `.grad`.
"""

import contextlib
import copy
import dataclasses
from collections import OrderedDict

import pytest
import torch
from helpers import BF16, EPS, F16, dtype_id, flat, randn, relative, svd_align
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fastmtl

TASKS = 3
METHOD = fastmtl.AlignedMTL()
STEPS = 3


class Model(nn.Module):
    """An encoder and one head a task; task t has a loss of its own size. `low`: a dtype to run under autocast."""

    def __init__(self, low=None):
        super().__init__()
        torch.manual_seed(1)
        self.low = low
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 2) for _ in range(TASKS)])

    def autocast(self):
        return torch.autocast("cpu", dtype=self.low) if self.low else contextlib.nullcontext()

    def encode(self, x):
        with self.autocast():
            return self.encoder(x)

    def losses(self, hs, y):
        """One loss a task, task t from hs[t]."""
        with self.autocast():
            outputs = [head(h) for head, h in zip(self.heads, hs, strict=True)]
            return [5.0**t * nn.functional.mse_loss(output, y[t]) for t, output in enumerate(outputs)]

    def shared(self):
        return [p for p in self.encoder.parameters() if p.requires_grad]


def batch(i, size=16):
    return randn(size, 5, seed=10 + i), randn(TASKS, size, 2, seed=20 + i)


def same(loss):
    return loss


# Each fills the `.grad`s for one batch; `scale` is what a loss scaler does to a loss.


def by_fan_out(model, x, y, scale=same):
    hs = fastmtl.fan_out(model.encode(x), TASKS, METHOD)
    scale(hs.total(model.losses(hs, y))).backward()


def by_hooks(model, x, y, scale=same):
    hs = fastmtl.fan_out(model.encode(x), TASKS, METHOD, via="hooks")
    scale(sum(model.losses(hs, y))).backward()


def by_representation(model, x, y, scale=same):
    h = model.encode(x)
    METHOD.backward([scale(loss) for loss in model.losses([h] * TASKS, y)], representation=h)


def by_shared(model, x, y, scale=same):
    h = model.encode(x)
    METHOD.backward([scale(loss) for loss in model.losses([h] * TASKS, y)], shared=model.shared())


def by_features(model, x, y, scale=same):
    h = model.encode(x)
    METHOD.backward([scale(loss) for loss in model.losses([h] * TASKS, y)], features=h)


def aligned(losses, tensors):
    """T passes down to the tensors and an SVD in float64; a non-finite gradient makes all of it non-finite."""
    rows = [torch.autograd.grad(loss, tensors, retain_graph=True, materialize_grads=True) for loss in losses]
    G = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    g = svd_align(G) if G.isfinite().all() else G.new_full(G.shape[1:], torch.nan)
    parts = g.split([x.numel() for x in tensors])
    return [part.view_as(x).to(x.dtype) for part, x in zip(parts, tensors, strict=True)]


def by_hand(way):
    """What `way` computes, in plain PyTorch."""

    def upper_bound(model, x, y, scale=same):
        h = model.encode(x)
        states = h if isinstance(h, tuple) else (h,)
        leaves = tuple(h.detach().requires_grad_() for h in states)
        losses = [scale(loss) for loss in model.losses([leaves if isinstance(h, tuple) else leaves[0]] * TASKS, y)]
        cotangents = aligned(losses, leaves)
        sum(losses).backward()  # the heads
        torch.autograd.backward(states, cotangents)

    def exact(model, x, y, scale=same):
        h = model.encode(x)
        losses = [scale(loss) for loss in model.losses([h] * TASKS, y)]
        shared = model.shared()
        gradients = aligned(losses, shared)
        sum(losses).backward(inputs=[p for p in model.parameters() if p.requires_grad and id(p) not in map(id, shared)])
        for p, g in zip(shared, gradients, strict=True):
            p.grad = g if p.grad is None else p.grad + g

    return exact if way in (by_shared, by_features) else upper_bound


WAYS = [by_fan_out, by_hooks, by_representation, by_shared, by_features]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def assert_trained_alike(model, reference, start, limit=1e-5):
    """Both went the same way from the start, relative to its length."""
    first = flat(list(start.parameters()))
    moved, expected = (flat(list(m.parameters())) - first for m in (model, reference))
    assert expected.norm() > 0.01
    assert relative(moved, expected) <= limit


def check(start, loop, way, limit=1e-5, hand=by_hand):
    """Runs a training loop with both; returns the two models."""
    model, reference = copy.deepcopy(start), copy.deepcopy(start)
    for each, backward in ((model, way), (reference, hand(way))):
        torch.manual_seed(5)
        loop(each, backward)
    assert_trained_alike(model, reference, start, limit)
    return model, reference


# ------------------------------------------------------------------------------------------------ the training loop


def steps(model, backward, optimizer):
    for i in range(STEPS):
        optimizer.zero_grad()
        backward(model, *batch(i))
        optimizer.step()


def plain(model, backward):
    steps(model, backward, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


def stepping(model, backward):
    steps(model, backward, torch.optim.SGD(model.parameters(), lr=0.05))


def accumulating(model, backward):
    """The sum over micro-batches of their aligned gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(2 * STEPS):
        backward(model, *batch(i))
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()


def clipping(model, backward):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(STEPS):
        optimizer.zero_grad()
        backward(model, *batch(i))
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        optimizer.step()


def several_optimizers(model, backward):
    optimizers = [
        torch.optim.SGD(model.encoder.parameters(), lr=0.2),
        *(torch.optim.Adam(head.parameters(), lr=0.01) for head in model.heads),
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]
    for i in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, *batch(i))
        for each in (*optimizers, *schedulers):
            each.step()


def fused(model, backward):
    steps(model, backward, torch.optim.Adam(model.parameters(), lr=0.01, fused=True))


def evaluating_between(model, backward):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(STEPS):
        model.train()
        optimizer.zero_grad()
        backward(model, *batch(i))
        optimizer.step()
        model.eval()
        with torch.no_grad():
            h = model.encode(batch(99)[0])
            assert all(alias is h for alias in fastmtl.fan_out(h, TASKS, METHOD))


LOOPS = [plain, accumulating, clipping, several_optimizers, fused, evaluating_between]


@ways
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loop(loop, way):
    check(Model(), loop, way)


@ways
def test_frozen_parameters(way):
    """A layer of the encoder, a weight in a head, and a whole head, which still passes its task's gradient on."""
    start = Model()
    for part in (start.encoder[0], start.heads[2]):
        part.requires_grad_(False)
    start.heads[1].weight.requires_grad_(False)
    model, _ = check(start, plain, way)
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        assert (p.grad is not None) is p.requires_grad
        assert torch.equal(p, q) is not p.requires_grad


class Tied(Model):
    """Head 0 uses the encoder's last layer once more; heads 1 and 2 have one weight."""

    def __init__(self):
        super().__init__()
        self.heads[2].weight = self.heads[1].weight

    def losses(self, hs, y):
        return super().losses([hs[0] @ self.encoder[2].weight.T, *hs[1:]], y)


@ways
def test_tied_weights(way):
    check(Tied(), plain, way)


@ways
def test_dropout_and_batch_norm_see_one_forward(way):
    start = Model()
    start.encoder.insert(1, nn.BatchNorm1d(8))
    start.encoder.insert(3, nn.Dropout(0.3))
    start.heads[1] = nn.Sequential(nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model, reference = check(start, evaluating_between, way)
    assert model.encoder[1].num_batches_tracked == STEPS
    for (name, b), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert relative(b, expected.double()) <= 1e-5, name


# ------------------------------------------------------------------------------------------------ hooks on gradients


@ways
@pytest.mark.parametrize("kind", [Model, Tied])
def test_optimizer_in_backward(kind, way):
    """Each parameter steps as soon as its gradient is there, once a step, and frees it."""

    def loop(model, backward):
        if backward is not way:
            return stepping(model, backward)
        calls = dict.fromkeys(model.parameters(), 0)

        def step(p):
            calls[p] += 1
            torch.optim.SGD([p], lr=0.05).step()
            p.grad = None

        for p in calls:
            p.register_post_accumulate_grad_hook(step)
        for i in range(STEPS):
            backward(model, *batch(i))
            assert all(p.grad is None for p in calls)
        assert set(calls.values()) == {STEPS}

    check(kind(), loop, way)


# ------------------------------------------------------------------------------------------------ mixed precision


@ways
@pytest.mark.parametrize("low", [BF16, F16], ids=dtype_id)
def test_autocast(low, way):
    start = Model(low)
    assert start.encode(batch(0)[0]).dtype is low
    model, _ = check(start, plain, way, EPS[low])
    assert all(p.dtype is p.grad.dtype is torch.float32 for p in model.parameters())


def scaling(overflow):
    """A loop with a loss scaler; in step `overflow` a gradient of task 1 exceeds float16."""

    def loop(model, backward):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        for i in range(5):
            x, y = batch(i)
            if i == overflow:
                y[1] = 6e4
            before, size = copy.deepcopy(model.state_dict()), scaler.get_scale()
            optimizer.zero_grad()
            backward(model, x, y, scaler.scale)
            if i == overflow:
                assert not any(p.grad.isfinite().all() for p in model.encoder.parameters())
                assert all(p.grad.isfinite().all() for p in model.heads[0].parameters())
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            skipped = all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
            assert skipped is (i == overflow)
            assert (scaler.get_scale() < size) is skipped
        assert scaler.get_scale() > size  # it grows again

    return loop


@ways
def test_loss_scaler_skips_an_overflow_and_recovers(way):
    check(Model(F16), scaling(overflow=2), way, EPS[F16])


@ways
def test_loss_scaler_changes_nothing(way):
    """Aligned-MTL of scaled gradients is the scaled Aligned-MTL: in float32 a power of two is exact."""
    model, plain = Model(), Model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    way(model, *batch(0), scaler.scale)
    scaler.unscale_(optimizer)
    way(plain, *batch(0))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative(p.grad, q.grad.double()) <= 1e-6


# ------------------------------------------------------------------------------------------------ checkpointing


class Checkpointed(Model):
    """The encoder's second half and the heads are recomputed in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def encode(self, x):
        return checkpoint(self.encoder[2:], self.encoder[:2](x), use_reentrant=self.reentrant)

    def losses(self, hs, y):
        def run(t, h):
            return nn.functional.mse_loss(self.heads[t](h), y[t])

        return [5.0**t * checkpoint(run, t, h, use_reentrant=self.reentrant) for t, h in enumerate(hs)]


REENTRANT = [by_fan_out, by_hooks]  # a reentrant checkpoint needs `.backward()`


@pytest.mark.parametrize(
    ("way", "reentrant"),
    [*((way, False) for way in WAYS), *((way, True) for way in REENTRANT)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_checkpointing(way, reentrant):
    start, model = Model(), Checkpointed(reentrant)
    model.load_state_dict(start.state_dict())
    reference = copy.deepcopy(start)
    plain(model, way)
    plain(reference, by_hand(way))
    assert_trained_alike(model, reference, start)


@pytest.mark.parametrize("way", [by_representation, by_shared, by_features], ids=lambda way: way.__name__)
def test_reentrant_checkpoints_refuse_separate_passes(way):
    model = Checkpointed(reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        way(model, *batch(0))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("via", ["node", "hooks"])
def test_fan_out_inside_a_checkpoint(via):
    """The forward runs twice, and so does `fan_out`; the gradients are aggregated once."""

    def run(model, x, y):
        seen = []

        def total(x):
            seen.append(fastmtl.fan_out(model.encode(x), TASKS, METHOD, via=via))
            return sum(model.losses(seen[-1], y))

        checkpoint(total, x, use_reentrant=False).backward()
        first, second = seen
        assert first.info is not None
        assert second.info is None

    check(Model(), plain, run, hand=lambda _: by_hand(by_fan_out))


# ------------------------------------------------------------------------------------------------ Hugging Face


class Output(OrderedDict):
    """How outputs are made in transformers: a dataclass that is also an ordered dict of what is not None."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]

    def __setattr__(self, name, value):
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)


@dataclasses.dataclass
class EncoderOutput(Output):
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Transformer(nn.Module):
    """Returns what Hugging Face's encoders return: the last of the hidden states is the last hidden state itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8)])

    def forward(self, x, states=False):
        hidden = []
        for layer in self.layers:
            x = layer(x).tanh()
            hidden.append(x)
        return EncoderOutput(last_hidden_state=x, hidden_states=tuple(hidden) if states else None)


class Pretrained(Model):
    def __init__(self):
        super().__init__()
        self.encoder = Transformer()

    def losses(self, hs, y):
        return super().losses([h if isinstance(h, torch.Tensor) else h["last_hidden_state"] for h in hs], y)


def from_last(way):
    """By hand, with the last hidden state alone for the representation."""

    def run(model, x, y):
        plain = copy.copy(model)
        plain.encode = lambda x: model.encoder(x).last_hidden_state
        by_hand(way)(plain, x, y)

    return run


@ways
def test_outputs_as_dataclasses(way):
    check(Pretrained(), plain, way, hand=from_last)


@pytest.mark.parametrize("via", ["node", "hooks"])
def test_aliases_of_a_dataclass_are_dataclasses(via):
    output = Transformer()(batch(0)[0])
    for alias in fastmtl.fan_out(output, TASKS, METHOD, via=via):
        assert type(alias) is EncoderOutput
        assert list(alias) == ["last_hidden_state"]
        assert alias[0] is alias.last_hidden_state is alias["last_hidden_state"]
        assert alias.last_hidden_state is not output.last_hidden_state
        assert torch.equal(alias.last_hidden_state, output.last_hidden_state)


def test_attached_to_a_pretrained_encoder():
    """The code between encoder and heads takes the output apart; the heads still get their aliases."""

    def loop(model, backward):
        if backward is not attached:
            return plain(model, backward)
        handle = fastmtl.attach(model.encoder, model.heads, METHOD)
        plain(model, backward)
        assert handle.info.rank == TASKS

    def attached(model, x, y):
        sum(model.losses([model.encode(x)] * TASKS, y)).backward()

    check(Pretrained(), loop, attached, hand=from_last)


class Twice(Pretrained):
    def encode(self, x):
        states = self.encoder(x, states=True).hidden_states
        return EncoderOutput(states[-1], hidden_states=states[-1:])

    def losses(self, hs, y):
        return super().losses([getattr(h, "hidden_states", (h,))[-1] if t == 1 else h for t, h in enumerate(hs)], y)


@ways
def test_a_tensor_that_is_in_the_output_twice(way):
    """Tasks may take it from either place: it is one part of the representation, not two."""
    check(Twice(), plain, way, hand=from_last)


class Deep(Pretrained):
    def encode(self, x):
        return self.encoder(x, states=True).hidden_states

    def losses(self, hs, y):
        return super().losses([hs[0][0], hs[1][1], hs[2][0] + hs[2][1]], y)


@ways
def test_states_that_depend_on_each_other(way):
    """All hidden states as the representation: what a task sends into the first by way of the second counts once."""
    check(Deep(), plain, way)


# ------------------------------------------------------------------------------------------------ Lightning


def lightning(model, way, steps, **options):
    """Trains the model in a `LightningModule`: `fan_out` in automatic optimization, `backward` in manual."""
    import pytorch_lightning as pl  # takes seconds

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
            self.automatic_optimization = way in REENTRANT

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.05)

        def training_step(self, data, i):
            x, y = data
            if self.automatic_optimization:
                via = "hooks" if way is by_hooks else "node"
                self.hs = fastmtl.fan_out(self.model.encode(x), TASKS, METHOD, via=via)
                return self.hs.total(self.model.losses(self.hs, y))
            optimizer = self.optimizers()
            optimizer.zero_grad()
            way(self.model, x, y)
            optimizer.step()
            return None

        def on_after_backward(self):
            self.log_dict({f"alpha/{t}": alpha for t, alpha in enumerate(self.hs.info.alpha.float())})

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader([batch(i) for i in range(8)], batch_size=None))
    assert trainer.global_step == steps
    return trainer


@ways
def test_lightning(way):
    def loop(model, backward):
        if backward is way:
            lightning(model, way, STEPS)
        else:
            stepping(model, backward)

    check(Model(), loop, way)


@pytest.mark.parametrize("way", [by_fan_out, by_hooks], ids=lambda way: way.__name__)
def test_lightning_accumulates_and_clips(way):
    """Lightning divides each micro-batch's loss by their number: the mean of the aligned gradients, clipped."""

    def loop(model, backward):
        if backward is way:
            trainer = lightning(model, way, STEPS, accumulate_grad_batches=2, gradient_clip_val=0.5)
            assert set(trainer.callback_metrics) == {"alpha/0", "alpha/1", "alpha/2"}
            return
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(2 * STEPS):
            backward(model, *batch(i), lambda loss: loss / 2)
            if i % 2:
                assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
                optimizer.step()
                optimizer.zero_grad()

    check(Model(), loop, way)


def test_lightning_modules_that_keep_a_fan_out_are_copied():
    """As averaging callbacks do, in the middle of a run."""
    import pytorch_lightning as pl

    copies = []

    class Copying(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            copies.append(AveragedModel(module))

    lightning(Model(), by_fan_out, 2, callbacks=[Copying()])
    assert len(copies) == 2
    for averaged in copies:
        assert averaged.module.hs.info is None
        averaged.module.model.losses([averaged.module.model.encode(batch(0)[0])] * TASKS, batch(0)[1])[0].backward()


def test_lightning_in_mixed_precision():
    start = Model()
    model, reference = copy.deepcopy(start), copy.deepcopy(start)
    lightning(model, by_fan_out, STEPS, precision="bf16-mixed")
    reference.low = BF16
    stepping(reference, by_hand(by_fan_out))
    assert_trained_alike(model, reference, start, EPS[BF16])
