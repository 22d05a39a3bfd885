"""A whole program in small: settings, a run folder, AdamW on three weights, stop and resume."""

import sys
from pathlib import Path

import torch

from reward.checkpoint import flatten_optimizer, restore_optimizer
from reward.config import Config, parse
from reward.run import Run, generator, open_run, stop_on_signal


class Settings(Config):
    """Train three weights."""

    run: Path
    steps: int = 12
    lr: float = 0.1
    save_every: int = 4


def train(settings: Settings, *, until: int | None = None) -> int:
    """Train, or go on training; give the exit status. `until` stops early, like a signal in that step."""
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    with open_run(settings.run, settings, seed=0) as run, stop_on_signal() as stop:
        start = _resume(run, model, optimizer)
        for step in range(start + 1, settings.steps + 1):
            batch = torch.randn(8, 3, generator=generator(0, step=step, purpose="batch"))
            loss = (model(batch) - batch.sum(1, keepdim=True).sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(step, {"loss": loss.item()})
            last = bool(stop) or step in (until, settings.steps)
            if last or step % settings.save_every == 0:
                tensors, state = flatten_optimizer(optimizer)
                run.save(step, {"weight": model.weight, **tensors}, {"optimizer": state})
            if last:
                break
    return stop.exit_status


def _resume(run: Run, model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> int:
    point = run.resume()
    if point is None:
        return 0
    model.load_state_dict({"weight": point.tensors["weight"]})
    restore_optimizer(optimizer, point.tensors, point.state["optimizer"])
    return point.step


if __name__ == "__main__":
    raise SystemExit(train(parse(Settings, sys.argv[1:], prog="tiny")))
