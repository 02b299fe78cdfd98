"""The paper says what data/results say: no result is typed, none is missing, and each value shows where it comes from."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

from dspark.bench.results import read_results, write_results
from dspark.bench.stats import ALL, summarise

ROOT = Path(__file__).resolve().parents[1]
PAPER, RESULTS = ROOT / "paper", ROOT / "data" / "results"
sys.path.insert(0, str(PAPER))
build, tex = __import__("build"), __import__("tex")  # paper/ is no package

MAIN = (PAPER / "main.tex").read_text(encoding="utf-8")
BODY = MAIN[MAIN.index(r"\begin{document}") :]
NAMES = re.compile(r"\\(?:label|ref|cite|input|includegraphics)(?:\[[^\]]*\])?\{[^}]*\}|(?<!\\)%.*")
MATH = re.compile(r"\$[^$]*\$|\\begin\{equation\}.*?\\end\{equation\}", re.DOTALL)
LITERAL = re.compile(r"\d+(?:[.,]|\{,\})\d+|(?<!\w)\.\d+|\d+[\s~]*(?:\\,)?\s*(?:\\%|%|percent|\$?\s*\\times|×)")
INTEGER = re.compile(r"(?<![\w-])\d+")


def literals(text: str) -> list[str]:
    """Typed decimals, percentages and factors, and whole numbers outside math; names of labels and files do not count."""
    words = NAMES.sub(" ", text)
    return LITERAL.findall(words) + INTEGER.findall(MATH.sub(" ", LITERAL.sub(" ", words)))


@pytest.fixture(scope="module")
def files():
    return build.generated()


@pytest.fixture(scope="module")
def numbers(files) -> dict[str, float]:
    """Macro → its number, for values that are one."""
    lines = re.findall(r"\\newcommand\{\\(\w+)\}\{\\\w+\{(.*)\}\\xspace\}", files["numbers.tex"].decode())
    plain = {name: re.sub(r"\{,\}|\\,|\\%|ms|\$\\times\$|\$\+\$", "", text).replace("$-$", "-") for name, text in lines}
    return {name: float(text) for name, text in plain.items() if re.fullmatch(r"-?\d+(\.\d+)?", text)}


@pytest.fixture
def results(tmp_path) -> Path:
    """A copy of the results folder that a test may change."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in build.COMMANDS:
        (folder / f"{name}.parquet").symlink_to(RESULTS / f"{name}.parquet")
    return folder


def test_committed_files_are_what_the_results_generate_byte_for_byte(files):
    committed = {path.name: path.read_bytes() for path in (PAPER / "generated").iterdir()}
    assert sorted(committed) == sorted(files)
    pinned = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    same = [name for name in files if name.endswith(".tex") or matplotlib.__version__ == pinned]  # another version draws other bytes
    assert [name for name in same if files[name] != committed[name]] == [], "run make paper and commit paper/generated"


def test_every_value_and_file_that_the_text_uses_is_made_and_the_other_way_round(files):
    tex.check_complete(MAIN, files)
    with pytest.raises(ValueError, match=r"uses what is not made: \['MeasuredMissing', 'figure-missing.pdf'\]"):
        tex.check_complete(MAIN + r"\MeasuredMissing \includegraphics{generated/figure-missing}", files)
    more = {"numbers.tex": files["numbers.tex"] + rb"\newcommand{\MeasuredSpare}{1}", "table-spare.tex": b""}
    with pytest.raises(ValueError, match=r"made but not used: \['MeasuredSpare', 'table-spare.tex'\]"):
        tex.check_complete(MAIN, files | more)


@pytest.mark.parametrize("name", build.COMMANDS)
def test_a_missing_result_stops_the_build_with_the_command_that_makes_it(results, name):
    (results / f"{name}.parquet").unlink()
    with pytest.raises(ValueError) as error:
        build.read(results)
    assert f"{name}.parquet" in str(error.value) and build.COMMANDS[name] in str(error.value)


