"""Every notebook has the form that papermill, nbval and a reader need, and runs on another model at other parameters."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import inline
import nbformat
import papermill
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread
from tiny import tiny_drafter, tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import dspark
from dspark.bench import published
from dspark.draft.lookup import ContextLookup
from dspark.formats.deepspec import export_deepspec
from dspark.lab import batch, demo
from dspark.lab.figures import FATES
from dspark.lab.text import tally

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"

SHORT = {"max_new_tokens": 12, "threads": 1, "dtype": "float32"}
RUNS = {  # other parameters than the notebook's own, on a tiny model
    "00_start": SHORT | {"prompts": ["An apple", "他说 <b>&</b> 🙂", "On the one hand"], "repeats": 2, "policy": "fixed:2"},
    "02_speedup": SHORT
    | {"policy": "confidence:0.4,adaptive:0.6,0.3,0.05+copy,lookup", "domains": "math,structured", "block_size": 3, "price": 0.5},
    "03_semi_autoregressive": SHORT | {"prompt": "An apple", "slot": 3, "bias": 0.5, "position": 2, "results": "empty"},
    "04_confidence": {"thresholds": [0.0, 0.2, 0.6], "temperature": 0.0, "policy": "confidence:0.2"},
    "05_scheduler": SHORT | {"policies": ["mtp1", "confidence:0.2", "prefix"], "repeats": 1, "chosen_round": 1, "context": 32},
    "06_under_load": {"live_arms": "plain,fixed:2,async", "live_users": "1,3", "live_tokens": 6, "threads": 1, "dtype": "float32"}
    | {"arm": "async", "baseline": "fixed:2", "results": "empty"},
    "07_losslessness": {"target_probs": [0.1, 0.1, 0.8], "draft_probs": [0.5, 0.4, 0.1], "draws": 300, "seed": 3},
    "08_train_a_drafter": {"rows": 6, "tokens": 200, "steps": 5, "anchors": 4, "block_size": 3, "draft_vocab": 100, "folder": "run"}
    | SHORT
    | {"max_new_tokens": 8},
    "09_your_model": SHORT | {"drafter": "", "prompt": "an apple, an apple, an", "block_size": 4, "profile_repeats": 1, "speedups": [1.2]},
    "10_published_drafters": SHORT | {"prompt_sets": "math,structured", "prompt": "An apple", "policy": "fixed:2"},
}
FIGURES = {"00": 2, "02": 5, "03": 2, "04": 2, "05": 3, "06": 2, "07": 4, "08": 3, "09": 1, "10": 1}  # charts and strips of these runs
FOLDERS = {"results", "folder"}  # parameters that name a folder, here one in the test's own

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
        is_table = "parameters" in cell.metadata.get("tags", [])  # one parameter a line
        assert len(cell.source.splitlines()) <= (18 if is_table else 15), cell.source


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[:2] in FIGURES], ids=lambda path: path.stem)
def test_every_notebook_checks_its_parameters_in_the_same_next_cell_and_ends_with_the_same_call(path):
    _, check, *_, last = cells(path)
    assert check.source == "from dspark.lab import batch\n\nbatch.begin()" and check.metadata["jupyter"]["source_hidden"]
    assert "batch.finish(" in last.source and "out" in papermill.inspect_notebook(str(path))


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


@dataclass(frozen=True)
class Executed:
    """One run. path: of the notebook with its outputs. folder: of the run's own files."""

    notebook: nbformat.NotebookNode
    summary: dict[str, object]
    path: Path
    folder: Path

    @property
    def printed(self) -> str:
        return inline.printed(self.notebook)


