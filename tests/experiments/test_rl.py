"""The reinforcement learning experiment: networks, losses, replay, runs on a toy world, and on Meta-World itself."""

import copy
import functools
import json
import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from processes import kill_in, start
from torch import distributions
from torch.nn import functional as F
from typer.testing import CliRunner

import fastmtl
from experiments.harness import Run
from experiments.rl import __main__ as command_line
from experiments.rl import environments, networks, plots, sac
from experiments.rl.__main__ import app
from experiments.rl.networks import NETWORKS
from experiments.rl.replay import Batch, Replay
from experiments.rl.settings import PROTOCOLS, SUITES, Settings, reductions
from experiments.rl.training import Training, measure, train

os.environ.setdefault("MUJOCO_GL", "disabled")  # or metaworld does not import without graphics libraries

TASKS = ("a", "b", "c")
TINY = Settings(
    tasks=TASKS,
    steps=60,
    horizon=10,
    init_steps=15,
    width=16,
    depth=2,
    batch=8,
    capacity=40,
    evaluate_every=20,
)
# From outputs [E, S, B, K] to a loss for each task.
SHAPE = {"observations": 5, "actions": 2, "outputs": 3, "tasks": 3, "ensemble": 2, "width": 12, "depth": 3}


class Points:
    """A point in a plane for each task, to be moved to a goal; succeeds within 0.1. Deterministic."""

    observations, actions = 4, 2

    def __init__(self, names, gain=0.2):
        self.T, self.gain = len(names), gain

    def reset(self, seeds):
        self.x = np.zeros((self.T, 2))
        self.goal = np.stack([np.random.default_rng(s).uniform(-0.7, 0.7, 2) for s in seeds])
        return np.concatenate([self.x, self.goal], 1)

    def step(self, actions):
        assert actions.shape == (self.T, 2)
        assert np.abs(actions).max() <= 1
        self.x = np.clip(self.x + self.gain * actions, -1, 1)
        distance = np.linalg.norm(self.x - self.goal, axis=1)
        return np.concatenate([self.x, self.goal], 1), 1 - distance, distance < 0.1


def settings_of(network="shared", method="uniform", seed=0, **changes):
    return {**asdict(replace(TINY, **changes)), "network": network, "method": method, "seed": seed}


def agent_of(network="shared", method="uniform", **changes):
    torch.manual_seed(0)
    return sac.Agent(network, method, replace(TINY, **changes), Points.observations, Points.actions)


def batch_of(B=8, T=3):
    torch.manual_seed(1)
    return Batch(torch.randn(T, B, 4), torch.rand(T, B, 2) * 2 - 1, torch.randn(T, B, 1), torch.randn(T, B, 4))


def make_network(name, **changes):
    torch.manual_seed(0)
    network = NETWORKS[name](**{**SHAPE, **changes})
    for p in network.parameters():  # biases that are not zero, and no two weights alike
        torch.nn.init.normal_(p, std=0.4)
    return network


def inputs(T=3, B=6):
    torch.manual_seed(2)
    return torch.randn(T, B, 5), torch.randn(T, B, 2)


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", NETWORKS)
def test_a_slice_gives_what_the_joint_batch_gives(name):
    network, (x, action) = make_network(name), inputs()
    whole = network(x, slice(0, 3), action)
    assert whole.shape == (2, 3, 6, 3)
    for tasks in (slice(0, 1), slice(2, 3), slice(1, 3)):
        close(network(x[tasks], tasks, action[tasks]), whole[:, tasks])
    actor = make_network(name, actions=0, ensemble=1)
    assert actor(x, slice(0, 3)).shape == (1, 3, 6, 3)
    # The members of an ensemble are different networks.
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_task_is_known_to_the_network(name):
    network, (x, action) = make_network(name), inputs()
    same_state = x[:1].expand(3, -1, -1), action[:1].expand(3, -1, -1)
    outputs = network(same_state[0], slice(0, 3), same_state[1])
    assert not torch.allclose(outputs[:, 0], outputs[:, 1])
    assert not torch.allclose(outputs[:, 1], outputs[:, 2])


