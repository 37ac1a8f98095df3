"""The networks of the paper's Table 5, for actors and critics alike.

All are ensembles of E (a critic is two), and work on the observations of S consecutive tasks, `tasks` being their
slice: from [S, B, O], and actions [S, B, A] in a critic, to [E, S, B, K]. A task's outputs depend on its own part of
the input alone, so that its loss can be computed on that part.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

__all__ = [
    "CARE",
    "MLP",
    "NETWORKS",
    "Linears",
    "MultiHead",
    "Network",
    "SingleTask",
    "SoftModularization",
    "TaskEncoder",
]

EMBEDDING = 50  # numbers that stand for a task, and width of the small networks around them, as in MTRL
MODULES = 4  # of soft modularization, in each layer
ENCODERS = 6  # of CARE


class Linears(nn.Module):
    """Linear layers side by side: x [*lead, N, inputs] to [*lead, N, outputs], each with its own weights.

    Orthogonal weights and no biases in the beginning, as in MTRL.
    """

    def __init__(self, *lead: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lead = lead
        weight = torch.empty(math.prod(lead), outputs, inputs)
        for one in weight:
            nn.init.orthogonal_(one)
        self.weight = nn.Parameter(weight.mT.reshape(*lead, inputs, outputs).contiguous())
        self.bias = nn.Parameter(torch.zeros(*lead, 1, outputs))

    def forward(self, x: Tensor, only: slice | None = None) -> Tensor:
        """Applies them, or `only` some along the last of the leading dimensions."""
        weight, bias = (self.weight, self.bias) if only is None else (self.weight[:, only], self.bias[:, only])
        if weight.ndim == 3:
            return torch.baddbmm(bias, x, weight)
        y = torch.baddbmm(bias.flatten(0, -3), x.flatten(0, -3), weight.flatten(0, -3))
        return y.unflatten(0, weight.shape[:-2])


class MLP(nn.Module):
    """Linear layers with ReLU between them (not after the last)."""

    def __init__(self, *lead: int, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linears(*lead, inputs=i, outputs=o) for i, o in itertools.pairwise(sizes))

    def forward(self, x: Tensor, only: slice | None = None) -> Tensor:
        """[*lead, N, inputs] to [*lead, N, outputs]."""
        for k, layer in enumerate(self.layers):
            x = layer(x.relu() if k else x, only)
        return x


class Network(nn.Module):
    """An MLP for all tasks, which sees the task's one-hot code: multi-task SAC, and the others' base.

    Args:
        observations: O.
        actions: A, of a critic; 0 for an actor.
        outputs: K.
        tasks: T.
        ensemble: E.
        width: of the hidden layers.
        depth: number of hidden layers.
    """

    def __init__(
        self, observations: int, actions: int, outputs: int, tasks: int, ensemble: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.tasks, self.ensemble = tasks, ensemble
        self.register_buffer("codes", torch.eye(tasks), persistent=False)
        self.build(observations, actions, outputs, [width] * depth)

    def build(self, observations: int, actions: int, outputs: int, hidden: list[int]) -> None:
        """Makes the layers."""
        self.mlp = MLP(self.ensemble, sizes=[observations + actions + self.tasks, *hidden, outputs])

    def forward(self, observation: Tensor, tasks: slice, action: Tensor | None = None) -> Tensor:
        """[S, B, O] (and [S, B, A]) to [E, S, B, K]."""
        x = _joined(observation, action, self._codes(tasks, observation.shape[1]))
        return self._ungrouped(self.mlp(self._grouped(x)), x)

    @property
    def shared(self) -> list[nn.Parameter]:
        """The parameters that several tasks use: those that a method balances."""
        return list(self.parameters())

    def _codes(self, tasks: slice, batch: int) -> Tensor:
        """One-hot codes [S, B, T]."""
        codes = self.codes[tasks]  # type: ignore[index]
        return codes[:, None].expand(-1, batch, -1)

    def _grouped(self, x: Tensor) -> Tensor:
        """[S, B, ...] to [E, S * B, ...], the same for every member of the ensemble."""
        return x.flatten(0, 1).expand(self.ensemble, -1, -1)

    def _ungrouped(self, y: Tensor, x: Tensor) -> Tensor:
        """[E, S * B, K] to [E, S, B, K]."""
        return y.unflatten(1, x.shape[:2])


class SingleTask(Network):
    """An MLP for each task, of which the others know nothing: T single-task SACs, trained side by side."""

    def build(self, observations: int, actions: int, outputs: int, hidden: list[int]) -> None:
        """Makes the layers."""
        self.mlp = MLP(self.ensemble, self.tasks, sizes=[observations + actions, *hidden, outputs])

    def forward(self, observation: Tensor, tasks: slice, action: Tensor | None = None) -> Tensor:
        """[S, B, O] (and [S, B, A]) to [E, S, B, K]."""
        return self.mlp(_joined(observation, action).expand(self.ensemble, -1, -1, -1), tasks)

    @property
    def shared(self) -> list[nn.Parameter]:
        """None."""
        return []


class MultiHead(Network):
    """The hidden layers are shared, and every task has an output layer of its own (Yu et al., 2020)."""

    def build(self, observations: int, actions: int, outputs: int, hidden: list[int]) -> None:
        """Makes the layers."""
        self.trunk = MLP(self.ensemble, sizes=[observations + actions + self.tasks, *hidden])
        self.heads = Linears(self.ensemble, self.tasks, inputs=hidden[-1], outputs=outputs)

    def encode(self, observation: Tensor, tasks: slice, action: Tensor | None = None) -> Tensor:
        """The trunk's output [E, S, B, H]."""
        x = _joined(observation, action, self._codes(tasks, observation.shape[1]))
        return self._ungrouped(self.trunk(self._grouped(x)).relu(), x)

    def decode(self, h: Tensor, tasks: slice) -> Tensor:
        """[E, S, B, H] to [E, S, B, K]."""
        return self.heads(h, tasks)

    def forward(self, observation: Tensor, tasks: slice, action: Tensor | None = None) -> Tensor:
        """[S, B, O] (and [S, B, A]) to [E, S, B, K]."""
        return self.decode(self.encode(observation, tasks, action), tasks)

    @property
    def shared(self) -> list[nn.Parameter]:
        """The trunk's."""
        return list(self.trunk.parameters())