@pytest.fixture(scope="session")
def executed(tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, str]) -> Callable[[str], Executed]:
    """Runs a notebook of RUNS, once for all tests."""

    @cache
    def run(name: str) -> Executed:
        folder = tmp_path_factory.mktemp(name)
        (folder / "empty").mkdir()
        has = papermill.inspect_notebook(str(ROOT / "notebooks" / f"{name}.ipynb"))
        given = {key: str(folder / value) if key in FOLDERS else value for key, value in RUNS[name].items()}
        parameters = {key: value for key, value in (tiny_folders | given).items() if key in has} | {"out": str(folder / "out.json")}
        path = folder / f"{name}.ipynb"
        notebook = inline.execute(ROOT / "notebooks" / f"{name}.ipynb", parameters, path)
        return Executed(notebook, json.loads((folder / "out.json").read_text()), path, folder)

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_notebook_runs_at_other_parameters_on_another_model_and_all_its_figures_survive_an_export(executed, name):
    run = executed(name)
    assert len(inline.figures(run.notebook)) == FIGURES[name[:2]]
    first = list(run.summary.values())[:3]
    assert all(isinstance(value, int | float | str) for value in first), "a sweep shows these three"
    table = run.notebook.cells[-1].outputs[-1]
    assert next(iter(run.summary)) in table.data["text/html"], "the last cell is a table"


@pytest.mark.parametrize("name", ["00_start", "04_confidence"])
def test_an_exported_page_shows_every_figure_with_ink_in_a_browser_without_a_network(executed, tmp_path, name):
    """00 has text and strips, 04 has charts."""
    exporter = pytest.importorskip("nbconvert").HTMLExporter()
    html = exporter.from_filename(str(executed(name).path))[0].replace("</body>", INK + "</body>")
    dom = in_chromium(html, tmp_path, "--virtual-time-budget=20000", "--dump-dom")
    inks = [float(ink) for ink in re.search(r'id="ink">([^<]*)<', dom)[1].split()]
    pictures = FIGURES[name[:2]] + (name == "00_start")  # and the cartoon in its first cell
    assert len(inks) == pictures and min(inks) > 0.002, "the share of each picture that is not blank"


def in_chromium(html: str, folder: Path, *options: str) -> str:
    """What Chromium prints about a page, without a network."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    alone = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'chromium'}"]
    command = [chromium, "--headless", *alone, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def test_without_javascript_an_exported_page_shows_the_panels_text_and_pictures(tmp_path):
    """The notebook up to the panel, which opens with the recorded text; a script that empties the page shows that none ran."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_live_decoding.ipynb", as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if cell.source.endswith("\npanel"))
    notebook.cells = notebook.cells[: last + 1]
    nbformat.write(notebook, tmp_path / "opening.ipynb")
    inline.execute(tmp_path / "opening.ipynb", {}, tmp_path / "live.ipynb")
    html = pytest.importorskip("nbconvert").HTMLExporter().from_filename(str(tmp_path / "live.ipynb"))[0]
    words = re.sub(r"<[^>]*>", "", re.search(r'<pre class="text".*?</pre>', html, re.DOTALL)[0])
    assert "\n    def __init__(" in words, "the text keeps its indentation"
    picture = tmp_path / "page.png"
    html = html.replace("<head>", """<head><meta http-equiv="Content-Security-Policy" content="script-src 'none'">""", 1)
    html = html.replace("</body>", "<script>document.body.innerHTML = ''</script></body>")
    in_chromium(html, tmp_path, "--hide-scrollbars", "--window-size=1100,1500", f"--screenshot={picture}")
    pixels = (255 * imread(picture)[..., :3]).round().astype(int).reshape(-1, 3)
    for fate in ("draft", "copy", "correction"):
        for alpha in (0.33, 0.9):  # the ground of its tokens in the text, and its cells in the pictures
            blended = [round(255 + alpha * (part - 255)) for part in FATES[fate].rgb]
            assert (abs(pixels - blended).max(axis=1) <= 2).sum() > 200, (fate, alpha)


INK = """<pre id="ink"></pre><script>
addEventListener("load", async () => {
  const shares = [];
  for (const one of document.querySelectorAll(".jp-OutputArea img, .jp-OutputArea svg, .jp-MarkdownOutput img")) {
    const picture = new Image(), canvas = document.createElement("canvas");
    await new Promise((done) => {
      picture.onload = picture.onerror = done;
      picture.src = one.src || "data:image/svg+xml;utf8," + encodeURIComponent(new XMLSerializer().serializeToString(one));
    });
    [canvas.width, canvas.height] = [600, 300];
    const ground = canvas.getContext("2d");
    ground.drawImage(picture, 0, 0, 600, 300);
    const pixels = ground.getImageData(0, 0, 600, 300).data;
    let ink = 0;  // pixels unlike the corner's: a blank figure has none, whatever its ground
    for (let i = 0; i < pixels.length; i += 4) ink += [0, 1, 2, 3].some((k) => Math.abs(pixels[i + k] - pixels[k]) > 40);
    shares.push(ink / (600 * 300));
  }
  document.getElementById("ink").textContent = shares.join(" ");
});
</script>"""