# For each network the parameters that have something of a task's own, and the dimension of tasks in each (a slice along
# which only the task's own entry gets a gradient); everything else every task's loss reaches.
OWN = {
    "single": {"mlp": 1},
    "shared": {},
    "task-encoder": {"embedding": 1},
    "multi-head": {"heads": 1},
    "soft-modularization": {},
    "care": {"embedding": 1},
}
CODES = {"shared": "mlp.layers.0.weight", "multi-head": "trunk.layers.0.weight", "soft-modularization": "task.weight"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_loss_touches_what_it_should(name):
    network, (x, action) = make_network(name), inputs()
    for t in range(3):
        tasks = slice(t, t + 1)
        network.zero_grad()
        network(x[tasks], tasks, action[tasks]).square().sum().backward()
        for key, p in network.named_parameters():
            others = [o for o in range(3) if o != t]
            if key.split(".")[0] in OWN[name]:
                dim = OWN[name][key.split(".")[0]]
                assert p.grad.select(dim, t).any(), key
                assert not p.grad.index_select(dim, torch.tensor(others)).any(), key
            elif key == CODES.get(name):
                rows = p.grad[:, -3:]  # of the one-hot code: the last of the inputs
                assert rows[:, t].any()
                assert not rows[:, others].any()
                assert name == "soft-modularization" or p.grad[:, :-3].any()
            else:
                assert p.grad.any(), key


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_shared(name):
    network = make_network(name)
    shared = {id(p) for p in network.shared}
    expected = {
        "single": set(),
        "multi-head": {id(p) for key, p in network.named_parameters() if not key.startswith("heads")},
    }.get(name, {id(p) for p in network.parameters()})
    assert shared == expected


def test_linears_are_linear_layers_side_by_side():
    torch.manual_seed(0)
    layer = networks.Linears(2, 3, inputs=4, outputs=5)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 7, 4)
    y = layer(x)
    for e in range(2):
        for k in range(3):
            close(y[e, k], F.linear(x[e, k], layer.weight[e, k].T, layer.bias[e, k, 0]))
            W = layer.weight[e, k].detach()
            close(W @ W.T, torch.eye(4))  # orthogonal: 4 rows of 5
    close(layer(x[:, 1:2], slice(1, 2)), y[:, 1:2])


def mlp_of_one(mlp, e, x, *, member=()):
    """The layers of one member of an ensemble, one after the other."""
    for k, layer in enumerate(mlp.layers):
        x = F.linear(x.relu() if k else x, layer.weight[(e, *member)].T, layer.bias[(e, *member, 0)])
    return x


