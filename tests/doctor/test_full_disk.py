"""A full disk leaves the reports of an earlier run as they were, and nothing half written beside them."""

import resource

import pytest
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.errors import StoreError


@pytest.mark.parametrize("room", [64, 20_000])
def test_the_report_of_before_is_kept_whole(work, tmp_path, room):
    """No file can grow beyond ``room``, the kernel's answer is that of a full disk: JSON, or only the page, fails."""
    out = tmp_path / "out"
    arguments = ["doctor", str(work / "stores" / "a"), "--target", str(work / "stores" / "target"), "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before["doctor.html"]) > 20_000 > len(before["doctor.json"]) > 64
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(result.exception, StoreError)
    assert "cannot write" in str(result.exception)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
