"""The pictures in data/figures are those of the committed results, and ``data/figures/build.py`` draws them again."""

from __future__ import annotations

import base64
import importlib.util
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from test_lab import results
from tiny import tiny_drafter, tiny_target

from dspark.bench.arms import arm_label
from dspark.bench.results import write_results
from dspark.bench.trace import StepTimes, record
from dspark.bench.traces import load_traces
from dspark.lab.demo import NOTEBOOK
from dspark.lab.replaying import SAMPLE

FIGURES = Path(__file__).resolve().parents[1] / "data" / "figures"
spec = importlib.util.spec_from_file_location("pictures", FIGURES / "build.py")  # data/ is no package
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)


def test_the_live_picture_is_drawn_from_the_shipped_trace(tmp_path):
    assert pictures.main(["--out", str(tmp_path)]) == 0
    drawn = (tmp_path / "live.svg").read_text(encoding="utf-8")
    ET.fromstring(drawn)
    assert drawn == (FIGURES / "live.svg").read_text(encoding="utf-8"), "run python data/figures/build.py"
    assert pictures.main(["--out", str(tmp_path / "again")]) == 0
    for name in ("live.svg", "headline.svg", pictures.CARTOON):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_first_notebook_opens_with_the_cartoon():
    title = nbformat.read(NOTEBOOK, as_version=4).cells[0]
    assert f"](attachment:{pictures.CARTOON})" in title.source
    assert base64.b64decode(title.attachments[pictures.CARTOON]["image/png"]) == (FIGURES / pictures.CARTOON).read_bytes()


def test_the_cartoon_drafts_five_keeps_two_and_corrects_the_third():
    frames = [[text.get_text() for text in panel.texts if text.get_text()] for panel in pictures.cartoon(load_traces(SAMPLE)[0][1]).axes]
    draft, check, keep = frames
    assert [mark for mark in check if mark in "✓✗"] == ["✓", "✓", "✗"] and [word for word in check if word not in "✓✗"] == draft
    assert len(draft) == 6 and len(keep) == 4 and keep[:3] == draft[:3] and keep[3] != draft[3]


def test_the_live_picture_is_well_formed_and_limited_in_lines_for_any_tokens():
    target, times = tiny_target(vocab_size=300), StepTimes({1: 1e-3, 8: 2e-3}, {1: 1e-2, 9: 2e-2}, 1e-5, 1e-4)
    trace = record(target, tiny_drafter(target), [5, 6, 7], max_new_tokens=30, times=times, pieces=False)
    pieces = {token: ("\x00\x1b<&\t", "世界", "\n", "words")[token % 4] for token in range(300)}
    trace = replace(trace, about=trace.about | {"pieces": pieces})
    heights = [float(ET.fromstring(pictures.still(trace, lines=n)).get("viewBox").split()[3]) for n in (1, 3)]
    assert heights[0] < heights[1]
    assert "世界" in pictures.still(trace) and "\x00" not in pictures.still(trace)


def test_the_headline_shows_every_arm_with_units_and_n():
    figure = pictures.headline(results())
    speed, tau = figure.axes
    assert "(×)" in speed.get_ylabel() and "tokens per round" in tau.get_ylabel()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [arm_label("generate"), arm_label("fixed:5")]
    assert "n = 8 test prompts per domain" in figure.get_supxlabel()


@pytest.mark.parametrize(("name", "wrong"), [("SAMPLE", SAMPLE.with_name("none.parquet")), ("HEADLINE", None)])
def test_results_that_are_missing_or_of_another_version_stop_it_in_one_line(tmp_path, capsys, monkeypatch, name, wrong):
    write_results(results().assign(schema_version=99), tmp_path / "speed.parquet")
    monkeypatch.setattr(pictures, name, wrong or tmp_path / "speed.parquet")
    assert pictures.main(["--out", str(tmp_path / "figures")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "figures").exists()
