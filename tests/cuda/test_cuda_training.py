"""The training API on a GPU, held to the same step on the CPU. Skipped where there is none."""

import pytest
import torch
from torch import nn

import fastmtl

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

F32, F64 = torch.float32, torch.float64


class Model(nn.Module):
    """An encoder of two layers, T heads, one example batch; equal weights wherever it is built."""

    def __init__(self, T, device, dtype=F64):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(T))
        self.x, self.y = torch.randn(16, 20), torch.randn(T, 16, 1)
        self.to(device=device, dtype=dtype)
        self.x, self.y = self.x.to(device, dtype), self.y.to(device, dtype)

    def losses(self, aliases):
        return [nn.functional.mse_loss(head(h), y) for head, h, y in zip(self.heads, aliases, self.y, strict=True)]

    def grads(self):
        return torch.cat([p.grad.reshape(-1) for p in self.parameters()]).cpu()


def fan_out(model, method, **options):
    hs = fastmtl.fan_out(model.encoder(model.x), len(model.heads), method, **options)
    sum(model.losses(hs)).backward()
    return hs.info


def through_representation(model, method):
    h = model.encoder(model.x)
    return method.backward(model.losses([h] * len(model.heads)), representation=h)


def full(model, method, **options):
    h = model.encoder(model.x)
    if options.pop("with_features", False):
        options["features"] = h
    elif "groups" not in options:
        options["shared"] = model.encoder.parameters()
    return method.backward(model.losses([h] * len(model.heads)), **options)


WAYS = {
    "node": fan_out,
    "hooks": lambda model, method: fan_out(model, method, via="hooks"),
    "representation": through_representation,
    "shared": full,
    "features": lambda model, method: full(model, method, with_features=True),
    "batched": lambda model, method: full(model, method, with_features=True, batched=True),
    "gramian": lambda model, method: full(model, method, engine="gramian"),
    "groups": lambda model, method: full(
        model, method, groups=[list(layer.parameters()) for layer in model.encoder if list(layer.parameters())]
    ),
}


@pytest.mark.parametrize("T", [1, 3, 10, 40])
@pytest.mark.parametrize("way", WAYS)
def test_like_the_cpu(way, T):
    host, gpu = Model(T, "cpu"), Model(T, "cuda")
    for method in (fastmtl.AlignedMTL(), fastmtl.AlignedMTL(weights=[1.0 + t for t in range(T)])):
        infos = [WAYS[way](model, method) for model in (host, gpu)]
        assert infos[1].alpha.is_cuda
        torch.testing.assert_close(infos[1].alpha.cpu(), infos[0].alpha, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gpu.grads(), host.grads(), rtol=1e-8, atol=1e-12)