def one_output(name, network, e, t, state, action):
    """One output of member e for one state of task t, from the papers' equations, loop by loop."""
    code, sa = torch.eye(3)[t], torch.cat([state, action])
    if name == "single":
        return mlp_of_one(network.mlp, e, sa, member=(t,))
    if name == "shared":
        return mlp_of_one(network.mlp, e, torch.cat([sa, code]))
    if name == "multi-head":
        h = mlp_of_one(network.trunk, e, torch.cat([sa, code])).relu()
        return h @ network.heads.weight[e, t] + network.heads.bias[e, t, 0]
    if name in ("task-encoder", "care"):
        context = mlp_of_one(network.context, e, network.embedding[e, t].relu())
        if name == "task-encoder":
            return mlp_of_one(network.mlp, e, torch.cat([sa, context]))
        weights = mlp_of_one(network.attention, e, context).softmax(0)
        mixed = sum(w * mlp_of_one(network.encoders, e, state, member=(k,)) for k, w in enumerate(weights))
        return mlp_of_one(network.mlp, e, torch.cat([mixed, context, action]))

    def linear(layer, x, *member):
        return x @ layer.weight[(e, *member)] + layer.bias[(e, *member, 0)]

    n = networks.MODULES
    f = mlp_of_one(network.state, e, sa)
    u = f * linear(network.task, code)
    p = linear(network.routes[0], u.relu())
    g = [f.relu()] * n
    for k, layer in enumerate(network.modules_):
        made = [linear(layer, g[j], j).relu() for j in range(n)]
        last = k + 1 == len(network.modules_)
        g = []
        for i in range(1 if last else n):
            scores = p[i * n : (i + 1) * n].exp()
            g.append(sum(scores[j] / scores.sum() * made[j] for j in range(n)))
        if not last:
            p = linear(network.routes[k + 1], (linear(network.ups[k], p) * u).relu())
    return linear(network.output, g[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_their_papers_equations(name):
    network, (x, action) = make_network(name), inputs()
    outputs = network(x, slice(0, 3), action)
    for e, t, b in [(0, 0, 0), (1, 0, 3), (0, 1, 5), (1, 2, 2)]:
        close(outputs[e, t, b], one_output(name, network, e, t, x[t, b], action[t, b]), 1e-4)


def test_cares_weights_pass_no_gradient_to_the_context():
    network, (x, action) = make_network("care"), inputs()
    with torch.no_grad():
        network.mlp.layers[0].weight[:, networks.EMBEDDING : 2 * networks.EMBEDDING] = 0  # the other way from there
    network(x, slice(0, 3), action).square().sum().backward()
    assert not network.embedding.grad.any()
    assert all(p.grad.any() for p in network.attention.parameters())


# ----------------------------------------------------------------------------------------------------- SAC's losses


def slow_losses(agent, batch, next_noise, noise):
    """Losses of critic, actor and temperature for each task, with torch's distributions, sample by sample."""

    def policy(observation, t, eps):
        outputs = agent.actor(observation[None, None], slice(t, t + 1))[0, 0, 0]
        mean, log_std = outputs[:2], outputs[2:].clamp(-20, 2)
        normal = distributions.Normal(mean.double(), log_std.double().exp())
        squash = distributions.TransformedDistribution(normal, distributions.transforms.TanhTransform(cache_size=1))
        action = squash.transforms[0](normal.mean + normal.stddev * eps.double())
        return action, squash.log_prob(action).sum()

    def values(critic, observation, t, action):
        return critic(observation[None, None], slice(t, t + 1), action.float()[None, None])[:, 0, 0, 0].double()

    T, B = batch.action.shape[:2]
    rows = []
    for t in range(T):
        alpha = agent.log_alpha[t if len(agent.log_alpha) > 1 else 0, 0].double().exp()
        critic = actor = temperature = 0.0
        for b in range(B):
            with torch.no_grad():
                action, log_pi = policy(batch.following[t, b], t, next_noise[t, b])
                future = values(agent.target, batch.following[t, b], t, action).min() - alpha * log_pi
                y = batch.reward[t, b, 0] + agent.settings.discount * future
            q = values(agent.critic, batch.observation[t, b], t, batch.action[t, b])
            critic = critic + ((q[0] - y) ** 2 + (q[1] - y) ** 2) / B
            action, log_pi = policy(batch.observation[t, b], t, noise[t, b])
            q = values(agent.critic, batch.observation[t, b], t, action)
            actor = actor + (alpha.detach() * log_pi - torch.minimum(q[0], q[1])) / B
            temperature = temperature + alpha * (-log_pi.detach() + 2.0) / B  # target entropy: minus two actions
        rows.append((critic, actor, temperature))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("temperature", ["per-task", "shared"])
@pytest.mark.parametrize("method", ["uniform", "aligned"])
def test_losses_are_sacs(method, temperature):
    agent, batch = agent_of("multi-head", method, temperature=temperature), batch_of()
    with torch.no_grad():
        agent.log_alpha.copy_(torch.tensor([[-1.0], [0.3], [0.7]])[: len(agent.log_alpha)])
        for p in agent.target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    before = copy.deepcopy(agent)
    torch.manual_seed(5)
    next_noise, noise = torch.randn(3, 8, 2), torch.randn(3, 8, 2)
    torch.manual_seed(5)
    update = agent.update(batch)
    critic, _, _ = slow_losses(before, batch, next_noise, noise)
    close(update.critic.double(), critic.detach(), 1e-4)
    # The actor meets the critics after their step.
    before.critic.load_state_dict(agent.critic.state_dict())
    _, actor, temperatures = slow_losses(before, batch, next_noise, noise)
    close(update.actor.double(), actor.detach(), 1e-4)
    close(update.temperature.double(), temperatures.detach(), 1e-4)
    # The temperature's gradient, which the method balances: uniform is the mean.
    temperatures.mean().backward()
    if method == "uniform":
        close(agent.log_alpha.grad, before.log_alpha.grad, 1e-4)


def test_the_density_is_finite_where_tanh_rounds_to_one():
    outputs = torch.tensor([[30.0, -30.0, 5.0, -50.0]], requires_grad=True)  # standard deviations beyond their bounds
    action, log_density = sac.squashed(outputs, torch.tensor([[1.0, -1.0]]))
    assert action.abs().max() == 1
    log_density.sum().backward()
    assert log_density.isfinite().all()
    assert outputs.grad.isfinite().all()
    u, std = torch.tensor([30 + math.exp(2), -30 - math.exp(-20)]).double(), torch.tensor([2.0, -20.0]).double().exp()
    slopes = math.log(4) - 2 * u.abs()  # log(1 - tanh²) for large |u|
    expected = -0.5 - std.log() - 0.5 * math.log(2 * math.pi) - slopes
    close(log_density[0, 0].double(), expected.sum())


def test_target_critics_follow_slowly():
    agent, batch = agent_of("shared", "aligned", tau=0.25), batch_of()
    assert all(torch.equal(a, b) for a, b in zip(agent.critic.parameters(), agent.target.parameters(), strict=True))
    for _ in range(2):
        old = [p.clone() for p in agent.target.parameters()]
        agent.update(batch)
        new = zip(old, agent.critic.parameters(), agent.target.parameters(), strict=True)
        for before, fast, slow in new:
            close(slow.detach(), 0.75 * before + 0.25 * fast.detach(), 1e-6)
    assert all(p.grad is None and not p.requires_grad for p in agent.target.parameters())
    assert all(p.requires_grad for p in agent.critic.parameters())  # frozen while the actor learned, and no longer


def masked_gradients(agent, batch, target, noise):
    """G of critic and actor: T backward passes over the joint batch, in which the other tasks' losses count zero."""

    def rows(losses, parameters):
        masks = torch.eye(3)
        return [torch.autograd.grad((losses * m).sum(), parameters, retain_graph=True) for m in masks]

    everything = slice(0, 3)
    q = agent.critic(batch.observation, everything, batch.action)
    critic = rows((q - target).square().mean((2, 3)).sum(0), list(agent.critic.parameters()))
    action, log_density = sac.squashed(agent.actor(batch.observation, everything)[0], noise)
    value = agent.critic(batch.observation, everything, action).amin(0)
    actor = rows((agent.alpha.detach() * log_density - value).mean((1, 2)), list(agent.actor.parameters()))
    return critic, actor


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "single"])
def test_slices_give_the_gradients_of_the_masked_joint_batch(network):
    """And the method is applied to them: the whole update against one on explicit matrices."""
    agent, batch = agent_of(network, "aligned"), batch_of()
    before = copy.deepcopy(agent)
    torch.manual_seed(5)
    target = before.targets(batch, torch.randn(3, 8, 2))
    noise = torch.randn(3, 8, 2)
    torch.manual_seed(5)
    agent.update(batch)
    for part in ("critic", "actor"):
        if part == "actor":
            before.critic.load_state_dict(agent.critic.state_dict())
        rows = masked_gradients(before, batch, target, noise)[("critic", "actor").index(part)]
        net = getattr(before, part)
        shared = {id(p) for p in net.shared}
        parameters = list(net.parameters())
        mine = [k for k, p in enumerate(parameters) if id(p) in shared]
        G = torch.stack([torch.cat([row[k].flatten() for k in mine]) for row in rows])
        assert torch.linalg.matrix_rank(G) == 3
        expected = fastmtl.AlignedMTL()(G)
        got = [p.grad for p in getattr(agent, part).parameters()]
        scale = expected.abs().max()
        close(torch.cat([got[k].flatten() for k in mine]) / scale, expected / scale, 2e-3)
        for k in set(range(len(parameters))) - set(mine):  # heads: each its own loss's
            close(got[k], sum(row[k] for row in rows), 1e-4)


