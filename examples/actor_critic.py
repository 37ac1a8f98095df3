"""Losses with an optimizer each: a soft actor-critic on several tasks, whose critic and actor are aggregated apart.

In each task a point at s steps by a, and should land on the task's goal: reward -(s + a - goal)². Episodes are
one step long, so that the critic's target is the reward. The three losses of an update are three calls:

    critic       method.backward(critic losses, shared=critic's trunk), its optimizer
    actor        the same with a method and an optimizer of its own, the critic frozen: its loss passes through it
    temperature  one for each task: nothing is shared, and so there is nothing to aggregate

    python examples/actor_critic.py --help
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import fastmtl

GOALS = (-1.0, 0.5, 2.0)
TASKS, BATCH, ENTROPY = len(GOALS), 64, -1.0


class MultiHead(nn.Module):
    """A trunk and a head for each task."""

    def __init__(self, inputs: int, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(width, outputs) for _ in range(TASKS))

    def forward(self, x: Tensor, task: int) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        return self.heads[task](self.trunk(x))


def act(actor: MultiHead, s: Tensor, task: int) -> tuple[Tensor, Tensor]:
    """Actions [N, 1] of a Gaussian policy, and their log density [N, 1]."""
    mean, log_std = actor(s, task).chunk(2, -1)
    log_std = log_std.clamp(-5, 2)
    noise = torch.randn_like(mean)
    return mean + log_std.exp() * noise, -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)


def train(steps: int) -> list[float]:
    """How far from its goal each task's point lands after so many updates, on average; the policy's mean acts."""
    torch.manual_seed(0)
    actor, critic = MultiHead(1, 2), MultiHead(2, 1)
    log_alpha = nn.Parameter(torch.zeros(TASKS))
    # A method with state would be one for each call, and so they are two.
    for_critic, for_actor = fastmtl.AlignedMTL(scale="median"), fastmtl.AlignedMTL(scale="median")
    optimizers = [torch.optim.Adam(p, lr=1e-2) for p in (critic.parameters(), actor.parameters(), [log_alpha])]
    for _ in range(steps):
        states = [torch.randn(BATCH, 1) for _ in range(TASKS)]

        critic_losses = []
        for t, s in enumerate(states):
            with torch.no_grad():
                a = act(actor, s, t)[0]
                reward = -(s + a - GOALS[t]).square()
            critic_losses.append(nn.functional.mse_loss(critic(torch.cat([s, a], 1), t), reward))
        optimizers[0].zero_grad()
        for_critic.backward(critic_losses, shared=critic.trunk)
        optimizers[0].step()

        critic.requires_grad_(False)  # or the actor's losses would leave gradients in it
        actor_losses, densities = [], []
        for t, s in enumerate(states):
            a, density = act(actor, s, t)
            actor_losses.append((log_alpha[t].exp().detach() * density - critic(torch.cat([s, a], 1), t)).mean())
            densities.append(density.mean().detach())
        optimizers[1].zero_grad()
        for_actor.backward(actor_losses, shared=actor.trunk)
        optimizers[1].step()
        critic.requires_grad_(True)

        optimizers[2].zero_grad()
        (-log_alpha * (torch.stack(densities) + ENTROPY)).sum().backward()
        optimizers[2].step()
    with torch.no_grad():
        s = torch.linspace(-2, 2, 41)[:, None]
        return [float((s + actor(s, t)[:, :1] - goal).abs().mean()) for t, goal in enumerate(GOALS)]


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, and prints how far off each task is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    options = parser.parse_args(arguments)
    distances = train(options.steps)
    print("mean distance from the goal: " + " ".join(f"{x:.3f}" for x in distances))
    return distances


if __name__ == "__main__":
    main()
