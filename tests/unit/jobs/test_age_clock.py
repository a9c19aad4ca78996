"""The clock for the age of output: a time of day that is wrong makes nothing old."""

from pathlib import Path

import pytest
from attrs import define

from jobworker.jobs.age_clock import PATIENCE_NS, SECOND, AgeClock

DAY = 24 * 3600 * SECOND
NOW = 1_800_000_000 * SECOND


@define(eq=False)
class Host:
    """A host whose time of day can be set, and whose time since boot cannot."""

    path: Path
    wall: int = NOW
    boot: int = 1000 * SECOND
    boot_id: str = "first"

    def passes(self, ns: int) -> None:
        self.wall, self.boot = self.wall + ns, self.boot + ns

    def reboots(self, off_ns: int) -> None:
        self.wall, self.boot, self.boot_id = self.wall + off_ns, 0, self.boot_id + "+"

    def service(self, newest: int = 0) -> AgeClock:
        made = AgeClock(
            self.path / "clock",
            wall_ns=lambda: self.wall,
            boot_ns=lambda: self.boot,
            boot_id=self.boot_id,
        )
        made.begin(newest)
        return made


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_goes_with_a_clock_that_is_right(host: Host) -> None:
    clock = host.service()
    for _ in range(100):
        host.passes(DAY)
        host.wall += SECOND  # adjusted
        assert clock.now_ns() == host.wall


@pytest.mark.parametrize("jump", [40 * DAY, -40 * DAY])
@pytest.mark.parametrize("restarts", ["no", "yes", "reboot"])
def test_jump_counts_for_nothing_while_it_is_short(host: Host, jump: int, restarts: str) -> None:
    clock = host.service()
    before = clock.now_ns()
    host.wall += jump
    for hour in range(1, 20):
        if restarts == "reboot" and hour == 5:
            host.reboots(0)
        if restarts != "no":
            clock = host.service(newest=NOW + jump)
        assert clock.now_ns() <= before + hour * 3600 * SECOND
        host.passes(3600 * SECOND)
    host.wall -= jump
    assert clock.now_ns() <= host.wall
    host.passes(3600 * SECOND)
    assert clock.now_ns() > host.wall - 2 * 3600 * SECOND


def test_clock_at_the_first_start_that_is_ahead_of_all_records_waits(host: Host) -> None:
    host.wall += 40 * DAY
    clock = host.service(newest=NOW)
    assert clock.now_ns() == NOW
    host.passes(PATIENCE_NS)
    assert clock.now_ns() == host.wall


def test_clock_that_stays_is_followed_after_a_day(host: Host) -> None:
    clock = host.service()
    clock.now_ns()
    host.reboots(40 * DAY)  # it was off
    clock = host.service()
    assert clock.now_ns() <= NOW
    for _ in range(24):
        host.passes(3600 * SECOND)
        clock = host.service()
        clock.now_ns()
    assert clock.now_ns() == host.wall


def test_clock_that_jumps_to_and_fro_is_never_followed(host: Host) -> None:
    clock = host.service()
    for hour in range(100):
        host.wall += DAY if hour % 2 else -DAY
        clock.now_ns()
        host.passes(3600 * SECOND)
        assert clock.now_ns() <= NOW + (hour + 1) * 3600 * SECOND


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"shown_ns": "x"}', "\0" * 100, '{"shown_ns":'])
def test_file_that_is_spoilt_is_no_witness(host: Host, text: str) -> None:
    (host.path / "clock").write_text(text)
    assert host.service(newest=NOW - DAY).now_ns() == NOW - DAY
