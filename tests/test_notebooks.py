"""Every notebook has the form that papermill, nbval and a reader need, and runs on another model at other parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from tiny import tiny_drafter, tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dspark
from dspark.draft.lookup import ContextLookup
from dspark.lab import demo
from dspark.lab.text import tally

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def parameter_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]


def test_there_are_notebooks():
    assert demo.NOTEBOOK in NOTEBOOKS


@each_notebook
def test_notebook_is_valid_and_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in cells(path):
        assert cell.outputs == [] and cell.execution_count is None


@each_notebook
def test_notebook_has_one_parameters_cell_and_nothing_before_it_runs(path):
    assert len(parameter_cells(path)) == 1
    assert "parameters" in cells(path)[0].metadata.get("tags", [])


@each_notebook
def test_every_parameter_has_a_type_a_default_and_a_comment(path):
    parameters = papermill.inspect_notebook(str(path))
    assigned = re.findall(r"^(\w+)", parameter_cells(path)[0].source, flags=re.MULTILINE)
    assert list(parameters) == assigned, "papermill cannot read them all: no '=' but the assignment's in a line, and none in comments"
    for name, about in parameters.items():
        assert about["inferred_type_name"] != "None", name
        assert about["default"] and about["help"], name


@each_notebook
def test_code_cells_are_short_and_prose_comes_first(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].cell_type == "markdown"
    for cell in cells(path):
        assert len(cell.source.splitlines()) <= 20, cell.source


@each_notebook
def test_notebook_names_no_relative_path_and_no_path_of_one_machine(path):
    """papermill runs in the caller's folder, nbval in the notebook's."""
    for cell in cells(path):
        assert not re.search(r"""["'](\.{1,2}/|data/|runs/|notebooks/|/\w|~)""", cell.source), cell.source


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random chat model of 300 byte-level tokens in a folder, and a random drafter for it in another."""
    model, drafter = (tmp_path_factory.mktemp(name) for name in ("tiny-chat-model", "tiny-drafter"))
    letters = ["<pad>", "<start>", "<end>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("a", "n"), ("Ġ", "t"), ("e", "r"), ("o", "n"), ("Ġt", "h"), ("Ġth", "e")]
    vocab = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<start>", pad_token="<pad>")
    chat.chat_template = TEMPLATE
    chat.save_pretrained(model)
    tiny_target(vocab_size=300).model.save_pretrained(model)
    target = dspark.load_target(model, dtype="float32")
    dspark.save_drafter(tiny_drafter(target), target, drafter)
    return {"target": str(model), "drafter": str(drafter)}


def test_the_python_in_the_readme_runs(tiny_folders, monkeypatch, capsys):
    parts = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    load_target, load_drafter = dspark.load_target, dspark.load_drafter
    monkeypatch.setattr(dspark, "load_target", lambda name: load_target({"default": tiny_folders["target"]}[name], dtype="float32"))
    monkeypatch.setattr(dspark, "load_drafter", lambda name, target: load_drafter({"default": tiny_folders["drafter"]}[name], target))
    names = {}
    exec(compile("\n".join(parts), "README.md", "exec"), names)
    assert names["out"].token_ids
    assert re.search(r"^\d+ \d+ of \d+ drafts: ", capsys.readouterr().out, flags=re.MULTILINE)


SMALL = {
    "prompts": ["An apple", "他说 <b>&</b> 🙂", "On the one hand"],
    "max_new_tokens": 12,
    "repeats": 3,
    "threads": 1,
    "dtype": "float32",
}


def test_losslessness_runs_at_other_parameters(tmp_path):
    executed = tmp_path / "executed.ipynb"
    other = {"target_probs": [0.1, 0.1, 0.8], "draft_probs": [0.5, 0.4, 0.1], "draws": 300, "seed": 3}
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "07_losslessness.ipynb"), str(executed), other, kernel_name="python3", cwd=str(tmp_path)
    )
    printed = [out.text for cell in cells(executed) for out in cell.outputs if out.output_type == "stream" and out.name == "stdout"]
    assert any("'C': '4/5'" in text for text in printed)


def test_losslessness_without_results_names_the_command_that_makes_them(tmp_path):
    notebook, executed = ROOT / "notebooks" / "07_losslessness.ipynb", tmp_path / "executed.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="make proof writes it"):
        papermill.execute_notebook(str(notebook), str(executed), {"results": str(tmp_path)}, kernel_name="python3", cwd=str(tmp_path))


def test_semi_autoregressive_runs_at_other_parameters_on_another_model(tmp_path, tiny_folders):
    executed = tmp_path / "executed.ipynb"
    other = {"prompt": "An apple", "slot": 3, "bias": 0.5, "max_new_tokens": 16, "threads": 1, "dtype": "float32"}
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "03_semi_autoregressive.ipynb"),
        str(executed),
        other | tiny_folders | {"position": 2, "results": str(tmp_path)},
        kernel_name="python3",
        cwd=str(tmp_path),
    )
    titles = [
        output.data["application/vnd.plotly.v1+json"]["layout"]["title"]["text"]
        for cell in cells(executed)
        for output in cell.outputs
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert len(titles) == 2 and titles[1].startswith("Slot 3, after"), "no comparison is in that folder, so its figures are left out"


def test_a_drafter_is_trained_for_another_model_at_other_parameters(tmp_path, tiny_folders):
    executed, out, folder = tmp_path / "executed.ipynb", tmp_path / "out.json", tmp_path / "run"
    other = {"rows": 6, "tokens": 400, "steps": 5, "anchors": 4, "block_size": 3, "draft_vocab": 100, "max_new_tokens": 8, "threads": 1}
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "08_train_a_drafter.ipynb"),
        str(executed),
        other | {"target": tiny_folders["target"], "dtype": "float32", "folder": str(folder), "out": str(out)},
        kernel_name="python3",
        cwd=str(tmp_path),
    )
    summary = json.loads(out.read_text())
    assert summary["steps"] == len(summary["losses"]) == 5 and len(summary["acceptance"]) == 3 and summary["resumed_at"] == 2
    target = dspark.load_target(tiny_folders["target"], dtype="float32")
    assert dspark.load_drafter(folder / "drafter", target).block_size == 3


@pytest.mark.parametrize(
    "changed",
    [{"policy": "fixed:2"}, {"policy": "confidence:0.2+copy:2", "temperature": 0.9, "seed": 5, "repeats": 1}],
    ids=lambda changed: changed["policy"],
)
def test_start_runs_at_other_parameters_on_another_model(tmp_path, tiny_folders, changed):
    executed = tmp_path / "folder" / "start.ipynb"
    summary = demo.run(demo.NOTEBOOK, executed, SMALL | tiny_folders | changed)

    assert summary["policy"] == changed["policy"] and summary["temperature"] == changed.get("temperature", 0.0)
    assert summary["prompt"] == SMALL["prompts"][0] and summary["n"] <= len(SMALL["prompts"])
    assert summary["low"] <= summary["speedup"] <= summary["high"]
    assert 1 <= summary["tokens_per_round"] <= 5
    if "temperature" not in changed:
        assert summary["text"] == summary["plain_text"] and summary["comparison"].startswith("identical")

    shown = "".join(output["data"].get("text/html", "") for cell in cells(executed) for output in cell.outputs if "data" in output)
    assert shown.count("<svg") == 2 and "pre-wrap" in shown, "the text, the race and the drafts"
    printed = demo.report(summary, executed)
    for part in (summary["text"], "plain decoding", "tokens/s", "95 % interval", "τ", str(executed)):
        assert part in printed


SPEED = {
    "policy": "confidence,adaptive+copy,lookup",
    "domains": "math,structured",
    "max_new_tokens": 10,
    "block_size": 3,
    "threads": 1,
    "dtype": "float32",
    "price": 0.5,
}


def test_speedup_runs_at_other_parameters_on_another_model(tmp_path, tiny_folders):
    executed = tmp_path / "folder" / "speedup.ipynb"
    summary = demo.run(ROOT / "notebooks" / "02_speedup.ipynb", executed, SPEED | tiny_folders)
    assert summary["policy"] == SPEED["policy"] and summary["arm"] == "confidence:0.4+block:3"
    assert summary["n"] == 2 and summary["low"] == pytest.approx(summary["speedup"]) == summary["high"], "one prompt a domain has no spread"
    assert {"speedup_over_mtp1", "speedup_math", "speedup_over_mtp1_structured"} <= set(summary)
    assert not any(isinstance(value, dict | list) for value in summary.values()), "a row of a table is flat"
    assert summary["saved_per_million"] == pytest.approx(0.5 * (1 - 1 / summary["speedup"]))


def test_your_model_runs_on_another_model_without_a_drafter(tmp_path, tiny_folders):
    changed = {"drafter": "", "prompt": "an apple, an apple, an", "max_new_tokens": 12, "threads": 1, "dtype": "float32", "block_size": 4}
    notebook, executed = ROOT / "notebooks" / "09_your_model.ipynb", tmp_path / "folder" / "yours.ipynb"
    summary = demo.run(notebook, executed, changed | {"target": tiny_folders["target"], "profile_repeats": 1, "speedups": [1.2]})
    assert summary["target"] == Path(tiny_folders["target"]).name and summary["fastest"] in ("plain", "copy")
    assert summary["tau_for_1.2"] > 0 and summary["limit"] > 0 and summary["tau_copy"] >= 1
    printed = "".join(out.text for cell in cells(executed) for out in cell.outputs if out.output_type == "stream")
    assert "identical" in printed and "refused: generate was asked for beam_search" in printed


def test_under_load_runs_on_another_model_without_recorded_loads(tmp_path, tiny_folders):
    executed = tmp_path / "load.ipynb"
    small = {"live_arms": "plain,fixed:2,async", "live_users": "1,3", "live_tokens": 6, "threads": 1, "dtype": "float32", "arm": "async"}
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "06_under_load.ipynb"),
        str(executed),
        small | tiny_folders | {"baseline": "fixed:2", "results": str(tmp_path)},
        kernel_name="python3",
        cwd=str(tmp_path),
    )
    printed = "".join(out.text for cell in cells(executed) for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")
    for words in ("no recorded loads", "async over the best window", "fixed:2 with 3 users", "request 0 is active, request 1 is waiting"):
        assert words in printed


@pytest.mark.parametrize(
    "changed",
    [
        {"policy": "adaptive:0.02,0.005,0.002,3"},
        {"policy": "confidence:0.2", "threshold": 0.2, "copy": False, "temperature": 0.8, "top_p": 0.9, "seed": 4},
    ],
    ids=lambda changed: changed["policy"],
)
def test_live_decoding_runs_at_other_parameters_on_another_model(tmp_path, tiny_folders, changed):
    executed = tmp_path / "folder" / "live.ipynb"
    small = {"prompt": "他说 <b>&</b> 🙂", "max_new_tokens": 14, "threads": 1, "dtype": "float32"}
    summary = demo.run(ROOT / "notebooks" / "01_live_decoding.ipynb", executed, small | tiny_folders | changed)

    assert summary["prompt"] == small["prompt"] and summary["policy"] == changed["policy"]
    if "temperature" not in changed:  # the panel and the replay make exactly the rounds of decode
        target = dspark.load_target(tiny_folders["target"], dtype="float32")
        source = ContextLookup(dspark.load_drafter(tiny_folders["drafter"], target))
        adaptive = dspark.AdaptiveWindow(0.02, 0.005, 0.002, max_window=3)
        made, full = (
            tally(list(dspark.decode(target, source, small["prompt"], policy=policy, max_new_tokens=14)))
            for policy in (adaptive, dspark.FixedWindow(3))
        )
        assert summary["tokens_per_round"] == summary["replayed_tokens_per_round"] == pytest.approx(made.tokens_per_round)
        assert summary["replayed_rejected"] == made.rejected < full.rejected, "the window never moved"
    shown = [output.data for cell in cells(executed) for output in cell.outputs if "data" in output]
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in shown) == 3
    (picture,) = [data["text/html"] for data in shown if "<svg" in data.get("text/html", "")]
    assert picture.count("<svg") == 3 and "drafted tokens accepted" in picture


def test_a_failing_cell_is_one_line_with_its_own_message(tmp_path):
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    notebook.cells = [
        nbformat.v4.new_code_cell('out: str = ""  # unused', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell('raise ValueError("a window of 9 is too wide\\nand more")'),
    ]
    nbformat.write(notebook, tmp_path / "failing.ipynb")
    (tmp_path / "done.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^ValueError: a window of 9 is too wide \(.*done\.ipynb\)$"):
        demo.run(tmp_path / "failing.ipynb", tmp_path / "done.ipynb", {})
    assert not (tmp_path / "done.json").exists(), "the summary of an earlier run"


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([("polcy", "fixed")], "no parameter 'polcy': did you mean 'policy'?"),
        ([("xyz", "1")], "no parameter 'xyz': choose from prompts, max_new_tokens"),
        ([("max_new_tokens", "many")], "max_new_tokens needs int, got 'many'"),
        ([("temperature", "warm")], "temperature needs float, got 'warm'"),
        ([("prompts", "Hello")], "prompts needs list\\[str\\], got 'Hello'"),
        ([("prompts", "[]")], "prompts needs list"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(pairs, said, monkeypatch, capsys):
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("it ran"))
    assert demo.main([word for name, value in pairs for word in ("-p", name, value)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert re.search(said, printed.err)


def test_parameters_have_the_type_that_the_notebook_declares():
    pairs = [("prompts", '["a", "b"]'), ("max_new_tokens", "8"), ("temperature", "1"), ("policy", "7")]
    assert demo.checked_parameters(pairs, demo.NOTEBOOK) == {"prompts": ["a", "b"], "max_new_tokens": 8, "temperature": 1.0, "policy": "7"}


def test_start_defaults_are_smoke_sized():
    defaults = {name: about["default"] for name, about in papermill.inspect_notebook(str(demo.NOTEBOOK)).items()}
    tokens = len(json.loads(re.sub(r",\s*\]", "]", defaults["prompts"]))) * int(defaults["max_new_tokens"]) * int(defaults["repeats"])
    assert tokens <= 600, "both ways decode them, at some 35 ms a token on two cores"


def test_an_interrupted_demo_says_so_in_one_line(monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", interrupt)
    monkeypatch.setattr(demo, "default_folder", lambda: None)
    assert demo.main([]) == 130
    assert capsys.readouterr().err == "dspark.lab.demo: interrupted\n"
