"""The examples of training run end to end, and learn."""

import actor_critic
import data_parallel
import pinn
import pytest
import torch
import value_head


def test_losses_with_an_optimizer_each(capsys):
    assert max(actor_critic.main(["--steps", "150"])) < 0.4
    assert "distance" in capsys.readouterr().out


def test_a_language_model_with_a_value_head():
    history = value_head.main(["--steps", "30"])
    for name in ("text", "value"):
        losses = [step[name] for step in history]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), name


def test_processes_that_are_one(capsys):
    """More of them are in tests/distributed."""
    data_parallel.main(["--processes", "1", "--steps", "60"])
    assert capsys.readouterr().out.startswith("one process: losses 0.")


def test_a_physics_informed_network(capsys):
    assert pinn.main(["--adam", "120", "--lbfgs", "2"]) < 0.02
    assert "equation" in capsys.readouterr().out


def test_an_adapter_with_two_objectives(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed: make test-trainers installs it")
    pytest.importorskip("transformers", reason="transformers is not installed: make test-trainers installs it")
    import adapter

    before = dict(adapter.Model().named_parameters())
    trainer = adapter.main(["--steps", "20", "--out", str(tmp_path)])
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert {"mtl/alpha/0/byte", "mtl/alpha/1/end", "mtl/conflicts"} <= lines[0].keys()
    for name, p in trainer.model.named_parameters():
        changed = not torch.equal(p, before[name])
        assert changed == (p.requires_grad), name
        assert p.requires_grad == ("lora" in name or "gpt" not in name), name
