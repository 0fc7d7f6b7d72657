"""Pages and their pictures."""

import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from fusion_plugins.page import new_figure, plot_name, render_page, svg


def _picture(label='bars <of> "two"'):
    figure = new_figure(4, 2)
    figure.subplots().bar(["中文", "<script>"], [1, 2])
    return svg(figure, label)


def test_a_picture_is_well_formed_has_a_label_and_keeps_its_letters():
    # A page needs no namespace for its pictures, XML does.
    root = ElementTree.fromstring(str(_picture()).replace("<svg ", '<svg xmlns:xlink="x" ', 1))
    assert root.attrib["aria-label"] == 'bars <of> "two"'
    texts = {"".join(node.itertext()) for node in root.iter() if node.tag == "text"}
    assert {"中文", "<script>"} <= texts


def test_a_picture_is_the_same_every_time_and_takes_the_colour_of_the_page():
    assert _picture() == _picture()
    assert "#000000" not in _picture()


def test_a_page_fits_a_phone_and_the_dark_and_takes_every_value_for_text():
    page = render_page("page.html", {})
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_long_names_keep_their_end():
    assert plot_name("a" * 50 + "$end") == "…" + "a" * 35 + r"\$end"
