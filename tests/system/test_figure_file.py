"""Figures: characters that matplotlib's own font lacks are drawn by one that has them."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from deitkit.system import figure_file


def test_a_text_that_matplotlibs_font_lacks_uses_the_fonts_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fonts = ["DejaVu Sans", "DejaVu Serif"]  # both come with matplotlib
    monkeypatch.setattr(figure_file, "_fonts", lambda: fonts)
    figure = Figure()
    axes = figure.add_subplot()
    axes.set_title("花")
    axes.set_yticks([0, 1], ["雪", "snow"])
    figure_file.save_figure(tmp_path / "figure.png", figure)
    families = {text.get_text(): text.get_fontfamily() for text in figure.findobj(Text) if text.get_text()}
    assert families["花"] == families["雪"] == fonts
    assert families["snow"] == ["sans-serif"]