def test_joint_batch_and_slices_are_one_method():
    """What works on losses goes through the networks once: the gradient is that of the mean over slices."""
    batch = batch_of()
    joint, slices = agent_of("care", "uniform"), agent_of("care", "aligned")
    for part in ("critic", "actor", "temperature"):
        slices.balancers[part].method = fastmtl.Uniform()
    for agent in (joint, slices):
        torch.manual_seed(5)
        agent.update(batch)
    pairs = zip(joint.named_parameters(), slices.parameters(), strict=True)
    for (name, a), b in ((x, y) for x, y in pairs if x[1].requires_grad):
        close(a.grad, b.grad, 1e-4), name


def test_single_task_runs_are_independent():
    """Side by side is as alone: what one task's batch holds changes nothing for the others."""
    agents = [agent_of("single"), agent_of("single")]
    for agent, scale in zip(agents, (1.0, 50.0), strict=True):
        batch = batch_of()
        batch.reward[1] *= scale
        for _ in range(2):
            torch.manual_seed(5)
            agent.update(batch)
    pairs = zip(agents[0].named_parameters(), agents[1].parameters(), strict=True)
    for (name, a), b in pairs:
        dim = 0 if name == "log_alpha" else 1
        keep = torch.tensor([0, 2])
        assert torch.equal(a.index_select(dim, keep), b.index_select(dim, keep)), name
    last = "mlp.layers.2.weight"
    assert not torch.equal(*(a.critic.get_parameter(last)[:, 1] for a in agents))


@pytest.mark.parametrize("temperature", ["per-task", "shared"])
@pytest.mark.parametrize("method", sac.METHODS)
def test_every_method_updates_every_part(method, temperature):
    """With one shared temperature the temperature's G is T x 1, of rank one."""
    agent, batch = agent_of("multi-head", method, temperature=temperature), batch_of()
    before = copy.deepcopy(agent.state_dict())
    for _ in range(2):
        update = agent.update(batch)
    assert agent.log_alpha.shape == (1 if temperature == "shared" else 3, 1)
    for name, value in agent.state_dict().items():
        assert value.isfinite().all(), name
        if name.startswith(("actor", "critic", "log_alpha")):
            assert not torch.equal(value, before[name]), name
    info = update.infos["temperature"]
    if info is None or info.gram is None:
        assert method in ("uniform", "rlw", "graddrop")
        return
    rank = torch.linalg.matrix_rank(info.gram, rtol=1e-6).item()
    assert rank == (1 if temperature == "shared" else 3)
    for part in ("critic", "actor") if method.endswith("-ub") else ():
        gram = update.infos[part].gram
        assert torch.equal(gram, gram.diag().diag())  # a task's part of the representation is its own


