"""The examples of training run end to end, and learn."""

import pinn
import pytest
import torch


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
