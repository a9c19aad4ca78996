"""`worker prune`: what it says where there is nothing to look at."""

from pathlib import Path

import pytest

from jobworker.cli.worker.prune import prune_here
from jobworker.errors import ConfigError


def test_state_directory_that_is_missing_is_named_with_a_remedy(tmp_path: Path) -> None:
    config = tmp_path / "worker.toml"
    config.write_text(f'[worker]\nstate_dir = "{tmp_path}/missing"\n')
    with pytest.raises(ConfigError) as caught:
        prune_here(config, older_than=None, keep=0, max_size=None)
    assert caught.value.message.startswith(f"cannot prune {tmp_path}/missing/")
    assert caught.value.message.endswith(": No such file or directory")
    assert "a service that has run once" in caught.value.remedy