def test_an_arm_that_was_not_measured_stops_the_build_with_the_command(results):
    name = build.RUNS["Greedy"]
    frame = read_results(RESULTS / f"{name}.parquet").query("arm != 'fixed+copy'")
    (results / f"{name}.parquet").unlink()
    write_results(frame, results / f"{name}.parquet")
    with pytest.raises(ValueError, match=rf"{name}.parquet has no rows of fixed\+copy: .*python -m dspark.bench"):
        build.totals(build.read(results), name)


def test_no_result_is_typed_in_the_text():
    assert literals(BODY) == []


@pytest.mark.parametrize(
    "typed", ["1.57", ".57", r"57\,\%", r"57\%", "57 percent", r"2$\times$", r"$2\times$", "2×", "34,085", r"34{,}085", "29 ms"]
)
def test_a_typed_result_is_found(typed):
    assert literals(f"text of {typed} of text")


@pytest.mark.parametrize(
    "innocent", [r"\SettingLevel of $x_0$, $\ell=0$", r"\ref{sec:1.5} \cite{a2.1}", "% 57 % in a comment", "MTP-1", "float32"]
)
def test_notation_and_names_are_no_results(innocent):
    assert literals(innocent) == []


def test_the_text_has_no_conditionals_and_all_references_resolve(files):
    assert not re.search(r"\\if|\\else\b|\\fi\b", MAIN)
    whole = MAIN + "".join(content.decode() for name, content in files.items() if name.endswith(".tex"))
    assert set(re.findall(r"\\ref\{([^}]*)\}", whole)) <= set(re.findall(r"\\label\{([^}]*)\}", whole))
    cited = {key for keys in re.findall(r"\\cite\{([^}]*)\}", MAIN) for key in keys.split(",")}
    assert cited == set(re.findall(r"\\bibitem\{(\w+)\}", (PAPER / "references.tex").read_text(encoding="utf-8")))
    begun, ended = (sorted(re.findall(rf"\\{what}\{{(\w+)\}}", whole)) for what in ("begin", "end"))
    assert begun == ended and whole.replace(r"\{", "").replace(r"\}", "").count("{") == whole.replace(r"\}", "").replace(r"\{", "").count(
        "}"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="LaTeX is not installed")
def test_the_paper_is_typeset_without_warnings():
    pdf = build.typeset()
    assert pdf.read_bytes().startswith(b"%PDF")
    assert not re.findall(r"undefined|multiply defined|Missing character", pdf.with_suffix(".log").read_text(errors="replace"))


def test_what_is_gone_is_in_no_table_and_not_in_the_text(files):
    whole = MAIN + "".join(content.decode() for name, content in files.items() if name.endswith(".tex"))
    assert not re.search(r"phrase|sibling|\bvotes?\b", whole, re.IGNORECASE)


def test_the_text_draws_the_conclusions_that_the_numbers_allow(numbers):
    assert numbers["MeasuredSampledBlockSpeedupLow"] > 1  # a gain when sampling too, to which copying adds nothing
    assert numbers["MeasuredSampledCopySpeedupLow"] < numbers["MeasuredSampledBlockSpeedup"] < numbers["MeasuredSampledCopySpeedupHigh"]
    low = numbers["QuotedRangeLow"] / 100 + 1
    assert 1 < numbers["MeasuredGreedyBlockOverMtpLow"] and numbers["MeasuredGreedyBlockOverMtpHigh"] < 1.2  # a little faster,
    assert numbers["MeasuredGreedyBlockOverMtp"] < numbers["MeasuredGreedyCopyOverMtpLow"]  # and clearly if it may copy
    assert numbers["MeasuredGreedyCopyOverMtpHigh"] < low
    for arm in ("Block", "Copy"):  # hardly when sampling
        assert numbers[f"MeasuredSampled{arm}OverMtpLow"] <= 1 < numbers[f"MeasuredSampled{arm}OverMtpHigh"] < low
    assert numbers["MeasuredBlockEqual"] == 100 and numbers["MeasuredStepsBlock"] < 2 * numbers["MeasuredStepsPlain"]
    assert numbers["MeasuredTimedPrefixLow"] < 1 < numbers["MeasuredTimedPrefixHigh"] and numbers["SimulatedPolicyPrefixLow"] > 97
    assert numbers["MeasuredConfidenceSampledAfter"] < numbers["MeasuredConfidenceSampledBefore"]
    assert numbers["MeasuredOverDflashLow"] > 0 > numbers["MeasuredOverEagleLow"] and numbers["MeasuredOverEagleHigh"] > 0


