"""Training steps that must repeat bitwise: captured and not, replayed, run twice (layer 4)."""

import torch
from torch import Tensor

from cifar_resnet_fast.training.engine import Engine
from cifar_resnet_fast.verification.budget import Unavailable, WrongResult, assert_same_bits
from cifar_resnet_fast.verification.networks import Problem, package_engine

CAPTURED_STEPS, REPLAYS, RUN_STEPS = 5, 100, 20


def captured_as_not(problem: Problem, implementation: str) -> None:
    """Raise WrongResult if captured steps do not leave the bits of steps that are not captured."""
    _needs_graphs(problem)
    plain = package_engine(problem, implementation, captured=False)
    captured = package_engine(problem, implementation)
    states = [_after(engine, CAPTURED_STEPS) for engine in (plain, captured)]
    assert_same_bits(f"{CAPTURED_STEPS} steps, captured and not", *states)


def replays(problem: Problem, implementation: str) -> None:
    """Raise WrongResult if a hundred replays from one state do not leave the same bits twice."""
    _needs_graphs(problem)
    engine = package_engine(problem, implementation)
    engine.train_step()
    begun = {name: _copied(value) for name, value in engine.state_dict().items()}
    first = _after(engine, REPLAYS)
    engine.load_state_dict(begun)
    assert_same_bits(f"{REPLAYS} replays", first, _after(engine, REPLAYS))


def same_run(problem: Problem, implementation: str) -> None:
    """Raise WrongResult if a run does not repeat bitwise, or if another seed leaves its bits."""
    ends = []
    for seed in (0, 1):
        twice = [
            _after(package_engine(problem, implementation, seed=seed), RUN_STEPS) for _ in range(2)
        ]
        assert_same_bits(f"{RUN_STEPS} steps with seed {seed}, twice", *twice)
        ends.append(twice[0])
    if all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()):
        raise WrongResult("runs with seeds 0 and 1 must differ, and are the same")


def _needs_graphs(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA GPU")


def _after(engine: Engine, steps: int) -> dict[str, Tensor]:
    """All tensors of a run's state after so many more steps, copied."""
    for _ in range(steps):
        engine.train_step()
    return dict(_tensors(engine.state_dict()))


def _tensors(state, name: str = ""):
    if isinstance(state, Tensor):
        yield name, state.clone()
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name} {key}".strip())


def _copied(value):
    """A state's value, its tensors cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
