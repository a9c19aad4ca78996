"""A short turn of every fuzz target: its seeds, and what Hypothesis makes of them.

Each fuzz/fuzz_NAME.py has a function `one(data: bytes)`, which raises only for a fault, and seeds
in fuzz/seeds/NAME. `make fuzz` runs them for long, guided by coverage.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobworker.sandbox import channel
from jobworker.sandbox.protocol import operations

FUZZ = Path(__file__).parents[2] / "fuzz"
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in FUZZ.glob("fuzz_*.py"))


def load(target: str) -> Callable[[bytes], None]:
    spec = importlib.util.spec_from_file_location(f"fuzz_{target}", FUZZ / f"fuzz_{target}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    one: Callable[[bytes], None] = module.one
    return one


def seeds(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((FUZZ / "seeds" / target).iterdir())]


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A seed with some bytes taken out and others put in, or bytes out of nowhere."""
    data = bytearray(draw(st.sampled_from(originals) | st.binary(max_size=200)))
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        data[at : at + length] = draw(st.binary(max_size=8))
    return bytes(data)


@pytest.mark.parametrize("target", TARGETS)
def test_seeds(target: str) -> None:
    one, given_seeds = load(target), seeds(target)
    assert given_seeds
    for data in given_seeds:
        one(data)


@pytest.mark.parametrize("target", TARGETS)
def test_mutations_of_seeds(target: str) -> None:
    one, given_seeds = load(target), seeds(target)

    @settings(max_examples=150)
    @given(mutated(given_seeds))
    def never_raises(data: bytes) -> None:
        one(data)

    never_raises()


def test_requests_among_the_launchers_seeds_are_still_requests() -> None:
    """A new field would leave them refused at the door, and the fuzzing would end there."""
    valid = "spawn spawn-volume plan list signal kill remove usage"
    for name in f"{valid} volume-create volume-remove volume-list".split():
        packet = (FUZZ / "seeds" / "launcher_requests" / name).read_bytes()[1:]
        message, _ = channel.decode(packet, [], 0)
        operations.parse(message)
