"""The example of losses of examples: it runs end to end, and labels are wrong where it says."""

import noisy_labels as example
import torch


def test_a_short_run_prints_the_table(capsys):
    runs = example.main(["--epochs", "2", "--batch", "128", "--methods", "mean gradient", "UPGrad"])
    printed = capsys.readouterr().out
    assert list(runs) == ["mean gradient", "UPGrad"]
    assert all(name in printed for name in runs)
    assert all(run.accuracy > 0.8 for run in runs.values())
    assert runs["mean gradient"].ratio == 1
    assert runs["mean gradient"].pull > 1.2  # wrong labels have the long gradients


def test_wrong_labels_are_wrong():
    clean, _ = example.load(0.0, 3)
    noisy, test = example.load(0.1, 3)
    assert torch.equal(clean.x, noisy.x)
    assert torch.equal(clean.y != noisy.y, noisy.wrong)
    assert 0.05 < noisy.wrong.double().mean() < 0.15
    assert not test.wrong.any()
