"""Functions that tests call in a process of their own: `commands().start(..., call=)`."""

import time


def save_forever(argv: list[str]) -> None:
    """In a process of its own: overwrites one checkpoint again and again, until it is killed."""
    import torch

    from fastlm import AdamW, save_checkpoint

    model = torch.nn.Linear(256, 1024)
    optimizer = AdamW(model.parameters())
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    iteration = 0
    while True:
        iteration += 1
        with torch.no_grad():
            model.weight.fill_(iteration)
        save_checkpoint(model, optimizer, iteration, argv[0])
        print(iteration, flush=True)


def save_once(argv: list[str]) -> None:
    """In a process of its own: saves, and tells how that failed."""
    import torch

    from fastlm import save_checkpoint

    try:
        save_checkpoint(torch.nn.Linear(256, 256), None, 8, argv[0])
    except OSError as error:
        print(type(error).__name__, error)


def train_and_tell_curve(argv: list[str]) -> int:
    """In a process of its own: trains, and tells the steps of the curve that is saved."""
    from fastlm.plot import LivePlotter
    from fastlm.train import main

    told = []
    LivePlotter.save = lambda self, path: told.append(
        f"train {self.train_steps}\nval {self.eval_steps}"
    )
    code = main(argv)
    print(*told, sep="\n")
    return code


def tell_peak_memory(argv: list[str]) -> None:
    """In a process of its own: the peak before and after 200 MiB are used."""
    import torch

    from fastlm.hardware import peak_memory_bytes

    cpu = torch.device("cpu")
    # What the fork inherited must not hide it: use what is there first.
    print(peak_memory_bytes(cpu))
    torch.ones(200 << 18)
    print(peak_memory_bytes(cpu))


def train_slowly_from_3(argv: list[str]) -> int:
    """In a process of its own: a run whose step 3 takes a minute."""
    from fastlm.step import TrainStep
    from fastlm.train import main

    run = TrainStep.run

    def slow(self, step, lr):
        if step == 3:
            time.sleep(60)
        return run(self, step, lr)

    TrainStep.run = slow
    return main(argv)
