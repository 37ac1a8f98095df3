# %% [markdown]
# # LoRA with two objectives
#
# A frozen language model is adapted to two objectives at once: the next byte of a new text, and how many bytes ago the
# last line ended. The adapter is all that the objectives share and that is trained, so its gradients are what is
# aligned.
#
# The adapter is written out here, in ten lines, so that the tutorial runs without PEFT. With PEFT and Hugging Face's
# Trainer only the first half changes: [a script](../../examples/adapter.py).

# %%
import inspect

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import fastmtl

STEPS = 120
torch.set_num_threads(1)  # these tensors are too small for more
LENGTH, WIDTH, RANK, NEWLINE = 32, 48, 4, 10


def text_of(source: object) -> Tensor:
    """The bytes of a piece of source code, in windows [N, LENGTH]."""
    code = inspect.getsource(source).encode()  # type: ignore[arg-type]
    return torch.tensor(list(code)).unfold(0, LENGTH, LENGTH // 4)


# %% [markdown]
# ## A small language model
#
# One causal transformer over bytes, trained on one text and then frozen. It stands in for a pretrained model.


# %%
class Model(nn.Module):
    """Bytes [N, L] to hidden states [N, L, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The hidden states."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.layers(self.embedding(ids) + self.position[: ids.shape[1]], mask, is_causal=True)


def next_byte(h: Tensor, ids: Tensor, head: nn.Module) -> Tensor:
    """Cross entropy of the next byte."""
    return F.cross_entropy(head(h[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


torch.manual_seed(0)
base, base_head = Model(), nn.Linear(WIDTH, 256)
optimizer = torch.optim.Adam([*base.parameters(), *base_head.parameters()], lr=3e-3)
first = text_of(nn.Transformer)
loss = torch.tensor(0.0)
for _step in range(STEPS):
    ids = first[torch.randint(len(first), (16,))]
    optimizer.zero_grad()
    loss = next_byte(base(ids), ids, base_head)
    loss.backward()
    optimizer.step()
print(f"next byte of the first text: {float(loss.detach()):.2f} nats")
base.requires_grad_(False)

# %% [markdown]
# ## The adapter
#
# W x + B A x in every feed-forward layer, with A [RANK, I] random and B [O, RANK] zero, so that the adapted model
# begins as the frozen one.


# %%
class LoRA(nn.Module):
    """A frozen linear layer and a trained update of low rank."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape that the layer returns."""
        return self.layer(x) + x @ self.A.T @ self.B.T


def adapted() -> tuple[Model, nn.ModuleDict]:
    """The frozen model with fresh adapters, and a head for each objective."""
    torch.manual_seed(1)
    model = Model()
    model.load_state_dict(base.state_dict())
    model.requires_grad_(False)
    for layer in model.layers.layers:
        assert isinstance(layer, nn.TransformerEncoderLayer)
        for name in ("linear1", "linear2"):
            setattr(layer, name, LoRA(getattr(layer, name)))
    heads = nn.ModuleDict({"byte": nn.Linear(WIDTH, 256), "column": nn.Linear(WIDTH, 1)})
    heads["byte"].load_state_dict(base_head.state_dict())
    return model, heads


# %% [markdown]
# ## Training
#
# `shared=` takes the adapter's parameters. B begins at zero, so in the first step every gradient of A is zero and
# later their sizes differ: `groups=` aligns the two kinds of factors separately, each with task weights of its own.


# %%
def losses_of(model: Model, heads: nn.ModuleDict, ids: Tensor) -> dict[str, Tensor]:
    """In nats, and in bytes²: nobody chose these units to fit each other."""
    h, place = model(ids), torch.arange(LENGTH)
    column = place - torch.where(ids == NEWLINE, place, 0).cummax(1).values  # from the window's start, if there is none
    return {
        "byte": next_byte(h, ids, heads["byte"]),
        "column": F.mse_loss(heads["column"](h)[..., 0], column.float()),
    }


second = text_of(fastmtl.Monitor)


def train(method: fastmtl.GramMethod) -> tuple[Tensor, Tensor]:
    """Losses [STEPS, 2], and the weight of "byte" for A and B [STEPS, 2]."""
    model, heads = adapted()
    factors = [[p for name, p in model.named_parameters() if name.endswith(kind)] for kind in (".A", ".B")]
    optimizer = torch.optim.Adam([*factors[0], *factors[1], *heads.parameters()], lr=1e-2)
    history, weights = [], []
    for _ in range(STEPS):
        losses = losses_of(model, heads, second[torch.randint(len(second), (16,))])
        optimizer.zero_grad()
        info = method.backward(losses, groups=factors)
        optimizer.step()
        history.append([float(loss.detach()) for loss in losses.values()])
        weights.append((info.alpha / info.alpha.sum(-1, keepdim=True).clamp_min(1e-30))[:, 0])
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return torch.tensor(history), torch.stack(weights)


runs = {"plain sum": train(fastmtl.Uniform(weights="sum")), "Aligned-MTL": train(fastmtl.AlignedMTL())}
last = max(STEPS // 5, 1)
print(f"{'':>12} {'byte':>6} {'column':>7}")
for name, (history, _) in runs.items():
    byte, column = history[-last:].mean(0).tolist()
    print(f"{name:>12} {byte:>6.2f} {column:>7.2f}")

# %%
figure = Figure(figsize=(12, 3), layout="constrained")
axes = figure.subplots(1, 3)
for t, name in enumerate(("byte", "column")):
    for label, (history, _) in runs.items():
        axes[t].plot(history[:, t].unfold(0, 5, 1).mean(-1) if STEPS > 5 else history[:, t], label=label)
    axes[t].set(title=f"loss {name!r}, mean of five steps", xlabel="step")
axes[0].legend()
for kind, label in enumerate(("A", "B")):
    axes[2].plot(runs["Aligned-MTL"][1][:, kind], label=f"factors {label}", linewidth=1)
axes[2].set(title="share of 'byte' in the task weights", xlabel="step", ylim=(0, 1.05))
axes[2].legend()
figure.savefig("lora.svg")
