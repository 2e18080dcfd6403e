"""Reports of hostile names and of numbers of any size."""

import html
import re

import numpy as np
import pytest

from sfv_jax.evaluation import report as pages
from sfv_jax.evaluation.report import Report, Spread, dot_plot, line_plot, number, ticks
from sfv_jax.runtime.files import one_line

HOSTILE = {
    "a|b\n| c": r"a\|b\\n\| c",
    "<script>alert(1)</script>": r"\<script>alert(1)\</script>",
    "[x](javascript:y)": r"[x\](javascript:y)",
    "\x1b[31mred": r"\\x1b[31mred",
    "\udcff.mp4": r"\\udcff.mp4",
    "`*a*` &lt; & \\": r"\`\*a\*\` \&lt; & \\",
    "# a": r"\# a",
    "1. a": r"1\. a",
    "- a": r"\- a",
    "> a": r"\> a",
    "---": r"\---",
    "-0.5 to 12.5": "-0.5 to 12.5",
    "a_b-c (d) #1 2 < 3": "a_b-c (d) #1 2 < 3",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_files_are_shown_and_not_interpreted(tmp_path, name):
    report, shown = Report(name), HOSTILE[name]
    report.text(name, [name])
    report.table(name, [name, "x"], [[name, 1.0]], [name])
    report.lines(name, {name: [1.0, 2.0]}, name, name)
    report.dots(name, {name: [1.0, 2.0]}, name)
    report.clips(name, {name: {name: np.zeros((2, 8, 8, 3), np.uint8)}}, 4)
    report.write(tmp_path)
    text, page = (tmp_path / "scores.md").read_text("utf-8"), (tmp_path / "index.html").read_text("utf-8")
    assert text.splitlines() == [
        *(f"# {shown}", "", f"## {shown}", "", f"- {shown}", ""),
        *(f"## {shown}", "", f"| {shown} | x |", "| --- | ---: |", f"| {shown} | 1.00 |", "", shown),
    ]
    assert page.count(html.escape(one_line(name))) >= 12
    assert "<script>alert" not in page and all(map(str.isprintable, page.splitlines()))


@pytest.mark.parametrize(
    "values",
    [
        *([1e308, -1e308], [1.7e308], [-1.7e308, 0.0], [1e308] * 40, [5e-324], [0.0, 5e-324, 1e-310], [1e-300, 2e-300]),
        *([float("inf"), float("-inf"), float("nan")], [1.0, float("inf")], [10**400, 1], ["a", None, 2.0], [], [None]),
        *([1e16, 1e16 + 2], [1e300, np.nextafter(1e300, np.inf)], [np.float32(3e38), 1.0], [1e-15, 3e-15]),
    ],
    ids=str,
)
def test_any_numbers_are_plotted(values):
    """Those that are no finite numbers are left out."""
    for plot in (line_plot("title", {"a": values, "b": []}, "x", "y"), dot_plot("title", {"a": values}, "x")):
        places = [float(x) for x in re.findall(r'(?:[xy12]="|[MLHV ])(-?[\d.e+]+|nan|inf)(?=[" LHV])', plot)]
        assert places and all(-1 <= x <= 1000 for x in places), places
        assert "nan" not in plot and "inf" not in plot
    low, high = pages._limits(values)
    assert low < high and 1 <= len(ticks(low, high)) <= 12


def test_labels_of_small_numbers():
    assert "2e-15" in line_plot("title", {"a": [1e-15, 3e-15]}, "x", "y")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e308, "1.00e+308"),
        (-1e16, "-1.00e+16"),
        (123456.7, "123457"),
        (Spread(float("nan"), 1.0), ""),
        (1e-320, "1.00e-320"),
    ],
)
def test_numbers_of_any_size_fit_a_cell(value, text):
    assert number(value) == text
