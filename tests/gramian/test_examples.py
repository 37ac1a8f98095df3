"""`backward(losses, batch_dim=0)`: B gradients from one backward pass are those of B backward passes."""

import copy
import math

import pytest
import torch
from gramian_models import LAYERS, MODELS, build, resnet18
from helpers import BF16, F32, F64, dtype_id, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl.gramian.examples import layout

# Of an entry of the Gram relative to the norms of its two rows, and of the gradient.
GRAM = {F32: 1e-5, F64: 1e-9}
LIMIT = {F32: 1e-4, F64: 1e-9}

dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)


def weights(B):
    """A weighting without a solver, of another weight for each loss, and of both signs."""
    return torch.linspace(-0.5, 1.0, B, dtype=F64)


def weighted():
    return fastmtl.GramMethod.of(lambda M: weights(M.shape[-1]).expand(M.shape[:-1]))


def jacobian(losses, parameters):
    """One backward pass a loss: [N, P], float64."""
    rows = []
    for loss in losses.flatten():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g.to_dense()).flatten()
                    for g, p in zip(grads, parameters, strict=True)
                ]
            )
        )
    return torch.stack(rows).double()


def gradient(parameters):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).double()


def agree(losses, parameters, dtype=F64, method=None, **options):
    """Holds a step to one backward pass a loss; `losses()` computes them. Returns what the step saw."""
    parameters = [p for p in parameters if p.requires_grad]
    found = losses()
    J = jacobian(found, parameters)
    M = J @ J.T
    for p in parameters:
        p.grad = None
    info = (method or weighted()).backward(found, parameters, batch_dim=found.ndim - 1, **options)
    assert info.gram.dtype is F64
    norms = M.diagonal().sqrt()
    error = (info.gram - M).abs() / torch.where(norms > 0, norms, 1)[:, None] / torch.where(norms > 0, norms, 1)
    assert error.max().item() <= GRAM[dtype]
    got, wanted = gradient(parameters), info.alpha @ J
    assert (got - wanted).norm() <= LIMIT[dtype] * (info.alpha.abs() @ J.norm(dim=1))
    for p in parameters:
        assert p.grad is None or p.grad.dtype is p.dtype
    return info


def losses_of(trunk, x):
    """A loss for each example of x [B, ...] from a trunk's features [B, ...]."""
    h = trunk(x).flatten(1)
    return (h.sin() * torch.linspace(0.5, 2, h.shape[1], dtype=h.dtype)).sum(1)


# ------------------------------------------------------------------------------------- every use of every parameter

MIXING = {
    "batch norm",
    "batch norm of features",
    "resnet18",
}
ENCODERS = ("language model", "language model without adapters", "mtan")  # without one trunk for all tasks
CASES = {name: make for name, make in {**MODELS, **LAYERS}.items() if name not in ENCODERS}


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_uses_of_parameters(name, dtype):
    model = build(CASES[name], dtype)
    if name in MIXING:
        with pytest.raises(ValueError, match="NativeBatchNormBackward0 with statistics of the batch"):
            agree(lambda: losses_of(model.trunk, model.x), model.shared(), dtype)
        return
    agree(lambda: losses_of(model.trunk, model.x), model.shared(), dtype)


BAGS = {
    "mean": {},
    "sum": {"mode": "sum"},
    "weighted": {"mode": "sum", "per_sample_weights": randn(9, seed=4, dtype=F64)},
    "padded": {"mode": "mean", "padding_idx": 2},
    "ended": {"mode": "sum", "include_last_offset": True},
}


@pytest.mark.parametrize("name", BAGS)
def test_bags_of_embeddings(name):
    """Of any number of ids, none included, and ids that repeat."""
    w, ids = nn.Parameter(randn(5, 3, dtype=F64)), torch.tensor([0, 2, 2, 4, 1, 0, 2, 2, 3])
    offsets = torch.tensor([0, 3, 3, 4, 7] + [9] * (name == "ended"))
    info = agree(lambda: F.embedding_bag(ids, w, offsets, **BAGS[name]).sin().sum(1), [w])
    assert info.explicit == ()
    # And in the gramian engine, of tasks.
    y = F.embedding_bag(ids, w, offsets, **BAGS[name])
    losses = [y.sin().sum() * k + (y**k).sum() for k in (1, 2, 3)]
    J = jacobian(torch.stack(losses), [w])
    info = fastmtl.Uniform().backward(losses, [w], engine="gramian")
    assert info.explicit == ()
    torch.testing.assert_close(info.gram, J @ J.T)


# --------------------------------------------------------------------------------------------- models of practice


class LeNet(nn.Module):
    def __init__(self, first=6, second=8):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, first, 5, padding=2), nn.GroupNorm(2, first), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, 3), nn.GroupNorm(2, second), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(second * 2 * 2, 12), nn.ReLU(), nn.Linear(12, 10)),
        )

    def forward(self, x):
        return self.layers(x)


class Adapted(nn.Module):
    """LoRA written by hand on a frozen layer."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = (
            nn.Parameter(torch.randn(rank, layer.in_features)),
            nn.Parameter(torch.randn(layer.out_features, rank)),
        )

    def forward(self, x):
        return self.layer(x) + 0.5 * (x @ self.down.T) @ self.up.T


class Merged(Adapted):
    """The same, merged into the weight."""

    def forward(self, x):
        return F.linear(x, self.layer.weight + 0.5 * self.up @ self.down, self.layer.bias)


class GPT(nn.Module):
    """A language model whose output layer is its embedding, with learnt positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 12), nn.Embedding(6, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 24, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids):
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=h.dtype)
        return self.blocks(h, mask, is_causal=True) @ self.tokens.weight.T


def classes(B, n=10):
    return torch.randint(n, (B,), generator=torch.Generator().manual_seed(2))


def lenet(dtype):
    net, x = LeNet().to(dtype), randn(9, 1, 12, 12, seed=1, dtype=dtype)
    return net, lambda: F.cross_entropy(net(x), classes(9), reduction="none")


def resnet(dtype):
    net = resnet18(4).to(dtype)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(2, child.num_features).to(dtype))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    x = randn(4, 3, 32, 32, seed=1, dtype=dtype)
    return net, lambda: net(x).flatten(1).sin().sum(1)


