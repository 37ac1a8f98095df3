"""Multi-task soft actor-critic (Haarnoja et al., 2018): the losses of T tasks, balanced for each of its three parts.

Batches are arranged by task, and task t's losses are computed on its own part alone: T backward passes over a T-th of
the batch each, not T passes over the whole batch. Where a method needs no gradients of single tasks (uniform, rlw), all
parts go through the networks at once.

The temperatures are balanced like the networks. Where all tasks share one, their gradients are numbers (G is [T, 1]).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastmtl
from experiments import harness
from experiments.harness import Balancer
from experiments.rl.networks import NETWORKS, MultiHead, Network
from experiments.rl.replay import Batch
from experiments.rl.settings import Settings

__all__ = ["METHODS", "SINGLE", "Agent", "Update", "check", "squashed"]

LOG_STD = -20.0, 2.0

# Actor and temperature losses pass through zero, and these methods divide by losses or take their logarithm.
_POSITIVE = {"dwa", "uncertainty", "gradnorm", "imtl-l", "gls", "stch", "famo"}
METHODS = tuple(name for name in harness.METHODS if name not in _POSITIVE)
SINGLE = "single"  # the network without shared parameters, which there is nothing to balance for


class Update(NamedTuple):
    """What an update saw: losses before it [T], and what the methods did."""

    critic: Tensor
    actor: Tensor
    temperature: Tensor
    infos: dict[str, fastmtl.Info | None]


def check(network: str, method: str) -> None:
    """Raises ValueError where there is no such network or method, or they do not go together."""
    if network not in NETWORKS:
        raise ValueError(f"network: expected one of {', '.join(NETWORKS)}, got {network!r}")
    if method in _POSITIVE:
        raise ValueError(
            f"method: {method!r} is for positive losses, and SAC's actor and temperature losses change their sign; "
            f"expected one of {', '.join(METHODS)}"
        )
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if network == SINGLE and method != "uniform":
        raise ValueError(f"method: expected 'uniform' for the network 'single', which shares nothing, got {method!r}")
    if method.endswith("-ub") and not issubclass(NETWORKS[network], MultiHead):
        split = ", ".join(name for name, kind in NETWORKS.items() if issubclass(kind, MultiHead))
        raise ValueError(
            f"method: {method!r} needs a representation that goes into heads of the tasks; of the networks only "
            f"{split} has one (the trunk's output), got {network!r}"
        )


def squashed(outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions tanh(u), u Gaussian, and their log density.

    Args:
        outputs: means and log standard deviations [..., 2A], the latter not yet in their bounds.
        noise: standard normal [..., A].

    Returns:
        Actions [..., A] and log density [..., 1].
    """
    mean, log_std = outputs.chunk(2, -1)
    log_std = log_std.clamp(*LOG_STD)
    u = mean + log_std.exp() * noise
    # log(1 - tanh(u)²), which would round to log 0
    slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    log_density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - slope
    return u.tanh(), log_density.sum(-1, keepdim=True)


