"""docs/scale.md has the tables that its script calculates from the measured rates."""

from pathlib import Path

import paper_runs
import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()


@pytest.mark.parametrize("table", [paper_runs.capture_table, paper_runs.sample_table, paper_runs.limits_table])
def test_the_page_has_the_tables_of_the_script(table):
    assert table() in PAGE


def test_sizes_and_times_have_units_that_suit_them():
    assert [paper_runs.size(n) for n in (900, 5e6, 88e6, 1.2e9, 938e9, 2.8e12)] == [
        "1 kB",
        "5.0 MB",
        "88 MB",
        "1.2 GB",
        "938 GB",
        "2.8 TB",
    ]
    assert [paper_runs.hours(seconds) for seconds in (290, 3600, 63_700)] == ["5 min", "1.0 h", "17.7 h"]
