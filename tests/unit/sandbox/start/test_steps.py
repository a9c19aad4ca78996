"""Steps: each kind has a name and the one function that makes it hold."""

import re
from typing import get_args

import pytest

from jobworker.sandbox.start import steps as s
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.start.apply import _APPLY, StepFailed, _subject
from jobworker.sandbox.start.plan import (
    Layer,
    Order,
    OwnNetwork,
    RootView,
    Sizes,
    Slot,
    finish,
    prepare,
)

VOLUME = ("srv", "/volumes/srv.img", "/srv")
VIEW = RootView("/dev/null", ("/base",), (Layer("", ("/base",)),), volumes=(VOLUME,))
READ_ONLY = RootView("/root/dev/null", scratch="/scratch")
KINDS: tuple[type, ...] = get_args(s.Step)


def test_every_kind_of_step_has_its_function_and_every_function_its_kind() -> None:
    # The two last steps of a plan are the trampoline's, by the names that it tells.
    finishing = {s.ChangeDirectory, s.Execute}
    assert {s.name_of(kind) for kind in finishing} < set(trampoline.STEPS)
    assert set(_APPLY) == set(KINDS) - finishing
    assert len(set(_APPLY.values())) == len(_APPLY)


def test_every_kind_of_step_stands_in_the_union() -> None:
    defined = {
        each
        for each in vars(s).values()
        if isinstance(each, type) and issubclass(each, tuple) and each.__module__ == s.__name__
    }
    assert defined == set(KINDS)


def test_every_kind_of_step_is_in_the_plan() -> None:
    order = Order("h", ("a",), {}, "", uid=1, gid=1)
    slot = Slot("job-1", 100_000)
    steps = [
        *prepare("/root", VIEW, slot, Sizes(1, 1, 1), order, OwnNetwork("h")),
        *prepare(
            "/root", READ_ONLY, slot, Sizes(1, 1, 1), order, OwnNetwork("h", has_gateway=True)
        ),
        *prepare("/root", READ_ONLY, slot, Sizes(1, 1, 1), order._replace(init=True)),
        *finish(order),
    ]
    assert {type(step) for step in steps} == set(KINDS)


def test_names_of_steps_are_words_with_hyphens_and_all_different() -> None:
    names = [s.name_of(kind) for kind in KINDS]
    assert len(set(names)) == len(KINDS)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (s.EnterUserNamespace(leave_groups=True), "enter-user-namespace"),
        (s.EnterUserNamespace, "enter-user-namespace"),
        (s.Execute(("a",), ()), "execute"),
        (s.ChangeDirectory("/x"), "change-directory"),
    ],
)
def test_step_is_named_by_its_words(step: s.Step, name: str) -> None:
    assert s.name_of(step) == name


def test_failure_tells_what_the_step_was_about() -> None:
    assert _subject(s.ChangeDirectory("/nowhere")) == "/nowhere"
    assert _subject(s.AttachScope()) == ""
    failed = StepFailed("change-directory", 2, "/nowhere")
    assert (failed.step, failed.code, failed.detail) == ("change-directory", 2, "/nowhere")