def test_a_shared_temperature_gets_the_combination_of_numbers():
    agent, batch = agent_of("shared", "aligned", temperature="shared"), batch_of()
    update = agent.update(batch)
    # d/d log α of α · c is the loss itself, so that G = L and the Gram its outer product.
    G = update.temperature[:, None].double()
    close(update.infos["temperature"].gram, G @ G.T, 1e-5)
    close(agent.log_alpha.grad.double(), fastmtl.AlignedMTL()(G)[None], 1e-5)


@pytest.mark.parametrize(
    ("network", "method", "message"),
    [
        ("shared", "nosuch", "method: expected one of uniform, .*, got 'nosuch'"),
        ("nosuch", "uniform", "network: expected one of single, .*, got 'nosuch'"),
        ("shared", "famo", "method: 'famo' is for positive losses, and SAC's .* expected one of uniform"),
        ("shared", "aligned-ub", "method: 'aligned-ub' needs a representation .* only multi-head has one .*'shared'"),
        ("single", "aligned", "method: expected 'uniform' for the network 'single', which shares nothing, got 'align"),
    ],
)
def test_what_does_not_go_together(network, method, message):
    with pytest.raises(ValueError, match=message):
        agent_of(network, method)


# ---------------------------------------------------------------------------------------------------------- replay


def filled(episodes, capacity=35, horizon=10):
    """A replay with numbers that tell where they are from: 100 * episode + step + 1000 * task."""
    replay = Replay(2, horizon, capacity, 1, 1)
    tasks = 1000.0 * np.arange(2)[:, None]
    for e in range(episodes):
        replay.begin(100.0 * e + tasks)
        for s in range(horizon):
            here = 100.0 * e + s + tasks
            replay.add((here + 0.5).astype(np.float32), here[:, 0], here + 1)
    return replay


@pytest.mark.parametrize("episodes", [1, 2, 3, 4, 8])
def test_replay_holds_the_last_episodes(episodes):
    replay = filled(episodes)  # room for three
    assert len(replay) == 10 * min(episodes, 3)
    torch.manual_seed(0)
    batch = replay.sample(2000)
    for t in range(2):
        here = batch.observation[t, :, 0] - 1000 * t
        assert torch.equal(batch.following[t, :, 0] - 1000 * t, here + 1)
        assert torch.equal(batch.action[t, :, 0] - 1000 * t, here + 0.5)
        assert torch.equal(batch.reward[t, :, 0] - 1000 * t, here)
        held = {100.0 * e + s for e in range(max(0, episodes - 3), episodes) for s in range(10)}
        assert set(here.tolist()) == held  # all of them in 2000 draws, and no other
    assert not torch.equal(batch.observation[0], batch.observation[1] - 1000)  # tasks are drawn independently


def test_replay_within_an_episode():
    replay = filled(5)
    replay.begin(np.array([[7.0], [7.0]]))
    assert len(replay) == 20  # the oldest of three episodes went
    replay.add(np.zeros((2, 1), np.float32), np.array([3.0, 3.0]), np.array([[8.0], [8.0]]))
    assert len(replay) == 21
    batch = replay.sample(2000)
    assert set(batch.observation[0, :, 0].tolist()) == {7.0} | {100.0 * e + s for e in (3, 4) for s in range(10)}
    with pytest.raises(RuntimeError, match="begin: expected an episode of 10 steps before, got one of 1"):
        replay.begin(np.zeros((2, 1)))
    with pytest.raises(RuntimeError, match="state_dict: expected the end of an episode, got step 1 of 10"):
        replay.state_dict()


@pytest.mark.parametrize("episodes", [2, 5])
def test_replay_goes_into_a_checkpoint(episodes, tmp_path):
    replay, other = filled(episodes, capacity=4000 if episodes == 2 else 35), filled(0, 4000 if episodes == 2 else 35)
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    assert (tmp_path / "replay.pt").stat().st_size < 5000  # what is used, not what is reserved
    other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    for r in (replay, other):
        r.begin(np.zeros((2, 1)))
        r.add(np.zeros((2, 1), np.float32), np.zeros(2), np.zeros((2, 1)))
    batches = []
    for r in (replay, other):
        torch.manual_seed(3)
        batches.append(r.sample(50))
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


