"""A LoRA adapter with two objectives in Hugging Face's Trainer: the next byte of a text, and where its line ends.

The language model is frozen (here a small GPT-2 from its initialisation, so that nothing is downloaded), and so what
both objectives share are the adapter's factors: only these are aligned, each kind on its own. Heads are their own.

    python examples/adapter.py --help
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmtl
from fastmtl.integrations.transformers import MultiTaskTrainer

try:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2Model, TrainingArguments
except ImportError as error:
    raise ImportError(f"the example needs {error.name}: pip install 'fastmtl-torch[transformers]' peft") from error

LENGTH, WIDTH, NEWLINE = 32, 32, 10


class Model(nn.Module):
    """A frozen GPT-2 over bytes with an adapter in its attention, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2)
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
        self.gpt = get_peft_model(GPT2Model(config), adapter)
        self.byte, self.end = nn.Linear(WIDTH, 256), nn.Linear(WIDTH, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[N, L] -> the last hidden state [N, L, width]."""
        return self.gpt(input_ids=input_ids).last_hidden_state


class AdapterTrainer(MultiTaskTrainer):
    """The two objectives."""

    def compute_losses(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """The next byte, and whether the line ends within eight bytes."""
        h, ids = model(inputs["input_ids"]), inputs["input_ids"]
        ends = (F.max_pool1d((ids == NEWLINE).float()[:, None], 8, 1)[:, 0] > 0)[:, 1:].float()
        end = model.end(h[:, : ends.shape[1], :])[..., 0]
        return {
            "losses": {
                "byte": F.cross_entropy(model.byte(h[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()),
                "end": F.binary_cross_entropy_with_logits(end, ends),
            }
        }


def factors(model: nn.Module) -> list[list[nn.Parameter]]:
    """The adapter's two kinds of factors: B begins at zero, and A's gradients with it, so that each is a group."""
    return [[p for name, p in model.named_parameters() if kind in name] for kind in ("lora_A", "lora_B")]


def texts() -> list[dict[str, Tensor]]:
    """This file, in pieces of so many bytes."""
    ids = torch.tensor(list(Path(__file__).read_bytes()))
    return [{"input_ids": piece} for piece in ids.unfold(0, LENGTH, LENGTH // 2)]


def main(arguments: list[str] | None = None) -> AdapterTrainer:
    """Trains, and prints what the trainer logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--out", default="runs/adapter", help="the trainer's folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    trainer = AdapterTrainer(
        model=Model(),
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=max(options.steps // 5, 1),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=texts(),
        method=fastmtl.AlignedMTL(),
        groups=factors,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
