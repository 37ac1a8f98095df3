"""PyTorch Lightning's own trainer, and the same steps in a plain loop: the same numbers."""

import functools
import warnings

import pytest
import torch
from helpers import F64, randn, relative
from torch import nn

pl = pytest.importorskip("pytorch_lightning", reason="needs pip install 'fastmtl-torch[lightning]'")

from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging  # noqa: E402
from pytorch_lightning.loggers.logger import Logger  # noqa: E402
from pytorch_lightning.plugins.precision import MixedPrecision  # noqa: E402
from pytorch_lightning.strategies import DDPStrategy  # noqa: E402

import fastmtl  # noqa: E402
from fastmtl import scalarization  # noqa: E402
from fastmtl.integrations.lightning import MultiTask  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore:.*:FutureWarning")

NAMES = ("seg", "depth", "normals")
BATCHES = 5


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in NAMES)
        self.to(F64)

    def losses(self, h, y):
        return {
            name: 4.0**t * (head(h) - y[:, t].to(h.dtype)).square().mean()
            for t, (name, head) in enumerate(zip(NAMES, self.heads, strict=True))
        }


class Module(pl.LightningModule):
    """What a user writes."""

    def __init__(self, way="exact", absent=None, optimizer=torch.optim.Adam):
        super().__init__()
        self.model, self.way, self.absent, self.optimizer = Plain(), way, absent, optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.model.encoder(x)
        losses = self.model.losses(h, y)
        if self.absent is not None and batch_idx % 2:
            losses[self.absent] = None
        return {"losses": losses} | ({} if self.way == "exact" else {self.way: h})

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.02)


def batches(dtype=F64):
    return [(randn(8, 6, dtype=dtype, seed=i), randn(8, 3, 2, dtype=dtype, seed=50 + i)) for i in range(BATCHES)]