# ------------------------------------------------------------------------------------------------ settings and seeds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "tasks: expected at least one and none twice, got none"),
        ({"tasks": ("a", "a")}, "tasks: .* got a, a"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"init_steps": -1}, "init_steps: expected at least 0, got -1"),
        ({"tau": 1.5}, "tau: expected a number above 0 and at most 1, got 1.5"),
        ({"temperature": "both"}, "temperature: expected 'per-task' or 'shared', got 'both'"),
        ({"evaluation_episodes": 2}, "evaluation_episodes: expected at most one for each of 1 goals .*, got 2"),
        ({"capacity": 10}, "capacity: expected at least two episodes of 10 steps, got 10"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_the_full_protocol_is_the_papers():
    full = PROTOCOLS["full"]
    assert (len(full.tasks), full.steps, full.horizon, full.init_steps) == (10, 2_000_000, 150, 1500)
    assert (full.depth, full.width, full.lr, full.discount, full.tau) == (3, 400, 3e-4, 0.99, 0.005)
    assert len(full.tasks) * full.batch == 1280
    assert full.temperature == "per-task"
    assert (full.episodes, full.episodes_between_evaluations) == (13_334, 67)
    assert set(PROTOCOLS["quick"].tasks) < set(SUITES["mt10"])
    assert "batch" not in reductions(full, {"x": 10})
    told = reductions(PROTOCOLS["quick"], {"x": 3, "y": 3})
    assert "steps 40000 instead of 2000000" in told
    assert "3 seeds instead of 10" in told


def test_seeds_are_of_seed_task_and_goal():
    """Not of the goals that other tasks have, and no two alike."""
    made = [environments.seeds(s, 3, [g, g, g]) for s in range(3) for g in range(4)]
    assert len({x for row in made for x in row}) == 36
    assert environments.seeds(1, 3, [0, 2, 1])[1] == environments.seeds(1, 3, [3, 2, 3])[1]


# ------------------------------------------------------------------------------------------------- runs, toy world


def test_a_run_learns(tmp_path):
    changes = {"steps": 600, "horizon": 15, "init_steps": 90, "width": 32, "batch": 32, "capacity": 2000, "lr": 5e-3}
    changes |= {"evaluate_every": 60, "discount": 0.8, "tau": 0.05}
    made = settings_of("shared", "aligned", **changes)
    result = train(Run(tmp_path, made), make=Points)
    with (tmp_path / "log.csv").open() as file:
        rows = [line.strip().split(",") for line in file]
    returns = [float(row[rows[0].index("return")]) for row in rows[1:]]
    assert len(returns) == 10
    assert result["success"] > 0.6
    assert result["best"] >= result["success"]
    assert result["return"] > returns[0] + 2
    assert {f"success {t}" for t in TASKS} < result.keys()
    assert result["success"] == pytest.approx(np.mean([result[f"success {t}"] for t in TASKS]))
    assert float(rows[-1][rows[0].index("critic condition number")]) >= 1


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("network", "method", "stop"),
    [
        ("shared", "uniform", 3),
        ("care", "gradvac", 5),
        ("multi-head", "aligned-ub", 4),
        ("task-encoder", "nash", 5),
        ("single", "uniform", 1),
    ],
)
def test_a_stopped_run_ends_like_one_that_was_not(tmp_path, network, method, stop):
    made = settings_of(network, method, goals=3, evaluation_episodes=2, capacity=30)  # the replay wraps around
    whole = train(Run(tmp_path / "whole", made), make=Points)

    def until(episodes):
        for number in episodes:
            if number == stop:
                raise Killed
            yield number

    with pytest.raises(Killed):
        train(Run(tmp_path / "stopped", made), until, make=Points)
    torch.manual_seed(99)
    assert (tmp_path / "stopped" / "checkpoint.pt").exists() == (stop >= 2)
    assert train(Run(tmp_path / "stopped", made), make=Points) == whole
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 4


def test_evaluation_changes_nothing():
    """It draws no random number, and the training episodes after it are the same. Other seeds are other runs."""
    outcomes = []
    for seed, evaluating in [(0, True), (0, False), (1, False)]:
        training = Training(settings_of("shared", "aligned", seed), Points)
        returns = []
        for number in range(4):
            returns.append(training.episode(number))
            if evaluating:
                training.evaluate()
        outcomes.append((np.stack(returns), torch.cat([p.flatten() for p in training.agent.parameters()])))
    assert np.array_equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert not np.array_equal(outcomes[1][0], outcomes[2][0])


def test_success_is_at_any_step():
    class Blinks(Points):
        def step(self, actions):
            observations, rewards, _ = super().step(actions)
            self.steps += 1
            return observations, rewards, np.array([self.steps == 2, False, self.steps == 10])

        def reset(self, seeds):
            self.steps = 0
            return super().reset(seeds)

    success, returns = Training(settings_of(), Blinks).evaluate()
    assert success.tolist() == [1, 0, 1]
    assert returns.shape == (3,)


