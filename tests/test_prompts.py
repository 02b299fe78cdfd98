"""The prompt sets keep what a fair benchmark needs: fixed, disjoint, large enough, and the same for any n."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dspark.bench.plan import Plan
from dspark.bench.prompts import DOMAINS, SPLITS, PromptItem, data_dir, load_prompts

AUTHORED = ("chat", "structured")


def every_item() -> list[PromptItem]:
    return [item for domain in DOMAINS for split in SPLITS for item in load_prompts(domain, split)]


def wording(item: PromptItem) -> str:
    """What a prompt says, without case and spacing: a copy that differs only in these is still a copy."""
    return " ".join(" ".join(message["content"] for message in item.messages).lower().split())


def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prompt_builder", data_dir() / "prompts" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ids_are_unique_and_name_their_domain():
    items = every_item()
    repeated = [name for name, times in Counter(item.id for item in items).items() if times > 1]
    assert repeated == []
    assert all(item.id.startswith(f"{item.domain}/") for item in items)


def test_no_prompt_is_worded_like_another_so_dev_and_test_are_disjoint_in_content():
    repeated = [text for text, times in Counter(wording(item) for item in every_item()).items() if times > 1]
    assert repeated == []


def test_dev_and_test_share_no_math_template():
    dev, test = ({item.theme for item in load_prompts("math", split)} for split in SPLITS)
    assert dev & test == set()


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_holds_enough_prompts_of_both_splits(domain):
    assert len(load_prompts(domain, "test")) >= 24
    assert len(load_prompts(domain, "dev")) >= 16


def test_the_sources_are_complete():
    sizes = Counter(item.domain for item in every_item())
    assert (sizes["code"], sizes["math"]) == (164, 120)
    assert {item.id for item in every_item() if item.domain == "code"} == {f"code/{number:03d}" for number in range(164)}


@pytest.mark.parametrize(("domain", "per_theme"), [("chat", 10), ("structured", 5)])
def test_authored_prompts_cover_eight_themes_evenly(domain, per_theme):
    themes = Counter(item.theme for split in SPLITS for item in load_prompts(domain, split))
    assert len(themes) == 8
    assert set(themes.values()) == {per_theme}


@pytest.mark.parametrize("domain", AUTHORED)
@pytest.mark.parametrize("split", SPLITS)
def test_any_first_prompts_cover_the_themes(domain, split):
    assert len({item.theme for item in load_prompts(domain, split, n=8)}) == 8
    assert len({item.theme for item in load_prompts(domain, split, n=5)}) == 5


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", SPLITS)
def test_loading_is_deterministic_and_a_smaller_n_is_a_prefix(domain, split):
    assert load_prompts(domain, split) == load_prompts(domain, split)
    assert load_prompts(domain, split, n=5) == load_prompts(domain, split, n=10)[:5]
    assert load_prompts(domain, split, n=10) == load_prompts(domain, split)[:10]


def test_items_carry_what_was_asked_for_and_text_to_encode():
    for domain in DOMAINS:
        for split in SPLITS:
            assert {(item.domain, item.split) for item in load_prompts(domain, split)} == {(domain, split)}
    for item in every_item():
        assert [message["role"] for message in item.messages] == ["user"]
        assert len(wording(item)) >= 10


@pytest.mark.parametrize("domain", DOMAINS)
def test_rebuilding_changes_nothing(domain):
    build = builder()
    committed = (data_dir() / "prompts" / f"{domain}.jsonl").read_bytes()
    assert build.render(domain, build.authored_rows(domain)).encode() == committed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("poetry",), ["'poetry'", *DOMAINS]),
        (("code", "train"), ["'train'", *SPLITS]),
        (("code", "test", 0), ["n is 0", "1 to 82"]),
        (("code", "test", -3), ["n is -3", "1 to 82"]),
        (("structured", "dev", 17), ["n is 17", "1 to 16"]),
    ],
)
def test_bad_input_raises_value_error_with_the_value_and_the_choices(arguments, named):
    with pytest.raises(ValueError) as error:
        load_prompts(*arguments)
    assert all(text in str(error.value) for text in named)


def lines(path: Path, *rows: object) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_a_file_of_others_is_read_whatever_column_its_prompts_are_in(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "f?"}, {"role": "assistant", "content": "g"}]
    rows = [{"question": "a?", "answer": "b"}, {"turns": ["c?", "d?"]}, {"instruction": "e", "input": "x"}, {"messages": chat}]
    items = load_prompts(lines(tmp_path / "mine.jsonl", *rows, rows[0]))
    assert [item.messages for item in items[:3]] == [[{"role": "user", "content": text}] for text in ("a?", "c?", "e\n\nx")]
    assert items[3].messages == chat[:2]
    assert {item.domain for item in items} == {"mine"} and len({item.id for item in items}) == 5


def test_lines_end_at_line_feeds_alone(tmp_path):
    """JSON's strings may hold other characters that Python takes for ends of lines, and an editor may have left a mark before the first."""
    prompts = ["a\u2028b", "c\u0085d"]
    text = "\r\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    (tmp_path / "mine.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [item.messages[0]["content"] for item in load_prompts(str(tmp_path / "mine.jsonl"))] == prompts


