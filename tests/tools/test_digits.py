"""The demo: it runs end to end, and its plain PyTorch Aligned-MTL trains as fastmtl's does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import digits as demo
import pytest
import torch


def test_quick_run_prints_the_table_and_saves_the_figure(tmp_path, capsys):
    figure = tmp_path / "new" / "curves.png"
    numbers = tmp_path / "demo.json"
    assert demo.main(["--quick", "--steps", "12", "--out", str(figure), "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "1 seed, 12 steps",
        "left digit",
        "right digit",
        "κ of the task gradients",
        "training step, ms",
    ):
        assert expected in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    content = json.loads(numbers.read_text())
    assert content["methods"].keys() == demo.STEPS.keys()
    assert f"{content['methods']['fastmtl']['left'][0]:.1f}" in printed
    U, sigma, V = torch.linalg.svd(gradients_of_the_first_step(), full_matrices=False)
    expected = (U * sigma @ V).sum(0).norm() / (sigma[-1] * U.mean(0).norm())
    assert content["shorter"] == pytest.approx([float(expected)], rel=1e-4)


def gradients_of_the_first_step():
    """[3, P], float64."""
    net = demo._network(0)
    rows = demo.task_gradients(net, net.losses(demo.Digits(0).train()))
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()


@pytest.mark.parametrize("seed", [0, 1])
def test_first_gradients_agree(seed):
    found = demo.first_gradients(seed)
    assert demo.difference(found["fastmtl"], found["exact"]) < 2e-6
    assert demo.difference(found["pure"], found["fastmtl"]) < demo.AGREE


def test_heads_get_their_own_gradients_in_both():
    grads = {}
    for name in ("fastmtl", "pure"):
        net = demo._network(0)
        demo.STEPS[name](net, net.losses(demo.Digits(0).train()))
        grads[name] = [p.grad for p in net.heads.parameters()]
    for ours, theirs in zip(grads["fastmtl"], grads["pure"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fastmtl_and_pure_train_the_same():
    ours, theirs = (demo.train(name, seed=0, steps=12) for name in ("fastmtl", "pure"))
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=5e-3, atol=0.0)
    assert ours.mean_kappa == pytest.approx(theirs.mean_kappa, rel=5e-2)


def test_runs_are_reproducible_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again = (demo.train("uniform", seed=3, steps=3) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)


def test_test_pairs_share_no_digit_with_training():
    digits = demo.Digits(0)
    assert set(digits._train.tolist()).isdisjoint(digits._test.tolist())


def test_a_digit_keeps_its_place():
    batch = demo.Digits(0).test()
    left = batch.apart.reshape(-1, 2, 8, 8)[:, 0]
    image = batch.image.reshape(-1, 8, 12)
    assert torch.equal(image[:, :, :4], left[:, :, :4])
    assert bool((image[:, :, 4:8] >= left[:, :, 4:]).all())


@pytest.mark.parametrize("arguments", [{"seeds": 0}, {"steps": 1}])
def test_run_rejects_nothing_to_do(arguments):
    with pytest.raises(ValueError, match="expected seeds >= 1 and steps >= 2"):
        demo.run(**arguments)


@pytest.mark.parametrize("arguments", [["train"], ["--seeds", "0"], ["--steps", "x"]])
def test_wrong_arguments_exit_2_with_a_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_without_its_extra_it_says_what_to_install():
    hidden = "import sys; sys.modules.update(dict.fromkeys(('rich', 'matplotlib', 'sklearn')))\nimport digits"
    paths = [str(Path(demo.__file__).parent), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run([sys.executable, "-c", hidden], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ImportError: the demo needs" in done.stderr
    assert "pip install 'fastmtl-torch[demo]'" in done.stderr