def encoder(dtype, batch_first=True):
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(dtype)
    x = randn(8, 5, 16, seed=1, dtype=dtype)
    if batch_first:
        return net, lambda: net(x).square().mean((1, 2))
    return net, lambda: net(x.transpose(0, 1)).sin().mean((0, 2))


def gpt(dtype, B=6):
    net = GPT().to(dtype)
    ids = torch.randint(11, (B, 6), generator=torch.Generator().manual_seed(3))
    return net, lambda: F.cross_entropy(net(ids[:, :5]).mT, ids[:, 1:], reduction="none").mean(1)


def lstm(dtype, packed=False):
    net = nn.LSTM(5, 6, num_layers=2, bidirectional=True).to(dtype)
    x = randn(7, 8, 5, seed=1, dtype=dtype)
    if not packed:
        return net, lambda: net(x)[0].square().mean((0, 2))
    sequence = rnn.pack_padded_sequence(x, [7, 7, 5, 4, 4, 2, 1, 1])
    return net, lambda: rnn.pad_packed_sequence(net(sequence)[0])[0].square().mean((0, 2))


def lora(dtype, kind=Adapted):
    net = nn.Sequential(kind(nn.Linear(6, 9)), nn.Tanh(), kind(nn.Linear(9, 5))).to(dtype)
    x = randn(10, 3, 6, seed=1, dtype=dtype)
    return net, lambda: net(x).sin().mean((1, 2))


PRACTICE = {
    "lenet": lenet,
    "resnet18 with group norm": resnet,
    "transformer": encoder,
    "transformer, sequence first": lambda dtype: encoder(dtype, batch_first=False),
    "language model with tied weights": gpt,
    "lstm": lstm,
    "lstm, packed": lambda dtype: lstm(dtype, packed=True),
    "lora": lora,
}


@dtypes
@pytest.mark.parametrize("name", PRACTICE)
def test_models_of_practice(name, dtype):
    torch.manual_seed(0)
    net, losses = PRACTICE[name](dtype)
    info = agree(losses, net.parameters(), dtype)
    # Learnt positions are the same for all examples; oneDNN's LSTM is one operation, taken in float32 alone.
    formed = {"language model with tied weights": 1, "lstm": 16 if dtype is F32 else 0}
    assert len(info.explicit) == formed.get(name, 0)


@pytest.mark.parametrize("method", [fastmtl.UPGrad, fastmtl.AlignedMTL, fastmtl.MGDA, fastmtl.IMTL, fastmtl.DualProj])
def test_the_same_step_as_the_full_engine(method):
    torch.manual_seed(0)
    net, losses = lenet(F64)
    other = copy.deepcopy(net)
    info = method().backward(losses(), batch_dim=0)
    x = randn(9, 1, 12, 12, seed=1, dtype=F64)
    expected = method().backward(F.cross_entropy(other(x), classes(9), reduction="none").unbind(), shared=other)
    torch.testing.assert_close(info.alpha, expected.alpha, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient(net.parameters()), gradient(other.parameters()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["linear", "convolution", "embedding", "dora"])
def test_lora_of_peft(form):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: make test-trainers installs it")
    torch.manual_seed(0)
    x = randn(7, 3, 6, seed=1, dtype=F64)
    if form == "convolution":
        net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Conv1d(4, 2, 3))
    elif form == "embedding":
        x = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(3))
        net = nn.Sequential(nn.Embedding(5, 6), nn.Tanh(), nn.Linear(6, 4))
    else:
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    # Weights as they are after some training: B is zero at first.
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, use_dora=form == "dora")
    model = peft.get_peft_model(net, config).double()
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == (6 if form == "dora" else 4)
    info = agree(lambda: model(x).sin().mean((1, 2)), adapters)
    assert len(info.explicit) == {"dora": 2, "embedding": 1}.get(form, 0)  # the lengths of DoRA; a table, transposed


def test_lora_merged_into_its_weight_is_formed():
    torch.manual_seed(0)
    net, losses = lora(F64, Merged)
    assert agree(losses, net.parameters()).explicit == tuple(f"shared[{k}]" for k in range(4))


WAYS = {
    "t": lambda x, w: x @ w.t(),
    "mT": lambda x, w: x @ w.mT,
    "T": lambda x, w: x @ w.T,
    "permute": lambda x, w: x @ w.permute(1, 0),
    "contiguous": lambda x, w: x @ w.transpose(0, 1).contiguous(),
    "view": lambda x, w: F.linear(x, w.view(5, 3)),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "einsum from the left": lambda x, w: torch.einsum("oi,bi->bo", w, x),
    "einsum of heads": lambda x, w: torch.einsum("bi,hoi->bho", x, w.view(5, 1, 3)).flatten(1),
    "einsum of groups": lambda x, w: torch.einsum("bgi,gio->bgo", x.view(-1, 3, 1), w.view(3, 1, 5)).flatten(1),
}