def test_start_reports_texts_speeds_and_their_spread(executed):
    run = executed("00_start")
    summary = run.summary
    assert summary["policy"] == "fixed:2" and summary["prompt"] == "An apple" and summary["n"] <= 3
    assert summary["low"] is None or summary["low"] <= summary["speedup"] <= summary["high"]
    assert 1 <= summary["tokens_per_round"] <= 3 and summary["spread"] >= 1
    assert summary["text"] == summary["plain_text"] and summary["comparison"].startswith("identical")
    shown = "".join(out.data.get("text/html", "") for cell in run.notebook.cells for out in cell.get("outputs", []) if "data" in out)
    assert "pre-wrap" in shown, "the coloured text"
    for part in (f"DSpark:\n{summary['text']}", "plain decoding:", "tokens/s", "95 % interval", "τ = ", "(n = "):
        assert part in run.printed


def test_start_runs_with_sampling_in_a_kernel_of_its_own(tmp_path, tiny_folders):
    """The one run with a kernel; nbval runs all notebooks so, at their defaults (make test-notebooks)."""
    changed = {"policy": "confidence:0.2+copy:2", "temperature": 0.9, "seed": 5, "repeats": 1}
    summary = demo.run(demo.NOTEBOOK, tmp_path / "folder" / "start.ipynb", RUNS["00_start"] | tiny_folders | changed)
    assert summary["policy"] == changed["policy"] and summary["temperature"] == 0.9
    assert len(inline.figures(nbformat.read(tmp_path / "folder" / "start.ipynb", as_version=4))) == 2


def test_the_demo_prints_what_the_cells_print(executed, tmp_path, monkeypatch, capsys):
    run = executed("00_start")
    monkeypatch.setattr(demo, "run", lambda notebook, path, parameters: shutil.copy(run.path, path))
    assert demo.main(["--out", str(tmp_path / "demo.ipynb"), "-p", "target", "another"]) == 0
    printed = capsys.readouterr().out
    assert "speed-up" in printed and "plain decoding:" in printed and str(tmp_path / "demo.ipynb") in printed


def test_losslessness_counts_every_branch_at_other_probabilities(executed):
    assert "'C': '4/5'" in executed("07_losslessness").printed


def test_losslessness_without_results_names_the_command_that_makes_them(tmp_path):
    with pytest.raises(ValueError, match="make proof writes it"):
        inline.execute(ROOT / "notebooks" / "07_losslessness.ipynb", {"results": str(tmp_path)})


def test_semi_autoregressive_leaves_out_figures_of_comparisons_that_were_not_made(executed):
    shown = [
        out.metadata["image/png"]["alt"]
        for cell in executed("03_semi_autoregressive").notebook.cells
        for out in cell.get("outputs", [])
        if "image/png" in out.get("metadata", {})
    ]
    assert len(shown) == 2 and shown[1].startswith("Slot 3, after")


def test_a_drafter_trained_in_the_notebook_loads_and_drafts_blocks_of_the_asked_size(executed, tiny_folders):
    run = executed("08_train_a_drafter")
    assert (
        run.summary["steps"] == len(run.summary["losses"]) == 5 and len(run.summary["acceptance"]) == 3 and run.summary["resumed_at"] == 2
    )
    target = dspark.load_target(tiny_folders["target"], dtype="float32")
    assert dspark.load_drafter(run.folder / "run" / "drafter", target).block_size == 3


def test_speedup_saves_a_flat_row_of_the_first_policy(executed):
    summary = executed("02_speedup").summary
    assert summary["policy"] == RUNS["02_speedup"]["policy"] and summary["arm"] == "confidence:0.4+block:3"
    assert summary["n"] == 2 and summary["low"] is None and summary["high"] is None, "one prompt a domain has no interval"
    assert {"speedup_over_mtp1", "speedup_math", "speedup_over_mtp1_structured"} <= set(summary)
    assert not any(isinstance(value, dict | list) for value in summary.values()), "a row of a table is flat"
    assert summary["saved_per_million"] == pytest.approx(0.5 * (1 - 1 / summary["speedup"]))