def test_a_benchmark_by_name_is_the_hubs_own_conversion(tmp_path, monkeypatch):
    pq.write_table(pa.table({"prompt": [["a?", "b?"], ["c?", "d?"]], "reference": [[], []]}), tmp_path / "0000.parquet")
    asked = []
    fetch = lambda *where, **how: asked.append((where, how)) or str(tmp_path / "0000.parquet")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert [item.messages[0]["content"] for name in ("MT-Bench", "me/mine:all/dev") for item in load_prompts(name, n=1)] == ["a?", "a?"]
    assert [(where[0], where[1], how["repo_type"]) for where, how in asked] == [
        ("HuggingFaceH4/mt_bench_prompts", "default/train/0000.parquet", "dataset"),
        ("me/mine", "all/dev/0000.parquet", "dataset"),
    ]


@pytest.mark.parametrize(
    ("row", "named"),
    [({"text": "a"}, ["row 1 of mine", "messages"]), (["a"], ["row 1"]), ({"turns": []}, ["row 1"]), ({"prompt": 7}, ["row 1"])],
)
def test_a_row_without_a_prompt_is_named(tmp_path, row, named):
    with pytest.raises(ValueError) as error:
        load_prompts(lines(tmp_path / "mine.jsonl", row))
    assert all(text in str(error.value) for text in named)


@pytest.mark.parametrize("name", ["{folder}/absent.jsonl", "{folder}/damaged.jsonl", "owner/absent:default/test"])
def test_a_set_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, name):
    (tmp_path / "damaged.jsonl").write_text("{", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot be read .*one prompt a line"):
        load_prompts(name.format(folder=tmp_path))


def test_a_changed_file_is_another_run(tmp_path):
    configurations = []
    for text in ("a?", "b?"):
        name = lines(tmp_path / "mine.jsonl", {"prompt": text})
        configurations.append(Plan("plain", domains=name, prompts=1).configuration("speed", "", None))
    assert configurations[0] != configurations[1] and str(tmp_path) not in str(configurations)


def test_the_environment_chooses_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "prompts").mkdir()
    line = {"id": "chat/999", "split": "dev", "theme": "a", "messages": [{"role": "user", "content": "Hello?"}]}
    (tmp_path / "prompts" / "chat.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    monkeypatch.setenv("DSPARK_DATA", str(tmp_path))
    assert [item.id for item in load_prompts("chat", "dev")] == ["chat/999"]


def test_a_missing_data_folder_or_file_raises_value_error_with_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"no prompt file at .*code\.jsonl"):
        load_prompts("code")
    monkeypatch.setenv("DSPARK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no data folder at .*nowhere.*DSPARK_DATA"):
        load_prompts("code")