@dtypes
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_a_product_has_a_closed_form(way, dtype, monkeypatch):
    """In both engines."""
    w, x = nn.Parameter(randn(5, 3, dtype=dtype)), randn(7, 3, seed=1, dtype=dtype)
    assert agree(lambda: WAYS[way](x, w).sin().sum(1), [w], dtype).explicit == ()
    monkeypatch.setattr("fastmtl.gramian.cost.is_cheaper_explicit", lambda *_: False)
    heads = [nn.Linear(math.prod(WAYS[way](x, w).shape[1:]), 1).to(dtype) for _ in range(4)]
    h = WAYS[way](x, w).tanh()
    losses = [head(h).square().mean() for head in heads]
    J = jacobian(torch.stack(losses), [w])
    w.grad = None
    info = weighted().backward(losses, [w], engine="gramian")
    assert info.explicit == ()
    torch.testing.assert_close(info.gram, J @ J.T, rtol=100 * torch.finfo(dtype).eps, atol=100 * torch.finfo(dtype).eps)
    torch.testing.assert_close(w.grad.flatten().double(), info.alpha @ J, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ random networks

WIDTH, LENGTH = 4, 3


class Attended(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.layer, self.batch_first = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first), batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.layer(x, x, x, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)


class Swept(nn.Module):
    """Layers along the sequence: recurrent ones and convolutions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0] if isinstance(self.layer, nn.RNNBase) else self.layer(x.mT).mT


class Scaled(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x * self.scale


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return torch.einsum("bsi,oi->bso", x, self.weight) + x @ self.weight


LAYER = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "group norm": lambda: Swept(nn.GroupNorm(2, WIDTH)),
    "instance norm": lambda: Swept(nn.InstanceNorm1d(WIDTH, affine=True)),
    "convolution": lambda: Swept(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)),
    "attention": lambda: Attended(True),
    "attention, sequence first": lambda: Attended(False),
    "gru": lambda: Swept(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "scale": lambda: Scaled(WIDTH),
    "scale of places": lambda: Scaled(LENGTH, 1),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "product and its transpose": Transposed,
}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_networks(data):
    """Layers in any order, some used again, with ways around them, on batches of any size; of one task or two."""
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    names = data.draw(st.lists(st.sampled_from(sorted(LAYER)), min_size=1, max_size=5), "layers")
    layers = nn.ModuleList(LAYER[name]() for name in names).double()
    order = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=6), "order")
    around = data.draw(st.lists(st.booleans(), min_size=6, max_size=6), "around")
    examples, T = data.draw(st.integers(1, 9), "examples"), data.draw(st.integers(1, 2), "tasks")
    embedded = data.draw(st.booleans(), "embedded")
    table = nn.Embedding(5, WIDTH).double()
    ids = torch.randint(5, (examples, LENGTH))
    x = randn(examples, LENGTH, WIDTH, seed=1, dtype=F64)

    def losses():
        h = table(ids) if embedded else x
        for k, skip in zip(order, around, strict=False):
            h = layers[k](h).tanh() + (h if skip else 0)
        if embedded:  # tied
            h = h @ table.weight.T
        rows = [h.sin().sum((1, 2)), h.square().mean((1, 2))][:T]
        return rows[0] if T == 1 else torch.stack(rows)

    parameters = [*layers.parameters(), *table.parameters()]
    found = losses()
    used = torch.autograd.grad(found.sum(), parameters, allow_unused=True)
    parameters = [p for p, g in zip(parameters, used, strict=True) if g is not None]
    agree(losses, parameters)


# ------------------------------------------------------------------------------------------------ what models also do

N = 8
X2, X3 = randn(N, 6, seed=1, dtype=F64), randn(N, 5, 6, seed=2, dtype=F64)
IDS = torch.randint(9, (N, 7), generator=torch.Generator().manual_seed(4))
LATE = torch.arange(N) > 2
PADDED = (torch.arange(N)[:, None] % 2 == 0) & (torch.arange(5) >= 3)


class Parts(nn.Module):
    """Layers and parameters to make models of."""

    def __init__(self):
        super().__init__()
        self.w, self.wide = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(12, 6))
        self.a, self.b, self.frozen = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 6).requires_grad_(False)
        self.table, self.attention = nn.Embedding(9, 6, padding_idx=0), nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(6).eval()
        self.scale = nn.Parameter(torch.tensor(0.7))


# What N losses are made of, each of an example of its own: their sines, summed over all that follows the batch.
ODD = {
    "a weight as it is, its transpose and a copy": lambda m: (X2 @ m.w).tanh() @ m.w.T.contiguous(),
    "a weight in three spellings": lambda m: torch.einsum(
        "bi,io->bo", F.linear(X2, m.w).tanh() @ m.w, m.w.view(2, 3, 6).reshape(6, 6)
    ),
    "a weight with and without positions": lambda m: F.linear(X3, m.w).tanh().mean(1) @ m.w.T,
    "chunks of a weight": lambda m: sum((X2 @ part.T).tanh() for part in m.wide.chunk(3)),
    "slices that overlap": lambda m: X2 @ m.wide[:8].T + (X2 @ m.wide[4:].T).cos(),
    "rows taken by a list": lambda m: X2 @ m.wide[[0, 3, 3, 5]].T,
    "dropout": lambda m: m.b(F.dropout(m.a(X2), 0.5)),
    "dropout in a checkpoint": lambda m: m.b(
        checkpoint(lambda z: F.dropout(m.a(z).tanh(), 0.3), X2, use_reentrant=False)
    ),
    "in place": lambda m: m.b(F.leaky_relu_(m.a(X2).add_(1).mul_(2), 0.1)),
    "relu in place": lambda m: m.b(F.relu_(m.a(X2))),
    "frozen between, and a scale": lambda m: m.b(m.scale * m.frozen(m.norm(m.a(X2))).tanh()),
    "attention with padding": lambda m: m.attention(X3, X3, X3, key_padding_mask=PADDED)[0],
    "ids, some of padding": lambda m: m.b(m.table(IDS).mean(1)),
    "ids as indices": lambda m: m.table.weight[IDS],
    "ids of a table with sparse gradients": lambda m: m.b(F.embedding(IDS, m.table.weight, sparse=True)),
    "bags of a table with sparse gradients": lambda m: F.embedding_bag(IDS, m.table.weight, sparse=True),
    "ids as unit vectors": lambda m: F.one_hot(IDS, 9).double() @ m.table.weight,
    "the batch comes last": lambda m: (m.w @ X2.T).T,
    "inputs of another": lambda m: m.a(X2.flip(0)),
    "inputs of two, at two calls": lambda m: m.a(X2) * m.a(X2).flip(0),
    "sorted losses": lambda m: m.a(X2).sum(1).sort().values,
    "losses of the first": lambda m: m.a(X2)[:5],
    "losses of every other": lambda m: m.a(X2)[::2],
    "losses that a mask takes": lambda m: m.a(X2)[LATE],
    "losses that a mask makes zero": lambda m: m.a(X2) * LATE[:, None],
    "spectra, filtered": lambda m: torch.fft.irfft(torch.fft.rfft(m.a(X2)) * torch.polar(m.w[0, :4].abs(), m.w[1, :4])),
    "spectra, times real numbers": lambda m: (torch.fft.fft(m.a(X2)) * m.scale + 1j * m.scale).abs(),
    "spectra, mixed": lambda m: (torch.fft.rfft(X2).conj() @ torch.view_as_complex(m.wide.view(-1, 4, 2)[:4])).abs(),
    "spectra, weighted": lambda m: torch.view_as_real(
        torch.fft.rfft(X3) / torch.complex(m.wide[:5, :4], m.wide[5:10, :4])
    ),
    "examples seen twice": lambda m: m.b(m.a(X2.repeat(2, 1)).tanh()).view(2, N, 4).sum(0),
}
FORMED = {
    "slices that overlap": 1,
    "rows taken by a list": 1,
    "ids as indices": 1,
    "ids of a table with sparse gradients": 1,
    "bags of a table with sparse gradients": 1,
    "spectra, filtered": 1,
    "spectra, times real numbers": 1,
    "spectra, mixed": 1,
    "spectra, weighted": 1,
}


@pytest.mark.parametrize("name", ODD)
def test_what_models_also_do(name):
    torch.manual_seed(0)
    m = Parts().double()

    def losses():
        torch.manual_seed(7)  # the same dropout
        h = ODD[name](m).sin()
        return h.flatten(1).sum(1) if h.ndim > 1 else h

    parameters = [p for p in m.parameters() if p.requires_grad]
    used = torch.autograd.grad(losses().sum(), parameters, allow_unused=True)
    info = agree(losses, [p for p, g in zip(parameters, used, strict=True) if g is not None])
    assert len(info.explicit) == FORMED.get(name, 0)


# ------------------------------------------------------------------------------------------------ several tasks


def several(dtype=F64, B=6, T=3):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.Tanh()).to(dtype)
    heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(T)).to(dtype)
    x = randn(B, 1, 8, 8, seed=1, dtype=dtype)
    return trunk, heads, lambda: torch.stack([(h(trunk(x)) - 1).square().squeeze(1) for h in heads])


@pytest.mark.parametrize("B", [1, 2, 6])
def test_tasks_times_examples(B):
    trunk, _, losses = several(B=B)
    info = agree(losses, trunk.parameters())
    assert info.alpha.shape == (3 * B,)
    # The batch may come first.
    again = weighted().backward(losses().T, trunk, batch_dim=0)
    torch.testing.assert_close(again.gram, info.gram)


def test_tasks_times_examples_of_tied_weights():
    torch.manual_seed(0)
    net, losses = gpt(F64)
    agree(lambda: torch.stack([losses(), losses().sin()]), net.parameters())


@pytest.mark.parametrize("name", ["trunk", "language model with tied weights", "lora", "transformer"])
@pytest.mark.parametrize("per", ["example", "task"])
def test_problems_of_their_own(per, name):
    """Blocks of the whole matrix, and the sum of what they bring."""
    torch.manual_seed(0)
    if name == "trunk":
        trunk, _, losses = several()
    else:
        trunk, one = PRACTICE[name](F64)
        losses = lambda: torch.stack([one(), one().sin(), one().square()])  # noqa: E731
    parameters = list(trunk.parameters())
    found = losses()
    T, B = found.shape
    J = jacobian(found, [p for p in parameters if p.requires_grad]).view(T, B, -1)
    for p in parameters:
        p.grad = None
    info = fastmtl.UPGrad().backward(found, trunk, batch_dim=1, per=per)
    own = J.transpose(0, 1) if per == "example" else J
    torch.testing.assert_close(info.gram, own @ own.mT, rtol=1e-9, atol=1e-12)
    assert info.alpha.shape == own.shape[:2]
    expected = torch.stack([fastmtl.UPGrad()(problem) for problem in own]).sum(0)
    torch.testing.assert_close(gradient([p for p in parameters if p.requires_grad]), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale_heads", [False, True])
def test_heads_get_the_sum_of_their_examples_gradients(scale_heads):
    trunk, heads, losses = several()
    found = losses()
    J = jacobian(found, list(heads.parameters()))
    for p in heads.parameters():
        p.grad = None
    info = weighted().backward(found, trunk, batch_dim=1, scale_heads=scale_heads)
    weight = info.alpha if scale_heads else torch.ones_like(info.alpha)
    torch.testing.assert_close(gradient(heads.parameters()), weight @ J)


def test_gradients_accumulate_over_parts_of_a_batch():
    """A step for each part; what they weigh is each part's own affair."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3).double(), randn(8, 4, seed=1, dtype=F64)
    method, parts = fastmtl.UPGrad(), []
    for part in x.chunk(2):
        net.zero_grad()
        method.backward(net(part).sin().sum(1), batch_dim=0)
        parts.append(gradient(net.parameters()))
    net.zero_grad()
    for part in x.chunk(2):
        method.backward(net(part).sin().sum(1), batch_dim=0)
    torch.testing.assert_close(gradient(net.parameters()), sum(parts))


# ------------------------------------------------------------------------------------------ what must be refused


def refused(losses, parameters, match="losses: expected loss b to depend on example b alone"):
    """Raises, and whatever was in .grad is there still."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.full_like(p, 7)
    with pytest.raises(ValueError, match=match):
        fastmtl.UPGrad().backward(losses(), batch_dim=0)
    assert all((p.grad == 7).all() for p in parameters)


B = 8
MIXED = {
    "contrastive": lambda lin, x: F.cross_entropy(lin(x) @ lin(x).T, torch.arange(B), reduction="none"),
    "centred by the batch": lambda lin, x: (lin(x) - lin(x).mean(0)).square().mean(1),
    "scaled by the batch": lambda lin, x: (lin(x) / lin(x).std(0)).square().mean(1),
    "ranked against each other": lambda lin, x: F.softplus(lin(x)[:, :1] - lin(x)[:, :1].T).mean(1),
    "batch norm": lambda lin, x: F.batch_norm(lin(x), None, None, training=True).sin().mean(1),
    "attention over the batch": lambda lin, x: F.scaled_dot_product_attention(*[lin(x)[None]] * 3)[0].square().mean(1),
    "1e-5 of a neighbour": lambda lin, x: (y := lin(x).square().mean(1)) + 1e-5 * y.roll(1),
    "1e-5 of all others": lambda lin, x: (y := lin(x).square().mean(1)) + 1e-5 * y.sum(),
    "with another": lambda lin, x: ((y := lin(x)) * y.flip(0)).square().mean(1),
    "a sum over those before": lambda lin, x: lin(x).cumsum(0).square().mean(1),
    "the largest of all": lambda lin, x: ((y := lin(x)) - y.max(0).values).square().mean(1),
    "1e-7 of one row": lambda lin, x: (
        ((y := lin(x)) + 1e-7 * y.roll(1, 0) * (torch.arange(B) == 3)[:, None]).square().mean(1)
    ),
    "1e-5 of one other": lambda lin, x: (y := lin(x).square().mean(1)) + 1e-5 * y[3] * (torch.arange(B) == 5),
}


@dtypes
@pytest.mark.parametrize("name", MIXED)
def test_mixing_is_caught(name, dtype):
    torch.manual_seed(0)
    lin, x = nn.Linear(6, 3).to(dtype), randn(B, 6, seed=1, dtype=dtype)
    refused(lambda: MIXED[name](lin, x), lin.parameters())


def test_mixing_is_caught_every_time():
    """Whatever factors are drawn: of up to 61 examples no two have the same."""
    lin, x = nn.Linear(6, 3), randn(60, 6, seed=1)
    for _ in range(30):
        refused(lambda: (y := lin(x).square().mean(1)) + 1e-5 * y[3] * (torch.arange(60) == 41), lin.parameters())


def test_batch_norm_is_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = randn(B, 3, 6, 6, seed=1)
    refused(lambda: net(x).sin().mean(1), net.parameters(), "NativeBatchNormBackward0 with statistics of the batch")
    net.eval()
    agree(lambda: net(x).sin().mean(1), net.parameters(), F32)


SEQUENCES = {  # of layers that read all positions of all examples as rows, as many as there are
    "statistics": lambda m, h: m.out((h - h.mean(0)).tanh()),
    "batch norm of sequences": lambda m, h: m.out(m.norm(h.mT).mT),
    "attention that takes the batch for the sequence": lambda m, h: m.attention(h, h, h, need_weights=False)[0],
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("examples", [4, 5, 6])
def test_mixing_behind_a_layer_of_positions_is_caught(name, examples):
    """The rows of such a layer are not as many as there are examples, as those of a table are not."""
    torch.manual_seed(0)
    m, x = nn.Module(), randn(examples, 6, 3, seed=1, dtype=F64)
    m.first, m.norm, m.out, m.attention = (
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 2),
        nn.MultiheadAttention(4, 2),
    )
    m.double()
    with pytest.raises(ValueError, match="expected loss b to depend on example b alone"):
        weighted().backward(SEQUENCES[name](m, m.first(x)).square().mean((1, 2)), batch_dim=0)
    assert all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize("examples", range(3, 8))
def test_what_is_made_of_parameters_and_buffers(examples):
    """Whatever its sizes are, if its rows are not as many as there are examples."""
    torch.manual_seed(0)
    lin = parametrizations.spectral_norm(nn.Linear(5, 4)).double().eval()
    x = randn(examples, 5, seed=1, dtype=F64)
    agree(lambda: lin(x).sin().sum(1), lin.parameters())
    tower, words = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)).double(), randn(8, 3, seed=2, dtype=F64)
    agree(lambda: (x @ tower(words).T).logsumexp(1), tower.parameters())


def test_a_weight_made_with_buffers_that_is_as_wide_as_the_batch():
    """As good as an activation, as far as a graph tells; with another batch size it is a weight."""
    torch.manual_seed(0)
    lin = parametrizations.orthogonal(nn.Linear(5, 4)).double()
    agree(lambda: lin(randn(6, 5, seed=1, dtype=F64)).sin().sum(1), lin.parameters())
    with pytest.raises(
        ValueError, match="a weight, made of parameters and buffers as by a parametrization, its dimension"
    ):
        agree(lambda: lin(randn(5, 5, seed=1, dtype=F64)).sin().sum(1), lin.parameters())


def test_statistics_without_a_gradient_do_not_mix():
    torch.manual_seed(0)
    lin, x = nn.Linear(6, 3).double(), randn(B, 6, seed=1, dtype=F64)
    agree(lambda: (lin(x) - lin(x).mean(0).detach()).square().mean(1), lin.parameters())
    agree(lambda: lin(x - x.mean(0)).square().mean(1), lin.parameters())


def test_nested_tensors_are_refused():
    net, rows = nn.Linear(5, 4), [randn(k, 5) for k in (2, 3, 1)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    losses = torch.stack([y.sin().sum() for y in net(x).unbind()])
    with pytest.raises(NotImplementedError, match="batch_dim: expected no nested tensor"):
        fastmtl.UPGrad().backward(losses, batch_dim=0)
    assert net.weight.grad is None


def test_checkpoints_and_compiled_parts():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double(), randn(7, 5, dtype=F64)
    info = agree(lambda: checkpoint(net, x, use_reentrant=False).sin().sum(1), net.parameters())
    assert info.explicit == ()
    compiled = torch.compile(net, backend="aot_eager")
    info = agree(lambda: compiled(x).sin().sum(1), net.parameters())
    assert len(info.explicit) == 4  # one operation, which is run back for each example


def test_rows_in_any_order():
    torch.manual_seed(0)
    lin, x = nn.Linear(6, 3).double(), randn(B, 6, seed=1, dtype=F64)
    order = torch.randperm(B)
    agree(lambda: lin(x).square().mean(1)[order], lin.parameters())
    agree(lambda: lin(x.repeat(3, 1)).square().mean(1).view(3, B).sum(0), lin.parameters())
    agree(lambda: lin(x.repeat_interleave(3, 0)).square().mean(1).view(B, 3).sum(1), lin.parameters())
    group = torch.tensor([0, 3, 3, 3, 1, 7, 7, 2, 4, 5, 6, 0])  # rows of examples, as many as there are
    rows = randn(12, 6, seed=2, dtype=F64)
    agree(lambda: torch.zeros(B, dtype=F64).index_add(0, group, lin(rows).square().mean(1)), lin.parameters())


class Packed(nn.Module):
    """Sequences of any lengths, of which as many rows follow each other as are that long."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.layer(packed)[1][0][-1])


class Routed(nn.Module):
    """Two experts, which take those rows that a router sends them."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(3, 2), nn.ModuleList(nn.Linear(3, 4) for _ in range(2))

    def forward(self, x, _):
        shares, out = self.router(x).softmax(-1), x.new_zeros(*x.shape[:2], 4)
        for k, expert in enumerate(self.experts):
            mine = shares.argmax(-1) == k
            out[mine] = (expert(x[mine]) * shares[..., k][mine][:, None]).to(x.dtype)
        return out.mean(1)


@pytest.mark.parametrize("examples", [61, 62, 200])
@pytest.mark.parametrize("make", [Packed, Routed])
def test_rows_in_any_order_of_more_examples_than_there_are_factors(make, examples):
    torch.manual_seed(0)
    net, x = make().double(), randn(examples, 5, 3, seed=1, dtype=F64)
    lengths = torch.randint(1, 6, (examples,))
    agree(lambda: net(x, lengths).square().mean(1), net.parameters())
    for mixed in (lambda h: h - h.mean(0), lambda h: h + 1e-5 * h.roll(1, 0)):
        with pytest.raises(ValueError, match="expected loss b to depend on example b alone"):
            agree(lambda mixed=mixed: mixed(net(x, lengths)).square().mean(1), net.parameters())


def test_rows_in_any_order_of_half_precision():
    torch.manual_seed(0)
    net, x, lengths = Routed(), randn(40, 5, 3, seed=1), torch.full((40,), 5)
    with torch.autocast("cpu", torch.float16):
        losses = net(x, lengths).float().square().mean(1)
    J = jacobian(losses, list(net.parameters()))
    info = weighted().backward(losses, batch_dim=0)
    norms = J.norm(dim=1)
    assert ((info.gram - J @ J.T).abs() / norms / norms[:, None]).max() < 2e-3


ARGUMENTS = [
    ({"batch_dim": 1}, ValueError, "batch_dim: expected a dimension of losses"),
    ({"batch_dim": True}, ValueError, "batch_dim: expected a dimension of losses"),
    ({"batch_dim": 0, "per": "row"}, ValueError, "per: expected one of 'all', 'example', 'task', got 'row'"),
    ({"per": "example"}, ValueError, "batch_dim: expected a dimension of the losses with per"),
    ({"check": False}, ValueError, "batch_dim: expected a dimension of the losses with check"),
    ({"batch_dim": 0, "batched": True}, ValueError, "batched: expected False with batch_dim"),
    ({"batch_dim": 0, "features": 1}, ValueError, "features: expected None with batch_dim"),
    ({"batch_dim": 0, "groups": [1]}, ValueError, "groups: expected None with batch_dim"),
    (
        {"batch_dim": 0, "process_group": True},
        ValueError,
        "process_group: expected None with batch_dim, got bool: ",
    ),
]


@pytest.mark.parametrize(("options", "error", "match"), ARGUMENTS)
def test_arguments(options, error, match):
    net = nn.Linear(3, 1)
    with pytest.raises(error, match=match):
        fastmtl.UPGrad().backward(net(randn(5, 3)).squeeze(1), **options)
    assert net.weight.grad is None


def test_losses_that_are_none():
    net = nn.Linear(3, 1)
    y = net(randn(5, 3))
    method = fastmtl.UPGrad()
    for losses, error, match in (
        (list(y.squeeze(1).unbind()), TypeError, "losses: expected a floating tensor"),
        (y[None], ValueError, "losses: expected shape"),
        (y.sum(), ValueError, "losses: expected shape"),
        (y[:0, 0], ValueError, "losses: expected shape"),
        (y.detach()[:, 0], ValueError, "losses: expected losses that require grad"),
    ):
        with pytest.raises(error, match=match):
            method.backward(losses, batch_dim=0)
    with pytest.raises(ValueError, match="batch_dim: expected None for a method that needs more than the Gram"):
        fastmtl.GradDrop().backward(y[:, 0], batch_dim=0)
    with pytest.raises(ValueError, match="shared: expected parameters that a loss depends on"):
        method.backward(y[:, 0], nn.Linear(2, 2), batch_dim=0)


# ------------------------------------------------------------------------------------------------ numbers


def test_losses_that_are_not_finite_make_the_step_so():
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), randn(6, 4, seed=1)
    scale = torch.ones(6)
    scale[2] = math.nan
    info = fastmtl.UPGrad().backward(net(x).squeeze(1) * scale, batch_dim=0)
    assert info.alpha.isnan().all()
    assert all(p.grad.isnan().all() for p in net.parameters())


def test_losses_without_a_gradient_have_no_weight():
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double(), randn(6, 4, seed=1, dtype=F64)
    scale = torch.ones(6, dtype=F64)
    scale[2] = 0
    info = fastmtl.AlignedMTL().backward(net(x).squeeze(1) * scale, batch_dim=0)
    assert info.alpha[2] == 0
    assert (info.gram[2] == 0).all()


@pytest.mark.parametrize("size", [1e-25, 1e-18, 1e-6, 1e6, 1e15, 1e25])
def test_losses_of_any_size(size):
    """Beside each other, too: entries are held to the norms of their rows."""
    torch.manual_seed(0)
    scale = torch.ones(8)
    scale[3] = size
    mlp, x = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)), randn(8, 5, seed=1)
    for net, one in (encoder(F32), (mlp, lambda: mlp(x).square().mean(1))):
        agree(lambda: one() * scale, net.parameters(), F32)  # noqa: B023
        agree(lambda: one() * size, net.parameters(), F32)  # noqa: B023
    # And inputs.
    agree(lambda: mlp(x * scale[:, None] ** 0.5).square().mean(1), mlp.parameters(), F32)


def test_losses_that_have_all_but_vanished():
    """As of a classifier that is sure: their cotangents are below float32's normal range, in one pass or both."""
    for seed in range(6):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 2))
        x = torch.randn(64, 2)
        right = net(x).argmax(1)
        with torch.no_grad():
            net[3].weight *= 200
        losses = F.cross_entropy(net(x), right, reduction="none")
        J = jacobian(losses, list(net.parameters()))
        info = fastmtl.Uniform().backward(losses, batch_dim=0)
        assert (info.gram - J @ J.T).norm() < 1e-5 * (J @ J.T).norm()


