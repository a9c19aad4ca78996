"""The budget of descriptors: what does not fit is refused, the rest bounds what is read."""

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from jobworker.config.settings import Settings
from jobworker.errors import HostUnsupported
from jobworker.server.host.descriptor_budget import MIN_OUTPUTS, OWN, outputs_within

from ...strategies import examples


@examples(max_examples=100)
@given(
    limit=st.integers(64, 100_000),
    running=st.integers(1, 4000),
    waiting=st.integers(0, 10_000),
    connections=st.integers(1, 10_000),
)
def test_all_that_is_counted_fits_or_is_refused(
    limit: int, running: int, waiting: int, connections: int
) -> None:
    settings = Settings()
    settings = evolve(
        settings,
        worker=evolve(settings.worker, max_concurrent_jobs=running, max_waiting_jobs=waiting),
        limits=evolve(settings.limits, max_connections=connections),
    )
    needed = 5 * running + 3 * waiting + connections + settings.limits.max_handshakes
    if needed + 3 * MIN_OUTPUTS + OWN > limit:
        with pytest.raises(HostUnsupported, match=rf"{limit} may be open.*LimitNOFILE"):
            outputs_within(settings, limit)
    else:
        outputs = outputs_within(settings, limit)
        assert outputs >= MIN_OUTPUTS
        assert needed + 3 * outputs <= limit


def test_default_configuration_fits_into_8192() -> None:
    assert outputs_within(Settings(), 8192) > 500
    with pytest.raises(HostUnsupported, match="1024 may be open"):
        outputs_within(Settings(), 1024)