def fit(module, callbacks, steps=-1, resume=None, loader=None, **options):
    options = {"enable_checkpointing": False, "logger": False, "accelerator": "cpu", "devices": 1} | options
    trainer = pl.Trainer(
        callbacks=callbacks,
        max_epochs=2 if steps < 0 else -1,
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = torch.utils.data.DataLoader(batches(), batch_size=None) if loader is None else loader
    trainer.fit(module, loader, ckpt_path=resume, **({"weights_only": False} if resume else {}))
    return trainer


def by_hand(step, clip=None, absent=None, accumulate=1, optimizer=torch.optim.Adam):
    """Two epochs in a plain loop: `step(model, losses, h, last)` fills the `.grad`s."""
    model = Plain()
    optimizer = optimizer(model.parameters(), lr=0.02)
    for _ in range(2):
        for i, (x, y) in enumerate(batches()):
            h = model.encoder(x)
            losses = {name: loss / accumulate for name, loss in model.losses(h, y).items()}
            if absent is not None and i % 2:
                losses[absent] = None
            last = (i + 1) % accumulate == 0 or i == BATCHES - 1
            step(model, losses, h, last)
            if last:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model


def same(module, model, limit=1e-9):
    for (name, p), q in zip(module.model.named_parameters(), model.parameters(), strict=True):
        assert relative(p, q.double()) <= limit, name
    assert not {"training_step", "backward"} & vars(module).keys()  # it is as it was


@pytest.mark.parametrize("way", ["exact", "representation", "features"])
def test_steps_are_those_of_a_plain_loop(way):
    method, other = fastmtl.AlignedMTL(), fastmtl.AlignedMTL()
    callback = MultiTask(method, shared=None if way == "representation" else "model.encoder")
    module = Module(way, absent="depth")
    fit(module, [callback], gradient_clip_val=0.5)

    def step(model, losses, h, _):
        where = {} if way == "exact" else {way: h}
        other.backward(losses, None if way == "representation" else model.encoder, **where)

    same(module, by_hand(step, clip=0.5, absent="depth"))
    assert callback.info.names == NAMES
    assert callback.info.alpha.shape == (3,)


@pytest.mark.parametrize("together", [True, False])
def test_accumulation_sums_before_it_aggregates(together):
    """Or aggregates each, with `accumulate=False`; Lightning steps after the last batch of an epoch, too."""
    module, method = Module(), fastmtl.AlignedMTL()
    fit(module, [MultiTask(fastmtl.AlignedMTL(), "model.encoder", accumulate=together)], accumulate_grad_batches=2)
    accumulator = []

    def step(model, losses, h, last):
        if not together:
            method.backward(losses, model.encoder)
            return
        accumulator[:] = accumulator or [method.accumulate(model.encoder)]
        accumulator[0].add(losses)
        if last:
            accumulator[0].backward()

    same(module, by_hand(step, accumulate=2))


def test_every_and_the_gramian_engine():
    module, method = Module(), fastmtl.AlignedMTL()
    callback = MultiTask(fastmtl.AlignedMTL(), ["model.encoder.0", "model.encoder.2"], every=3, engine="gramian")
    fit(module, [callback])
    same(module, by_hand(lambda model, losses, h, _: method.backward(losses, model.encoder, every=3)), 1e-6)
    assert callback.info.age == 0
    with pytest.raises(ValueError, match="every: expected its default where micro-batches are accumulated, got 3"):
        fit(Module(), [MultiTask(method, "model.encoder", every=3)], accumulate_grad_batches=2)


@pytest.mark.parametrize("pieces", [1, 2])
def test_groups(pieces):
    """By name, or by a function of the module; each is aggregated on its own."""
    module, method = Module(), fastmtl.AlignedMTL()
    groups = ["model.encoder.0", lambda module: module.model.encoder[2]]
    callback = MultiTask(fastmtl.AlignedMTL(), groups=groups if pieces == 1 else lambda module: groups)
    fit(module, [callback], accumulate_grad_batches=pieces)
    accumulators = []

    def step(model, losses, h, last):
        accumulators[:] = accumulators or [method.accumulate(groups=[model.encoder[0], model.encoder[2]])]
        accumulators[0].add(losses)
        if last:
            accumulators[0].backward()

    same(module, by_hand(step, accumulate=pieces))
    assert callback.info.alpha.shape == (2, 3)


def test_methods_on_losses():
    module, method = Module(), scalarization.DWA(3)
    fit(module, [MultiTask(scalarization.DWA(3), accumulate=False)])
    count = []

    def step(model, losses, h, _):
        method.backward(losses)
        count.append(1)
        if len(count) % BATCHES == 0:
            method.end_epoch()

    same(module, by_hand(step))


def test_a_loss_scaler_is_seen():
    """Nash-MTL is not homogeneous: without the scaler's factor its steps would be of another length."""
    module = Module(optimizer=torch.optim.SGD).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    loader = torch.utils.data.DataLoader(batches(torch.float32), batch_size=None)
    fit(module, [MultiTask(fastmtl.NashMTL(max_norm=0.3), "model.encoder")], plugins=[precision], loader=loader)
    model, method = Plain().float(), fastmtl.NashMTL(max_norm=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for x, y in 2 * batches(torch.float32):
        with torch.autocast("cpu", dtype=torch.float16):
            losses = model.losses(model.encoder(x), y)
        optimizer.zero_grad()
        scaled = {name: scaler.scale(loss) for name, loss in losses.items()}
        method.backward(scaled, model.encoder, grad_scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**12  # steps that overflow are skipped
    same(module, model, 1e-6)


class Lines(Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    name = version = property(lambda self: "lines")

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_weights_norms_and_conflicts_are_logged():
    logger, callback = Lines(), MultiTask(fastmtl.AlignedMTL(), "model.encoder")
    fit(Module(), [callback], steps=4, logger=logger, log_every_n_steps=2)
    assert [step for step, _ in logger.lines] == [1, 3]
    line = logger.lines[-1][1]
    fields = [f"{field}/{name}" for field in ("alpha", "norm") for name in NAMES]
    assert {f"mtl/{field}" for field in (*fields, "condition_number", "conflicts", "rank")} <= line.keys()
    assert line["mtl/alpha/depth"] == pytest.approx(callback.info.alpha[1].item(), rel=1e-6)
    assert line["mtl/condition_number"] == pytest.approx(callback.info.condition_number.item(), rel=1e-6)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    assert line["mtl/conflicts"] == pytest.approx(sum(callback.info.gram[i, j].item() < 0 for i, j in pairs) / 6)


@pytest.mark.parametrize("make", [functools.partial(fastmtl.NashMTL, every=3), fastmtl.MoCo], ids=["Nash", "MoCo"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(make, tmp_path):
    whole, rest = Module(), Module()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(whole, [MultiTask(make(), "model.encoder"), saving], enable_checkpointing=True)
    fit(rest, [MultiTask(make(), "model.encoder")], resume=tmp_path / "epoch=0.ckpt")
    for p, q in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(p, q)


def test_averaged_weights():
    """Callbacks that copy the module: their copies are averages of what was trained."""
    plain, averaged, swa = Module(), Module(), Module()
    fit(plain, [MultiTask(fastmtl.AlignedMTL(), "model.encoder")])
    ema = EMAWeightAveraging(decay=0.5)
    fit(averaged, [MultiTask(fastmtl.AlignedMTL(), "model.encoder"), ema])
    for name, p in averaged.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, dict(plain.named_parameters())[name]), name  # the average
    fit(swa, [MultiTask(fastmtl.AlignedMTL(), "model.encoder"), StochasticWeightAveraging(0.02, swa_epoch_start=1)])
    assert all(p.isfinite().all() for p in swa.parameters())
    assert all("training_step" not in vars(module) for module in (averaged, swa))


def test_what_does_not_go_is_said_and_the_module_left_as_it_was():
    class Manual(Module):
        automatic_optimization = False

    class Loss(Module):
        def training_step(self, batch, batch_idx):
            return {"loss": torch.zeros((), requires_grad=True)}

    method = fastmtl.AlignedMTL()
    with pytest.raises(ValueError, match="MultiTask: expected automatic optimization"):
        fit(Manual(), [MultiTask(method)])
    module = Loss()
    with pytest.raises(ValueError, match="training_step: expected a dict with 'losses', got a dict with 'loss'"):
        fit(module, [MultiTask(method)])
    assert not {"training_step", "backward"} & vars(module).keys()
    with pytest.raises(TypeError, match="method: expected a method of fastmtl, got str"):
        MultiTask("AlignedMTL")
    with pytest.raises(ValueError, match="every: expected 1 for DWA"):
        MultiTask(scalarization.DWA(3), every=2)


class Part(Module):
    """Takes this process's part of each batch."""

    def training_step(self, batch, batch_idx):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return super().training_step([x.chunk(world)[rank] for x in batch], batch_idx)


class Saving(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(pl_module.model.state_dict(), self.path)


@pytest.mark.slow  # two processes that import everything
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    """Data parallelism, accumulation under no_sync: the steps of one process on whole batches."""
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            Part(),
            [MultiTask(fastmtl.AlignedMTL(), "model.encoder"), Saving(path)],
            devices=2,
            strategy=DDPStrategy(start_method="spawn", process_group_backend="gloo"),
            use_distributed_sampler=False,
            accumulate_grad_batches=2,
        )
    method, accumulators = fastmtl.AlignedMTL(), []

    def step(model, losses, h, last):
        accumulators[:] = accumulators or [method.accumulate(model.encoder)]
        accumulators[0].add(losses)
        if last:
            accumulators[0].backward()

    expected = by_hand(step, accumulate=2)
    for (name, p), q in zip(torch.load(path).items(), expected.state_dict().values(), strict=True):
        assert relative(p, q) <= 1e-9, name


def test_a_monitor_writes_to_its_loggers(tmp_path):
    """They have a `log` of another kind as well as `log_metrics`."""
    logger = pl.loggers.CSVLogger(tmp_path)
    monitor = fastmtl.Monitor(logger)
    for _ in range(3):
        monitor(fastmtl.Info.of(alpha=torch.ones(2, dtype=torch.float64)))
    monitor.flush()
    logger.save()
    (path,) = tmp_path.rglob("metrics.csv")
    head, *rows = path.read_text().splitlines()
    assert "fastmtl/alpha/1" in head.split(",")
    assert len(rows) == 3