def test_sums_over_positions_that_cancel():
    """A large mean of the inputs, and cotangents that add up to nothing."""
    torch.manual_seed(0)
    lin, x = nn.Linear(8, 4), randn(6, 50, 8, seed=1) + 1000
    sign = torch.ones(50).index_fill(0, torch.arange(0, 50, 2), -1)
    exact = copy.deepcopy(lin).double()
    J = jacobian((exact(x.double()) * sign[:, None]).mean((1, 2)), [exact.weight])
    M, norms = J @ J.T, J.norm(dim=1)
    info = weighted().backward((lin(x) * sign[:, None]).mean((1, 2)), [lin.weight], batch_dim=0)
    assert ((info.gram - M).abs() / norms / norms[:, None]).max() < 1e-6


@pytest.mark.parametrize("B", [300, 500])
def test_large_batches(B):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    x = randn(B, 5, seed=1)
    agree(lambda: net(x).square().mean(1), net.parameters(), F32)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("size", [1.0, 2.0**12])
def test_autocast(dtype, size):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.LayerNorm(32)), randn(12, 16, seed=1)

    def losses():
        with torch.autocast("cpu", dtype):
            h = net(x)
        return size * h.float().sin().sum(1)

    found = losses()
    J = jacobian(found, list(net.parameters()))
    net.zero_grad()
    info = weighted().backward(found, batch_dim=0)
    M, norms = J @ J.T, J.norm(dim=1)
    assert ((info.gram - M).abs() / norms / norms[:, None]).max() < 2e-2
    assert (gradient(net.parameters()) - info.alpha @ J).norm() < 2e-2 * (info.alpha.abs() @ norms)


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_windows_of_convolutions_are_made_for_some_examples_at_a_time(size, monkeypatch):
    """Which is neither seen in the numbers nor, where the kernel is large, in memory."""
    from fastmtl.gramian.examples import parts, products

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=2, dilation=2), nn.Tanh())
    x = size * randn(6, 3, 24, 20, seed=1)
    x[2] *= 1e-6
    losses = lambda: size * net(x / size).flatten(1).sin().sum(1)  # noqa: E731
    made = []
    windows = parts.Convolution.windows
    monkeypatch.setattr(
        parts.Convolution, "windows", lambda self, *a: made.append(a[2] - a[1]) or windows(self, *a), raising=True
    )
    monkeypatch.setattr(products, "_ENTRIES", 1 << 15)
    agree(losses, net.parameters(), F32)
    assert made
    assert max(made) <= 2
    agree(lambda: torch.stack([losses(), losses().sin()]), net.parameters(), F32)
    made.clear()
    monkeypatch.setattr(parts, "_FEW", 1000)
    agree(losses, net.parameters(), F32)
    assert not made