def test_goals_of_training_and_evaluation():
    seen = []

    class Noting(Points):
        def reset(self, seeds):
            seen.append(tuple(seeds))
            return super().reset(seeds)

    training = Training(settings_of(goals=3, evaluation_episodes=3, init_steps=1000), Noting)
    training.evaluate()
    evaluated = [set(column) for column in zip(*seen, strict=True)]
    assert all(len(goals) == 3 for goals in evaluated)
    seen.clear()
    for number in range(12):
        training.episode(number)
    assert [set(column) for column in zip(*seen, strict=True)] == evaluated
    assert len(set(seen)) > 3  # tasks draw their goals independently
    seen.clear()
    Training(settings_of(goals=3, init_steps=1000), Noting).episode(5)
    Training(settings_of(goals=3, init_steps=1000), Noting).episode(5)
    assert seen[0] == seen[1]


def test_updates_begin_after_random_actions(monkeypatch):
    steps = []
    monkeypatch.setattr(sac.Agent, "update", lambda self, batch: steps.append(len(batch.action)))
    for every, expected in [(1, 45), (2, 22), (3, 15)]:
        steps.clear()
        training = Training(settings_of(update_every=every), Points)
        for number in range(6):
            training.episode(number)
        assert len(steps) == expected


def test_measure_counts_what_a_run_does():
    cost = measure(settings_of("shared", "aligned"), steps=3, make=Points)
    assert cost.keys() == {"environments", "policy", "update", "run"}
    steps = 60 + 30
    expected = steps * (cost["environments"] + cost["policy"]) + 45 * cost["update"]
    assert cost["run"] == pytest.approx(expected / 1e3)


def test_learning_curves(tmp_path):
    for seed in range(2):
        (tmp_path / f"{seed}").mkdir()
        rows = [f"{n},{10 * n},{(n + seed) / 10},{n / 10}" for n in range(6)]
        (tmp_path / f"{seed}" / "log.csv").write_text("\n".join(["step,steps,success,success a", *rows]) + "\n")
    folders = [tmp_path / "0", tmp_path / "1"]
    steps, values = plots.curves(folders, "success")
    assert steps.tolist() == [0, 10, 20, 30, 40, 50]
    assert values[1].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    plots.learning_curves(tmp_path / "plot.png", {"x": folders}, ["a"])
    assert 2000 < (tmp_path / "plot.png").stat().st_size < 300_000