def examples(device, dtype=F64):
    """A network of convolutions, a norm and linear layers, and a loss for each of 12 examples."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 5)),
    )
    x, y = torch.randn(12, 1, 8, 8), torch.randint(5, (12,))
    network, x, y = network.to(device, dtype), x.to(device, dtype), y.to(device)
    return network, lambda: nn.functional.cross_entropy(network(x), y, reduction="none")


@pytest.mark.parametrize("method", [fastmtl.AlignedMTL, fastmtl.UPGrad, fastmtl.Uniform])
def test_losses_of_examples(method):
    """From one pass, as on the CPU."""
    infos, grads = [], []
    for device in ("cpu", "cuda"):
        network, losses = examples(device)
        infos.append(method().backward(losses(), batch_dim=0))
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]).cpu())
    torch.testing.assert_close(infos[1].gram.cpu(), infos[0].gram, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(infos[1].alpha.cpu(), infos[0].alpha, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-7, atol=1e-10)


def test_losses_of_examples_wait_for_their_check_alone():
    _, losses = examples("cuda", F32)
    method = fastmtl.AlignedMTL()
    method.backward(losses(), batch_dim=0, check=False)  # checked as the first of its kind
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.backward(losses(), batch_dim=0, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_convolutions_through_the_gramian_engine():
    """Closed forms of convolutions, batch norm in training mode and linear layers, beside T backward passes."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6)),
    ).to("cuda", F64)
    heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(5)).to("cuda", F64)
    x = torch.randn(7, 3, 9, 9, device="cuda", dtype=F64)
    grads = {}
    for engine in ("full", "gramian"):
        trunk.zero_grad()
        h = trunk(x)
        losses = [head(h).square().mean() for head in heads]
        fastmtl.AlignedMTL().backward(losses, trunk.parameters(), engine=engine)
        grads[engine] = torch.cat([p.grad.flatten() for p in trunk.parameters()])
    torch.testing.assert_close(grads["gramian"], grads["full"], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("way", ["node", "hooks", "representation", "shared", "features", "groups", "gramian"])
def test_nothing_waits_for_the_device(way):
    model, method = Model(3, "cuda", F32), fastmtl.AlignedMTL()
    WAYS[way](model, method)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        WAYS[way](model, method)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", ["node", "representation"])
def test_a_step_in_a_cuda_graph(way):
    """The whole step replayed on new data equals the same step run eagerly."""
    model, method = Model(3, "cuda", F32), fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad()
            WAYS[way](model, method)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        WAYS[way](model, method)
    model.x.copy_(torch.randn_like(model.x))
    for p in model.parameters():
        p.grad.zero_()
    graph.replay()
    replayed = model.grads()
    model.zero_grad()
    WAYS[way](model, method)
    torch.testing.assert_close(replayed, model.grads(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["node", "shared"])
def test_scaler_sees_an_overflow_and_recovers(way):
    model, method = Model(3, "cuda", F32), fastmtl.AlignedMTL()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=100)

    def step(factor):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            h = model.encoder(model.x)
            aliases = fastmtl.fan_out(h, 3, method) if way == "node" else [h] * 3
            losses = [scaler.scale(loss * factor) for loss in model.losses(aliases)]
        if way == "node":
            sum(losses).backward()
        else:
            method.backward(losses, shared=model.encoder.parameters())
        scaler.step(optimizer)
        scaler.update()

    def weights():
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()

    before = weights()
    step(torch.inf)
    assert torch.equal(weights(), before)
    assert scaler.get_scale() == 2.0**7
    step(1.0)
    assert not torch.equal(weights(), before)
    assert bool(weights().isfinite().all())


def test_compiled_with_fan_out_inside():
    model, method, info = Model(3, "cuda", F32), fastmtl.AlignedMTL(), fastmtl.Info(3, device="cuda")

    def loss(x, info):
        return sum(model.losses(fastmtl.fan_out(model.encoder(x), 3, method, info=info)))

    loss(model.x, info).backward()
    eager, alpha = model.grads(), info.alpha.clone()
    model.zero_grad()
    info.alpha.zero_()
    torch.compile(loss, fullgraph=True)(model.x, info).backward()
    torch.testing.assert_close(model.grads(), eager, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(info.alpha, alpha, rtol=1e-4, atol=1e-6)


def test_memory_is_the_captured_gradients():
    """A fan-out holds T gradients of h and the one that goes on, and nothing else of that size."""
    T, side = 8, 1 << 20
    weight = torch.randn(side, device="cuda", requires_grad=True)
    h = weight * 2
    hs = fastmtl.fan_out(h, T, fastmtl.AlignedMTL())
    total = sum((alias * (t + 1.5)).sum() for t, alias in enumerate(hs))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total.backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= (T + 3) * 4 * side  # T captured, the aligned one, the encoder's product with it, and .grad


@pytest.mark.parametrize("way", ["node", "hooks"])
def test_heads_on_streams_of_their_own(way):
    """Autograd brings their gradients to the stream of h, where they are aggregated."""
    model, method = Model(3, "cuda"), fastmtl.AlignedMTL()
    WAYS[way](model, method)
    expected = model.grads()
    for _ in range(5):
        model.zero_grad()
        main, sides = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in model.heads]
        hs = fastmtl.fan_out(model.encoder(model.x), 3, method, via=way)
        losses = []
        for head, h, y, side in zip(model.heads, hs, model.y, sides, strict=True):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                torch.cuda._sleep(1_000_000)
                losses.append(nn.functional.mse_loss(head(h), y))
        for side in sides:
            main.wait_stream(side)
        hs.total(losses).backward()
        torch.testing.assert_close(model.grads(), expected, rtol=1e-9, atol=1e-12)