# ------------------------------------------------------------------------------------------------ memory


def held(function, *args):
    """The most bytes that a call takes from torch's allocator at once, and what it keeps with its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function(*args)
    blocks = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for block in sorted(blocks, key=lambda e: e.start_ns()):
        now += block.nbytes()
        peak = max(peak, now)
    del result
    return peak, now


def test_memory_is_that_of_a_plain_step_and_a_part_of_the_activations():
    torch.manual_seed(0)
    nets = {
        "wide": nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)),
        "lenet": LeNet(16, 32),
        "long": nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Flatten(), nn.Linear(4096, 10)),
    }
    x = {"wide": randn(48, 64), "lenet": randn(48, 1, 12, 12), "long": randn(48, 64, 64)}
    for name, net in nets.items():
        losses = lambda: F.cross_entropy(net(x[name]), classes(48), reduction="none")  # noqa: B023, E731

        def plain(net=net, losses=losses):
            net.zero_grad()
            losses().mean().backward()

        def step(net=net, losses=losses):
            net.zero_grad()
            fastmtl.Uniform().backward(losses(), batch_dim=0)

        step()
        net.zero_grad()
        _, activations = held(losses)
        peaks = []
        for function in (plain, step):
            net.zero_grad()  # what was there before would be given back within
            peaks.append(held(function)[0])
        extra = peaks[1] - peaks[0]
        assert activations > 48 * 1000, "measured"
        assert extra < 1.5 * activations, name
        if name == "wide":
            assert extra < 0.02 * 48 * 4 * sum(p.numel() for p in net.parameters())


# ------------------------------------------------------------------------------------------------ the rest


def test_hooks_of_activations_are_part_of_the_pass():
    torch.manual_seed(0)
    a, b, x = nn.Linear(5, 6).double(), nn.Linear(6, 3).double(), randn(7, 5, dtype=F64)
    kept = []

    def losses(factor=2.0):
        h = a(x)
        h.register_hook(lambda g: g * factor)
        h.retain_grad()
        kept.append(h)
        y = b(h.tanh())
        y.register_hook(lambda g: -g)
        return y.sin().sum(1)

    parameters = [*a.parameters(), *b.parameters()]
    agree(losses, parameters)
    agree(losses, [a.weight, b.weight])  # with other leaves
    agree(lambda: torch.stack([losses(), losses(-1.0)]), parameters)
    assert kept[-1].grad is not None


def test_the_monitor_and_diagnostics_take_it():
    torch.manual_seed(0)
    net, losses = encoder(F64)
    monitor = fastmtl.Monitor()
    for _ in range(3):
        net.zero_grad()
        info = fastmtl.UPGrad().backward(losses(), batch_dim=0)
        monitor(info, losses())
    assert monitor.history["norms"].shape == (3, 8)
    J = jacobian(losses(), list(net.parameters()))
    torch.testing.assert_close(fastmtl.diagnostics.norms(info), J.norm(dim=1))


def test_weights_that_are_kept_for_some_steps():
    torch.manual_seed(0)
    _, losses = encoder(F64)
    method = fastmtl.NashMTL(every=3)
    first, second = (method.backward(losses(), batch_dim=0) for _ in range(2))
    torch.testing.assert_close(first.alpha, second.alpha)


@pytest.mark.parametrize("per", ["all", "example", "task"])
@pytest.mark.parametrize("scale_heads", [False, True])
def test_steps_between_two_solutions(per, scale_heads):
    """With the weights of the step before, by their places in the batch; a batch of another size has its own."""
    trunk, heads, losses = several()
    method = fastmtl.UPGrad()

    def step(found):
        for p in (*trunk.parameters(), *heads.parameters()):
            p.grad = None
        return method.backward(found, trunk, batch_dim=1, per=per, every=3, scale_heads=scale_heads)

    first = step(losses())
    for age in (1, 2):
        with torch.no_grad():
            trunk[0].weight.mul_(1.1)  # not the problem that was solved
        found = losses()
        J = [jacobian(found, list(part.parameters())) for part in (trunk, heads)]
        info = step(found)
        assert (info.age, info.gram) == (age, None)
        torch.testing.assert_close(info.alpha, first.alpha)
        alpha = (info.alpha.mT if per == "example" else info.alpha).flatten()
        torch.testing.assert_close(gradient(trunk.parameters()), alpha @ J[0])
        torch.testing.assert_close(
            gradient(heads.parameters()), (alpha if scale_heads else torch.ones(18)).to(F64) @ J[1]
        )
    assert step(losses()).gram is not None
    assert step(losses()).gram is None
    assert step(losses()[:, :4]).gram is not None
    assert step(losses()[:, :4]).gram is None
    assert step(losses()).gram is not None


def test_hooks_of_weights_are_refused():
    lin, x = nn.Linear(4, 3), randn(5, 4, seed=1)
    y = lin(x)
    y.grad_fn.register_hook(lambda *_: None)
    with pytest.raises(
        NotImplementedError, match=r"batch_dim: .* is read by an operation, or as a view, that has hooks"
    ):
        fastmtl.UPGrad().backward(y.square().mean(1), lin, batch_dim=0)
    assert lin.weight.grad is None


def test_hooks_of_parameters_run_once():
    lin, x, seen = nn.Linear(4, 3), randn(5, 4, seed=1), []
    lin.weight.register_hook(lambda g: seen.append(g.clone()))
    fastmtl.UPGrad().backward(lin(x).square().mean(1), batch_dim=0)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], lin.weight.grad)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_the_graph_is_freed_unless_it_is_to_be_kept(retain_graph):
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), randn(6, 4, seed=1)
    losses = net(x).squeeze(1)
    fastmtl.UPGrad().backward(losses, batch_dim=0, retain_graph=retain_graph)
    if retain_graph:
        fastmtl.UPGrad().backward(losses, batch_dim=0)
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


def test_random_numbers_are_the_users():
    lin, x = nn.Linear(4, 3), randn(5, 4, seed=1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fastmtl.UPGrad().backward(lin(x).square().mean(1), batch_dim=0)
    assert torch.equal(torch.rand(3), expected)


def test_another_default_device():
    layout._draws.cache_clear()
    lin, x = nn.Linear(4, 3).double(), randn(5, 4, seed=1, dtype=F64)
    try:
        with torch.device("meta"):
            info = fastmtl.UPGrad().backward(lin(x).square().mean(1), batch_dim=0)
    finally:
        layout._draws.cache_clear()
    J = jacobian(lin(x).square().mean(1), list(lin.parameters()))
    torch.testing.assert_close(info.gram, J @ J.T)


@pytest.mark.parametrize("n", [1, 2, 33, 61, 62, 500])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16], ids=dtype_id)
def test_factors_are_powers_of_two_as_different_as_can_be(n, dtype):
    ws = layout.draw(n, dtype, torch.device("cpu")).double()
    assert (ws.log2() == ws.log2().round()).all()
    assert ws.unique(dim=1).shape[1] == n
    w, symbols = ws[0], 9 if dtype is torch.float16 else 61
    assert symbols ** (len(ws) - 1) < max(n, 2) <= symbols ** len(ws)
    assert len(w.unique()) == min(n, symbols)
    assert w.unique(return_counts=True)[1].max() == -(-n // symbols)


@pytest.mark.parametrize("name", ["lenet", "transformer, sequence first", "language model with tied weights", "lora"])
def test_a_graph_that_is_known_is_not_checked_again(name, monkeypatch):
    torch.manual_seed(0)
    net, losses = PRACTICE[name](F64)
    agree(losses, net.parameters(), check=False)
    monkeypatch.setattr(layout, "find", lambda *_, **__: pytest.fail("checked"))
    agree(losses, net.parameters(), check=False)
    with pytest.raises(pytest.fail.Exception):
        fastmtl.UPGrad().backward(losses()[:-1], batch_dim=0, check=False)  # of other shapes


def test_a_graph_that_mixes_is_checked_also_when_it_is_not_to_be():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), randn(B, 6, seed=1)
    net.eval()
    for _ in range(2):
        fastmtl.UPGrad().backward(net(x).squeeze(1), batch_dim=0, check=False)
    net.train()
    with pytest.raises(ValueError, match="NativeBatchNormBackward0"):
        fastmtl.UPGrad().backward(net(x).squeeze(1), batch_dim=0, check=False)


# ------------------------------------------------------------------------------------------------ engine="auto"


@pytest.mark.parametrize("form", ["vector", "unbound", "list"])
def test_auto_recognises_the_entries_of_a_vector(form, monkeypatch):
    from fastmtl.gramian.examples import engine

    torch.manual_seed(0)
    net, losses = lenet(F64)
    other = copy.deepcopy(net)
    passes = []
    monkeypatch.setattr(engine, "run", lambda *a, run=engine.run, **k: passes.append(1) or run(*a, **k))
    for _ in range(2):
        net.zero_grad()
        found = losses()
        form_of = {"vector": found, "unbound": found.unbind(), "list": list(found.unbind())}
        info = fastmtl.UPGrad().backward(form_of[form], shared=net, engine="auto")
    assert len(passes) == 2
    x = randn(9, 1, 12, 12, seed=1, dtype=F64)
    vector = F.cross_entropy(other(x), classes(9), reduction="none")
    expected = fastmtl.UPGrad().backward(vector, shared=other, engine="full")
    torch.testing.assert_close(info.alpha, expected.alpha, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient(net.parameters()), gradient(other.parameters()), rtol=1e-6, atol=1e-9)


def test_auto_takes_another_engine_where_examples_mix(monkeypatch):
    from fastmtl.gramian.examples import engine

    passes = []
    monkeypatch.setattr(engine, "run", lambda *a, run=engine.run, **k: passes.append(1) or run(*a, **k))
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)).double(), randn(9, 5, dtype=F64)
    other = copy.deepcopy(net)
    for _ in range(2):  # the second time it is known
        net.zero_grad()
        info = fastmtl.UPGrad().backward(net(x).square().squeeze(1), shared=net, engine="auto")
    assert len(passes) == 1
    other(x)
    expected = fastmtl.UPGrad().backward(other(x).square().squeeze(1), shared=other, engine="full")
    torch.testing.assert_close(info.alpha, expected.alpha, rtol=1e-6, atol=1e-9)


def test_auto_takes_tasks_for_tasks(monkeypatch):
    """Stacked losses, entries in another order, some of them, and few."""
    from fastmtl.gramian.examples import engine

    monkeypatch.setattr(engine, "run", lambda *_, **__: pytest.fail("taken for examples"))
    trunk, _, losses = several(T=8)
    tasks = losses().mean(1)
    vector = losses()[0]
    for one in (torch.stack([x * 1 for x in tasks]), tasks.unbind()[::-1], tasks.unbind()[1:], vector[:4]):
        fastmtl.UPGrad().backward(one, trunk, engine="auto", retain_graph=True)