def test_the_command_on_points(tmp_path, monkeypatch):
    """Networks x methods x seeds, the table's rows, and the forecast."""
    monkeypatch.setattr(command_line, "train", functools.partial(train, make=Points))
    monkeypatch.setattr(command_line, "measure", functools.partial(measure, make=Points))
    monkeypatch.setattr(command_line, "check_tasks", lambda names: None)
    asked = [
        "--tasks",
        "a, b",
        "--steps",
        "30",
        "--horizon",
        "10",
        "--init-steps",
        "15",
        "--width",
        "8",
        "--batch",
        "4",
    ]
    asked += ["--capacity", "30", "--seeds", "2", "--network", "single", "--network", "multi-head"]
    asked += [
        "--method",
        "uniform",
        "--method",
        "aligned-ub",
        "--temperature",
        "shared",
        "--out",
        str(tmp_path / "runs"),
    ]
    shown = CliRunner().invoke(app, [*asked, "--forecast"], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert not (tmp_path / "runs").exists()
    shown = CliRunner().invoke(app, [*asked, "--results", str(tmp_path / "results")], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    table = json.loads((tmp_path / "results" / "table.json").read_text())
    assert list(table["rows"]) == ["single-task", "multi-head uniform", "multi-head aligned-ub"]
    assert set(table["seeds"].values()) == {2}
    assert table["columns"] == ["success ↑", "best ↑", "success a ↑", "success b ↑", "return ↑"]
    assert "2 seeds instead of 10" in table["about"]["reduced"]
    runs = [json.loads(p.read_text()) for p in sorted((tmp_path / "runs").glob("*/seed-1/settings.json"))]
    assert [(r["network"], r["method"], r["temperature"]) for r in runs] == [
        ("multi-head", "aligned-ub", "shared"),
        ("multi-head", "uniform", "shared"),
        ("single", "uniform", "shared"),
    ]


# ------------------------------------------------------------------------------------------------------- Meta-World


@functools.cache
def metaworld():
    """Skips where it is not installed."""
    return pytest.importorskip("metaworld", reason="needs metaworld: pip install 'fastmtl-torch[rl]'")


def test_the_suite_is_meta_worlds():
    metaworld()
    from metaworld.env_dict import MT10_V3

    assert tuple(MT10_V3) == SUITES["mt10"]


def test_mt10_trains(tmp_path):
    metaworld()
    made = replace(PROTOCOLS["full"], steps=8, horizon=8, init_steps=6, width=16, capacity=16, batch=4)
    training = Training({**asdict(made), "network": "shared", "method": "aligned", "seed": 0}, environments.MetaWorld)
    before = copy.deepcopy(training.agent.state_dict())
    updates = []
    update = training.agent.update
    training.agent.update = lambda batch: updates.append(update(batch)) or updates[-1]
    returns = training.episode(0)
    assert len(updates) == 2
    assert returns.shape == (10,)
    assert (returns > 0).all()  # rewards are in [0, 10]
    assert all(u.infos["critic"].gram.shape == (10, 10) for u in updates)
    for name, value in training.agent.state_dict().items():
        assert value.isfinite().all()
        if name.startswith(("actor", "critic")):
            assert not torch.equal(value, before[name]), name
    numbers = training.numbers(returns)
    assert {f"success {t}" for t in SUITES["mt10"]} < numbers.keys()
    training.environments.close()


def test_episodes_are_functions_of_seeds_and_actions():
    """Also after other episodes, which a resumed run has not seen; the goal is observed and is the seed's."""
    metaworld()
    world, rng = environments.MetaWorld(["reach-v3", "drawer-close-v3"]), np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (12, 2, 4)).astype(np.float32)

    def episode(world, seeds):
        first = world.reset(seeds)
        return first, [np.concatenate([o.ravel(), r, s]) for o, r, s in map(world.step, actions)]

    first, steps = episode(world, [1, 2])
    assert first.shape == (2, 39)
    other, _ = episode(world, [3, 2])
    assert not np.array_equal(first[0, 36:], other[0, 36:])  # where the goal stands
    assert np.array_equal(first[1, 36:], other[1, 36:])
    for again in (world, environments.MetaWorld(["reach-v3", "drawer-close-v3"])):
        o, s = episode(again, [1, 2])
        assert np.array_equal(o, first)
        assert np.array_equal(s, steps)


def test_an_unknown_task_is_named():
    metaworld()
    with pytest.raises(ValueError, match=r"tasks: expected some of assembly-v3, .*, got 'reach-v9'"):
        environments.check_tasks(["reach-v3", "reach-v9"])
    shown = CliRunner().invoke(app, ["--tasks", "reach-v9", "--quick"])
    assert shown.exit_code == 2
    assert "reach-v9" in shown.output


def test_command_refuses_what_does_not_go_together(tmp_path):
    metaworld()
    shown = CliRunner().invoke(app, ["--quick", "--method", "aligned-ub", "--out", str(tmp_path)])
    assert shown.exit_code == 2
    assert "multi-head" in shown.output
    assert not any(tmp_path.iterdir())
    assert CliRunner().invoke(app, ["--suite", "mt7"]).exit_code == 2


SMOKE = [
    *("--quick", "--method", "aligned", "--seeds", "1", "--steps", "120", "--horizon", "15", "--init-steps", "20"),
    *("--width", "16", "--batch", "8", "--capacity", "60", "--evaluate-every", "15"),
]


@pytest.mark.smoke
def test_a_killed_command_ends_like_one_that_was_not(tmp_path):
    """MT3 from the command line to table and figure."""
    metaworld()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shown = CliRunner().invoke(app, [*SMOKE, "--out", str(tmp_path / "whole")], catch_exceptions=False)
        assert shown.exit_code == 0, shown.output
        run = tmp_path / "killed" / "shared-aligned" / "seed-0"
        command = [*SMOKE, "--out", str(tmp_path / "killed"), "--results", str(tmp_path / "results")]
        kill_in(start("rl", command), run)
        shown = CliRunner().invoke(app, command, catch_exceptions=False)
        assert shown.exit_code == 0, shown.output
    finally:
        torch.set_num_threads(threads)
    for name in ("result.json", "log.csv", "settings.json"):
        texts = [(tmp_path / kind / "shared-aligned" / "seed-0" / name).read_text() for kind in ("whole", "killed")]
        assert texts[0] == texts[1], name
    table = json.loads((tmp_path / "results" / "table.json").read_text())
    assert table["about"]["settings"]["steps"] == 120
    assert "steps 120 instead of 2000000" in table["about"]["reduced"]
    assert table["rows"]["shared aligned"].keys() >= {"success ↑", "best ↑", "success reach-v3 ↑", "return ↑"}
    assert (tmp_path / "results" / "success.png").stat().st_size < 300_000
