"""The same mathematics as the composition's: the loss after 1,000 steps of each.

    python bench/same_loss.py [--steps 1000] [--seeds 3]

A model of 4 layers, D 256, learns the default corpus in batches of 4 x 128 tokens, twice: by
fastlm's step and by the composition of peer_model.py; same weights to begin with, batches, rates,
decay. Then both are evaluated alike, in fp32, on all held-out tokens. Rounding differs, and grows:
two runs of one code on other thread counts end as far apart. Exit code 1 if the difference, on
average over the seeds, is more than 0.005 nats.
"""

import argparse
import sys

import torch
from peer_model import PeerLM, PeerStep, decay_groups

from fastlm import TrainingConfig, create_model_and_optimizer
from fastlm.corpus import default_corpus
from fastlm.data.files import Data, open_data
from fastlm.data.loader import TrainLoader
from fastlm.evaluate import evaluating, loss_over_all, summed_loss
from fastlm.hardware import keep_freed_memory, select_device
from fastlm.model_loss import ModelLoss
from fastlm.schedule import learning_rate
from fastlm.step import TrainStep, set_seed

LIMIT = 0.005  # nats per token


def losses(seed: int, steps: int, data: Data, dtype: str) -> tuple[float, float]:
    """(ours, the composition's) on the held-out tokens."""
    cfg = TrainingConfig(
        num_layers=4, num_heads=4, d_model=256, vocab_size=data.manifest.vocab_size,
        batch_size=4, context_len=128, total_steps=steps, cosine_iters=steps, warmup_iters=50,
        lr_max=1e-3, lr_min=5e-5, seed=seed, guard="off", compile=True, dtype=dtype,
    )  # fmt: skip
    set_seed(seed)
    torch.compiler.reset()
    device = select_device(cfg.device)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    loader = TrainLoader(data.train, cfg.batch_size, cfg.context_len, seed=seed, device=device)
    step = TrainStep(ModelLoss(model, device, cfg), optimizer, loader, cfg)
    composition = PeerLM(model)
    theirs = PeerStep(
        composition, decay_groups(composition, cfg.weight_decay), step.dtype,
        betas=cfg.betas, max_norm=cfg.grad_clip_norm,
    )  # fmt: skip
    for number in range(steps):
        first, lr = number * cfg.batch_size, learning_rate(number, cfg)
        ours = step.run(first, lr)
        other = theirs.run(*loader.batch(first), lr)
        if number % 100 == 0:
            print(f"seed {seed}, step {number}: {ours:.4f} {other:.4f}", file=sys.stderr)

    def held_out(trained: torch.nn.Module) -> float:
        with evaluating(trained):
            found = loss_over_all(
                lambda x, y: summed_loss(trained(x), y),
                data.val, cfg.batch_size, cfg.context_len, device,
            )  # fmt: skip
        return found.loss

    return held_out(model), held_out(composition)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    keep_freed_memory()
    data = open_data((str(default_corpus(log=lambda line: None)),))
    found = [losses(seed, args.steps, data, args.dtype) for seed in range(args.seeds)]
    print("| seed | fastlm | composition | difference |\n|---|---|---|---|")
    means = [sum(column) / len(found) for column in zip(*found, strict=True)]
    for name, (ours, theirs) in [*enumerate(found), ("mean", means)]:
        print(f"| {name} | {ours:.4f} | {theirs:.4f} | {ours - theirs:+.4f} |")
    return int(abs(means[0] - means[1]) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