class TaskEncoder(Network):
    """Multi-task SAC + TE: instead of the code, what an MLP makes of a learned embedding of the task."""

    def build(self, observations: int, actions: int, outputs: int, hidden: list[int]) -> None:
        """Makes the layers."""
        self.embedding = nn.Parameter(torch.randn(self.ensemble, self.tasks, EMBEDDING))
        self.context = MLP(self.ensemble, sizes=[EMBEDDING] * 3)
        self.mlp = MLP(self.ensemble, sizes=[observations + actions + EMBEDDING, *hidden, outputs])

    def forward(self, observation: Tensor, tasks: slice, action: Tensor | None = None) -> Tensor:
        """[S, B, O] (and [S, B, A]) to [E, S, B, K]."""
        x = _joined(observation, action)
        context = _repeated(self.context(self.embedding[:, tasks].relu()), x.shape[1])
        return self._ungrouped(self.mlp(torch.cat([self._grouped(x), context], -1)), x)


class SoftModularization(Network):
    """Modules whose connections a routing network weighs, from the state and the task (Yang et al., NeurIPS 2020).

    Each of the layers has `MODULES` modules, together of the width of the other networks' hidden layers. The paper's
    weighting of task losses by temperatures is left to the method.
    """

    def build(self, observations: int, actions: int, outputs: int, hidden: list[int]) -> None:
        """Makes the layers."""
        E, n, width, module = self.ensemble, MODULES, hidden[0], -(-hidden[0] // MODULES)
        self.state = MLP(E, sizes=[observations + actions, width, width])
        self.task = Linears(E, inputs=self.tasks, outputs=width)
        self.modules_ = nn.ModuleList([Linears(E, n, inputs=width, outputs=module)])
        self.modules_.extend(Linears(E, n, inputs=module, outputs=module) for _ in hidden[1:])
        # From each layer to the next, and from the last to the output.
        edges = [n * n] * (len(hidden) - 1) + [n]
        self.routes = nn.ModuleList(Linears(E, inputs=width, outputs=k) for k in edges)
        self.ups = nn.ModuleList(Linears(E, inputs=k, outputs=width) for k in edges[:-1])
        self.output = Linears(E, inputs=module, outputs=outputs)

    def forward(self, observation: Tensor, tasks: slice, action: Tensor | None = None) -> Tensor:
        """[S, B, O] (and [S, B, A]) to [E, S, B, K]."""
        x, n = _joined(observation, action), MODULES
        state = self.state(self._grouped(x))
        code = self._grouped(self._codes(tasks, x.shape[1]))
        u = state * self.task(code)
        p = self.routes[0](u.relu())
        h = state.relu()[:, None].expand(-1, n, -1, -1)
        for k, modules in enumerate(self.modules_):
            h = modules(h).relu()  # [E, n, N, d]
            weights = p.unflatten(-1, (-1, n)).softmax(-1)  # [E, N, to, from]; one `to` in the end
            h = torch.einsum("erij,ejrd->eird", weights, h)
            if k + 1 < len(self.modules_):
                p = self.routes[k + 1]((self.ups[k](p) * u).relu())
        return self._ungrouped(self.output(h[:, 0]), x)


class CARE(Network):
    """A mixture of state encoders, weighed by the task's context (Sodhani et al., ICML 2021).

    The context is made of a learned embedding of the task: the descriptions in natural language that CARE makes it of
    are not part of Meta-World. As in MTRL, the weights are made of the context without passing gradients to it.
    """

    def build(self, observations: int, actions: int, outputs: int, hidden: list[int]) -> None:
        """Makes the layers."""
        E = self.ensemble
        self.embedding = nn.Parameter(torch.randn(E, self.tasks, EMBEDDING))
        self.context = MLP(E, sizes=[EMBEDDING] * 3)
        self.attention = MLP(E, sizes=[EMBEDDING, EMBEDDING, ENCODERS])
        self.encoders = MLP(E, ENCODERS, sizes=[observations, EMBEDDING, EMBEDDING])
        self.mlp = MLP(E, sizes=[2 * EMBEDDING + actions, *hidden, outputs])

    def forward(self, observation: Tensor, tasks: slice, action: Tensor | None = None) -> Tensor:
        """[S, B, O] (and [S, B, A]) to [E, S, B, K]."""
        batch = observation.shape[1]
        context = self.context(self.embedding[:, tasks].relu())  # [E, S, C]
        weights = self.attention(context.detach()).softmax(-1)  # [E, S, encoders]
        encodings = self.encoders(self._grouped(observation)[:, None].expand(-1, ENCODERS, -1, -1))
        mixed = torch.einsum("esk,eksbc->esbc", weights, encodings.unflatten(2, (-1, batch)))
        parts = [mixed.flatten(1, 2), _repeated(context, batch)]
        if action is not None:
            parts.append(self._grouped(action))
        return self._ungrouped(self.mlp(torch.cat(parts, -1)), observation)


NETWORKS: dict[str, type[Network]] = {
    "single": SingleTask,
    "shared": Network,
    "task-encoder": TaskEncoder,
    "multi-head": MultiHead,
    "soft-modularization": SoftModularization,
    "care": CARE,
}


def _joined(*parts: Tensor | None) -> Tensor:
    return torch.cat([part for part in parts if part is not None], -1)


def _repeated(context: Tensor, batch: int) -> Tensor:
    """Of each task [E, S, C] to of each observation [E, S * B, C]."""
    return context[:, :, None].expand(-1, -1, batch, -1).flatten(1, 2)