def test_your_model_decodes_without_a_drafter_and_refuses_what_it_cannot_keep(executed, tiny_folders):
    run = executed("09_your_model")
    assert run.summary["target"] == Path(tiny_folders["target"]).name and run.summary["fastest"] in ("plain", "copy")
    assert run.summary["tau_for_1.2"] > 0 and run.summary["limit"] > 0 and run.summary["tau_copy"] >= 1
    assert "identical" in run.printed and "refused: generate was asked for beam_search" in run.printed


def on_the_hub(cache: Path, repository: str, files: dict[str, Path], revision: str = "main") -> None:
    """Lay files into a cache as the hub's client does: blobs, links to them under a commit, and a revision that names the commit."""
    kind = "datasets" if "convert" in revision else "models"
    folder, commit = cache / f"{kind}--{repository.replace('/', '--')}", "0" * 40
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs" / revision).parent.mkdir(parents=True)
    (folder / "refs" / revision).write_text(commit)
    for i, (name, path) in enumerate(files.items()):
        place = folder / "snapshots" / commit / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (folder / "blobs" / str(i)).write_bytes(path.read_bytes())
        place.symlink_to(folder / "blobs" / str(i))


@pytest.fixture
def hub(tmp_path, tiny_folders, monkeypatch) -> None:
    """A cache that holds, under the names of the paper's pair, a tiny Qwen3 and a tiny drafter in DeepSpec's layout; and a GSM8K of two."""
    cache, model = tmp_path / "hub", tmp_path / "qwen3"
    PreTrainedTokenizerFast.from_pretrained(tiny_folders["target"]).save_pretrained(model)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=300, head_dim=8, eos_token_id=2, initializer_range=0.4, tie_word_embeddings=False, **shape)
    Qwen3ForCausalLM(config).save_pretrained(model)
    target = dspark.load_target(model, dtype="float32")
    export_deepspec(tiny_drafter(target), target, tmp_path / "drafter")
    pq.write_table(pa.table({"question": ["An apple?", "On the one hand?"], "answer": ["1", "2"]}), tmp_path / "gsm8k.parquet")
    on_the_hub(cache, "Qwen/Qwen3-4B", {path.name: path for path in model.iterdir()})
    on_the_hub(cache, "deepseek-ai/dspark_qwen3_4b_block7", {path.name: path for path in (tmp_path / "drafter").iterdir()})
    on_the_hub(cache, "openai/gsm8k", {"main/test/0000.parquet": tmp_path / "gsm8k.parquet"}, "refs/convert/parquet")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_published_pair_is_inspected_decoded_and_judged_beside_the_paper(tmp_path, hub):
    """In a kernel of its own, because the hub's client reads where its cache is when it is imported."""
    executed, mine = tmp_path / "folder" / "published.ipynb", tmp_path / "mine.jsonl"
    mine.write_text(
        '{"turns": ["Why is an apple red?", "And?"]}\n{"messages": [{"role": "user", "content": "他说 🙂"}]}\n', encoding="utf-8"
    )
    changed = {"prompt_sets": f"GSM8K,{mine}", "prompts": 2, "max_new_tokens": 9, "dtype": "float32", "threads": 1}
    pair = {"target": "Qwen/Qwen3-4B", "drafter": "deepseek-ai/dspark_qwen3_4b_block7"}
    summary = demo.run(ROOT / "notebooks" / "10_published_drafters.ipynb", executed, changed | pair)
    assert summary["format"] == "DeepSpec" and summary["block_size"] == 4 and summary["target"] == pair["target"]
    assert summary["published_tau_GSM8K"] == published.TAU["Qwen3-4B", "DSpark"][0] and "published_tau_mine" not in summary
    assert all(1 <= summary[f"tau_{name}"] <= 5 and summary[f"speedup_{name}"] > 0 for name in ("GSM8K", "mine"))
    printed = "".join(out.text for cell in cells(executed) for out in cell.outputs if out.output_type == "stream")
    assert "identical" in printed and published.TABLE_1 in printed and "the anchor's slot predicts, too" in printed