class Agent(nn.Module):
    """Actor, two critics, their targets and temperatures of T tasks, and how they are updated.

    Args:
        network: one of `NETWORKS`.
        method: one of `METHODS`; balances critic, actor and temperature losses, each on its own. Methods on a
            representation balance the temperatures' gradients exactly: there is no network before them.
        settings: width, depth, lr, discount, tau, temperature and the number of tasks.
        observations: O.
        actions: A.

    Raises:
        ValueError: see `check`.
    """

    def __init__(self, network: str, method: str, settings: Settings, observations: int, actions: int) -> None:
        super().__init__()
        check(network, method)
        self.settings, self.actions, T = settings, actions, len(settings.tasks)
        self.all, self.each = slice(0, T), [slice(t, t + 1) for t in range(T)]
        kind, shape = NETWORKS[network], (settings.width, settings.depth)
        self.actor = kind(observations, 0, 2 * actions, T, 1, *shape)
        self.critic = kind(observations, actions, 1, T, 2, *shape)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(1 if settings.temperature == "shared" else T, 1))
        self.target_entropy = -float(actions)
        exact = method.removesuffix("-ub")
        methods = {"critic": method, "actor": method, "temperature": exact}
        self.balancers = nn.ModuleDict({part: Balancer(name, T) for part, name in methods.items()})
        trained = {
            "critic": list(self.critic.parameters()),
            "actor": list(self.actor.parameters()),
            "temperature": [self.log_alpha],
        }
        self.optimizers = {part: torch.optim.Adam(ps, settings.lr, fused=True) for part, ps in trained.items()}

    @property
    def parts(self) -> dict[str, Any]:
        """All that a checkpoint has to hold."""
        return {"agent": self, **{f"{name} optimizer": o for name, o in self.optimizers.items()}}

    @property
    def alpha(self) -> Tensor:
        """Temperatures [T, 1, 1]."""
        return self.log_alpha.exp().expand(self.all.stop, 1)[..., None]

    @torch.no_grad()
    def act(self, observations: Tensor, *, sample: bool) -> Tensor:
        """Actions [T, A] for observations [T, O]: drawn, or the mean's."""
        outputs = self.actor(observations[:, None], self.all)[0, :, 0]
        mean = outputs[:, : self.actions]
        return squashed(outputs, torch.randn_like(mean))[0] if sample else mean.tanh()

    def update(self, batch: Batch) -> Update:
        """One step of each optimizer, and of the target critics."""
        target = self.targets(batch, torch.randn_like(batch.action))
        critic, critic_info = self._descend(
            "critic",
            self.critic,
            lambda outputs, tasks: self.critic_losses(outputs, tasks, target),
            batch.observation,
            batch.action,
        )
        noise, entropies = torch.randn_like(batch.action), [torch.empty(0)] * self.all.stop

        def actor_losses(outputs: Tensor, tasks: slice) -> Tensor:
            losses, log_density = self.actor_losses(outputs, tasks, batch, noise)
            entropies[tasks] = (-log_density.detach().mean((1, 2))).unbind()
            return losses

        with _frozen(self.critic):
            actor, actor_info = self._descend("actor", self.actor, actor_losses, batch.observation)
        temperature = self.temperature_losses(torch.stack(entropies)).unbind()
        self.optimizers["temperature"].zero_grad()
        temperature_info = self._balance("temperature", temperature, [self.log_alpha], None)
        self.optimizers["temperature"].step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, self.settings.tau)
        infos = {"critic": critic_info, "actor": actor_info, "temperature": temperature_info}
        return Update(critic, actor, torch.stack(temperature).detach(), infos)

    @torch.no_grad()
    def targets(self, batch: Batch, noise: Tensor) -> Tensor:
        """What the critics are to say, [T, B, 1]. An episode that ends at its horizon is cut off, not terminal."""
        action, log_density = squashed(self.actor(batch.following, self.all)[0], noise)
        value = self.target(batch.following, self.all, action).amin(0) - self.alpha * log_density
        return batch.reward + self.settings.discount * value

    def critic_losses(self, outputs: Tensor, tasks: slice, target: Tensor) -> Tensor:
        """Squared errors of both critics [2, S, B, 1], averaged over the batch: [S]."""
        return (outputs - target[tasks]).square().mean((2, 3)).sum(0)

    def actor_losses(self, outputs: Tensor, tasks: slice, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [S] of the actor's outputs [1, S, B, 2A], and the actions' log density [S, B, 1]."""
        action, log_density = squashed(outputs[0], noise[tasks])
        value = self.critic(batch.observation[tasks], tasks, action).amin(0)
        alpha = self.alpha.detach()[tasks]
        return (alpha * log_density - value).mean((1, 2)), log_density

    def temperature_losses(self, entropies: Tensor) -> Tensor:
        """Losses [T] of the temperatures, where the policy has these entropies [T]."""
        return self.alpha[:, 0, 0] * (entropies - self.target_entropy)

    def _descend(
        self,
        part: str,
        network: Network,
        losses_of: Callable[[Tensor, slice], Tensor],
        observation: Tensor,
        action: Tensor | None = None,
    ) -> tuple[Tensor, fastmtl.Info | None]:
        """A step of one network; `losses_of` goes from outputs [E, S, B, K] of some tasks to their losses [S]."""

        def run(of: Callable[..., Tensor], tasks: slice) -> Tensor:
            return of(observation[tasks], tasks, None if action is None else action[tasks])

        representation: list[Tensor] | None = None
        if self.balancers[part].upper_bound:
            assert isinstance(network, MultiHead)
            # A task's part of it is reached by that task's loss alone: the rows are orthogonal, and what methods
            # balance are their norms.
            representation = list(run(network.encode, self.all).split(1, 1))
            outputs = [network.decode(h, t) for h, t in zip(representation, self.each, strict=True)]
            losses = [losses_of(out, t)[0] for out, t in zip(outputs, self.each, strict=True)]
        elif self.balancers[part].method.on_losses:  # type: ignore[union-attr]
            losses = list(losses_of(run(network, self.all), self.all).unbind())
        else:
            losses = [losses_of(run(network, t), t)[0] for t in self.each]
        self.optimizers[part].zero_grad()
        info = self._balance(part, losses, network.shared, representation)
        self.optimizers[part].step()
        return torch.stack(losses).detach(), info

    def _balance(
        self, part: str, losses: list[Tensor] | tuple[Tensor, ...], shared: list[nn.Parameter], representation: Any
    ) -> fastmtl.Info | None:
        if shared:
            return self.balancers[part].backward(losses, shared, representation)  # type: ignore[operator]
        torch.stack(list(losses)).sum().backward()
        return None


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Passes gradients through a module and computes none of its parameters'."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