def test_greedy_copying_gains_prompt_by_prompt_and_most_where_the_text_says():
    gains = summarise(build.read(build.DATA / "results")[build.RUNS["Greedy"]], build.BLOCK).set_index(["arm", "domain"]).loc[build.COPY]
    assert gains.loc[ALL, "low"] > 1
    assert gains.loc[["structured", "math"], "speedup"].min() > gains.loc[["code", "chat"], "speedup"].max()


def test_each_kind_of_value_has_a_look_of_its_own_that_survives_grey_print():
    looks = dict(re.findall(r"\\newcommand\{\\(measured|simulated|quoted|setting)\}\[1\]\{(.*)\}", MAIN))
    assert set(looks) == {kind.lower() for kind in tex.KINDS} and len(set(looks.values())) == 4
    assert r"\textit" in looks["simulated"] and r"\textsf" in looks["quoted"] and "text" not in looks["setting"]


def test_tables_show_measured_values_as_measured_and_replayed_ones_as_computed(files):
    measured, simulated = (
        {name for name, content in files.items() if look in content and "table" in name} for look in (rb"\measured{", rb"\simulated{")
    )
    assert measured == {"table-speed.tex", "table-drafters.tex"} and simulated == {"table-policies.tex", "table-drafters.tex"}


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [("QuotedRange", "", "source"), ("MeasuredRange", "a newspaper", "source"), ("Range", "", "kind"), ("SettingOnce", "", "named once")],
)
def test_a_value_has_a_kind_one_definition_and_a_source_if_it_is_quoted(name, source, message):
    values = tex.Values()
    values.set("SettingOnce", "1")
    with pytest.raises(ValueError, match=message):
        values.set(name, "57", source)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (tex.integer(34085), "34{,}085"),
        (tex.times(1.405), r"1.41$\times$"),
        (tex.percent(-0.31), r"$-$31\,\%"),
        (tex.signed(0.041), r"$+$4.1\,\%"),
        (tex.number(float("nan")), "--"),
        (tex.listed(["a"]), "a"),
        (tex.listed(["a", "b", "c"]), "a, b and c"),
        (tex.escaped("50 % of {a_b} & τ"), r"50 \% of \{a\_b\} \& $\tau$"),
        (tex.code("tests/a_b.py"), r"\texttt{tests/\allowbreak{}a\_\allowbreak{}b.py}"),
    ],
)
def test_values_are_written_as_tex_reads_them(value, written):
    assert value == written


def test_a_character_that_the_fonts_lack_is_refused():
    with pytest.raises(ValueError, match="no TeX is known for '猫'"):
        tex.escaped("猫")


def test_shares_have_wilsons_interval():
    down, up = build.figures.spread(pd.Series([0.0, 0.5, 1.0]), pd.Series([10.0, 10.0, 10.0]))  # Newcombe, 1998
    assert list(down) == pytest.approx([0, 0.2634, 0.2775], abs=1e-4) and list(up) == pytest.approx([0.2775, 0.2634, 0], abs=1e-4)


def test_a_published_number_is_in_one_file_only():
    files = [*(ROOT / "dspark").rglob("*.py"), *PAPER.glob("*.py")]
    assert [path.name for path in files if re.search(r"\b(6\.11|0\.769|1\.57|0\.013)\b", path.read_text("utf-8"))] == ["published.py"]