def test_under_load_shows_a_small_run_where_no_loads_are_recorded(executed):
    for words in ("no recorded loads", "async over the best window", "fixed:2, users 3", "request 0 is active, request 1 is waiting"):
        assert words in executed("06_under_load").printed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_new_token": 8}, "no parameter 'max_new_token', did you mean 'max_new_tokens'"),
        ({"max_new_tokens": "many"}, "max_new_tokens needs int, got 'many'"),
        ({"max_new_tokens": True}, "max_new_tokens needs int, got True"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompts": "Hello"}, r"prompts needs list\[str\] with an entry, got 'Hello'"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"temperature": "warm"}, "temperature needs float, got 'warm'"),
        ({"dtype": "bfloat"}, "no dtype 'bfloat', did you mean 'bfloat16'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_notebook_checks_what_papermill_passes_before_it_loads_a_model(given, said, monkeypatch):
    monkeypatch.setattr(dspark, "load_target", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=said):
        inline.execute(demo.NOTEBOOK, given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt_set": "code"}, "no parameter 'prompt_set', did you mean 'prompt_sets'"),
        ({"prompt_sets": "code,maths"}, "domain 'maths' is unknown, did you mean 'math'"),
        ({"prompt_sets": "gsm8k"}, "did you mean 'GSM8K'"),
        ({"policy": "fixd"}, "policy 'fixd' is unknown, did you mean 'fixed'"),
        ({"device": "cudaa"}, "device 'cudaa' cannot be used here"),
        ({"dtype": "float8"}, "no dtype 'float8', did you mean 'float32'"),
    ],
    ids=str,
)
def test_a_published_drafter_is_named_wrongly_before_anything_loads(given, said, monkeypatch):
    for name in ("dspark.load_target", "dspark.load_drafter", "dspark.load.find_drafter"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(ValueError, match=said):
        inline.execute(ROOT / "notebooks" / "10_published_drafters.ipynb", given)


@pytest.mark.parametrize(
    "kind, name, wrong", [("float", "top_p", 1.5), ("list[float]", "thresholds", [0.1, -0.1]), ("str", "domains", "code,maths")]
)
def test_shares_lists_and_domains_are_checked_as_well(kind, name, wrong):
    batch.check({name: {"float": 1, "list[float]": [0, 0.5], "str": "code,math"}[kind]}, {name: kind})
    with pytest.raises(ValueError, match=str(wrong)[-5:].strip("[]. ")):
        batch.check({name: wrong}, {name: kind})


@pytest.mark.parametrize(
    "changed",
    [
        {"policy": "adaptive:0.02,0.005,0.002,3"},
        {"policy": "confidence:0.2", "threshold": 0.2, "copy": False, "temperature": 0.8, "top_p": 0.9, "seed": 4},
    ],
    ids=lambda changed: changed["policy"],
)
def test_live_decoding_runs_at_other_parameters_on_another_model(tmp_path, tiny_folders, changed):
    small = {"prompt": "他说 <b>&</b> 🙂", "max_new_tokens": 14, "threads": 1, "dtype": "float32"}
    path, executed = ROOT / "notebooks" / "01_live_decoding.ipynb", tmp_path / "live.ipynb"
    summary = inline.run(path, executed, small | tiny_folders | changed)

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
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in shown) == 1
    (picture,) = [data["text/html"] for data in shown if "<svg" in data.get("text/html", "")]  # no trace of this prompt: the run alone
    assert picture.count("<svg") == 3 and "verified drafts accepted" in picture


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
        ([("polcy", "fixed")], "no parameter 'polcy', did you mean 'policy'"),
        ([("xyz", "1")], "no parameter 'xyz': choose from prompts, max_new_tokens"),
        ([("threads", "0")], "threads must be at least 1, got 0"),
        ([("max_new_tokens", "many")], "max_new_tokens needs int, got 'many'"),
        ([("temperature", "warm")], "temperature needs float, got 'warm'"),
        ([("prompts", "Hello")], "prompts needs list\\[str\\] with an entry, got 'Hello'"),
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
    monkeypatch.setattr(demo, "packaged_folder", lambda: None)
    assert demo.main([]) == 130
    assert capsys.readouterr().err == "dspark.lab.demo: interrupted\n"
