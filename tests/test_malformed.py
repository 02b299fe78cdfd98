"""Damaged and hostile files: each ends in one line that names it, or loads whole; none hangs, runs code, or takes memory by its claims.

Every case is generated from its number. The contract, by what a file says of itself:
native drafters name the digest of their weights, so a flipped bit is refused or in a place that nothing reads (the weights are the
very ones that were saved); where no digest is known, what loads is finite; a config that loads drafts distributions.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import REDUCED, edit, shard, speculators
from tiny import dense, tiny_drafter, tiny_target

import dspark
from dspark.draft.backbone import DrafterConfig
from dspark.draft.drafter import Drafter
from dspark.formats.deepspec import export_deepspec
from dspark.target.target import Target
from dspark.train.corpus import Corpus, load_corpus, save_corpus
from dspark.train.features import FeatureStore
from dspark.train.loop import TrainConfig, Trainer
from dspark.train.start import drafter_for
from dspark.verify.sampling import Rng, Sampling

pytestmark = pytest.mark.timeout(20)

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
ROOM = 1 << 30  # bytes that reading a file of some 100 kB may take at most, address space included


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole folder of each kind; tests copy them."""
    root = tmp_path_factory.mktemp("made")
    dspark.save_drafter(tiny_drafter(target, d2t=REDUCED), target, root / "native")
    export_deepspec(tiny_drafter(target), target, root / "reference")
    edit(root / "reference", weights_digest=None)
    speculators(target, tiny_drafter(target, d2t=REDUCED), root / "speculators")
    shutil.copytree(root / "reference", root / "sharded")
    shard(root / "sharded")
    target.model.save_pretrained(root / "target")
    return root


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A folder that the hostile code of these tests would make."""
    return tmp_path / "it ran"


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Inside it the process may grow by ROOM and no more, where the system can tell its size."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(read: Callable[[], object], *names: object) -> object | None:
    """What was read, or None after a ValueError of one line that says one of ``names``. Anything else fails the test."""
    try:
        with limited_memory():
            return read()
    except ValueError as error:
        message = str(error)
    assert message and "\n" not in message, message
    assert any(str(name) in message for name in names), message
    assert "memory" not in message.replace(str(names[0]), ""), message  # refused because it is wrong, not because it was too big
    return None


def refused(read: Callable[[], object], *names: object) -> None:
    assert outcome(read, *names) is None, "it was loaded"


def drafts_well(drafter: Drafter, target: Target) -> bool:
    """Are all weights finite, and a drafted block's rows distributions?"""
    prompt = [1, 17, 42]
    state = drafter.new_state(prompt)
    drafter.extend(state, prompt, target.forward(torch.tensor([prompt]), None, drafter.target_layer_ids)[1])
    draft = drafter.draft(state, 9, drafter.block_size, Sampling(1.0), Rng(torch.Generator().manual_seed(0)))
    return all(w.isfinite().all() for w in drafter.parameters()) and torch.allclose(dense(draft).sum(-1), torch.ones(drafter.block_size))


def copied(made: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / kind, tmp_path / kind))


# ---- bytes


def header_length(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def flipped(content: bytes, seed: int, start: int, stop: int) -> bytes:
    """One to three bits of [start, stop) flipped."""
    changed, dice = bytearray(content), random.Random(seed)
    for _ in range(dice.randint(1, 3)):
        changed[dice.randrange(start, stop)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def relabelled(content: bytes, change: Callable[[dict], object]) -> bytes:
    """The same data under a changed header. A change that returns bytes gives the header's text itself."""
    length = header_length(content)
    header = json.loads(content[8:length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[length:]


def first(header: dict) -> dict:
    return header[min(name for name in header if name != "__metadata__")]


def second(header: dict) -> dict:
    return header[sorted(name for name in header if name != "__metadata__")[1]]


HEADERS: dict[str, Callable[[dict], object]] = {
    "overlapping": lambda h: second(h).update(data_offsets=first(h)["data_offsets"]),
    "negative offset": lambda h: first(h).update(data_offsets=[-8, 8]),
    "offset beyond the file": lambda h: first(h).update(data_offsets=[0, 1 << 62]),
    "end before begin": lambda h: first(h).update(data_offsets=first(h)["data_offsets"][::-1]),
    "one offset": lambda h: first(h).update(data_offsets=[0]),
    "no offsets": lambda h: first(h).pop("data_offsets"),
    "offsets as text": lambda h: first(h).update(data_offsets="0:8"),
    "negative shape": lambda h: first(h).update(shape=[-1, 4]),
    "huge shape": lambda h: first(h).update(shape=[1 << 40, 1 << 40]),
    "overflowing shape": lambda h: first(h).update(shape=[1 << 63, 2]),
    "broken shape": lambda h: first(h).update(shape=[1.5]),
    "no shape": lambda h: first(h).pop("shape"),
    "shape of no axes": lambda h: first(h).update(shape=[]),
    "unknown type": lambda h: first(h).update(dtype="F99"),
    "type as a number": lambda h: first(h).update(dtype=16),
    "complex": lambda h: first(h).update(dtype="C64", shape=[1]),
    "four bits": lambda h: first(h).update(dtype="F4"),
    "boolean": lambda h: first(h).update(dtype="BOOL"),
    "metadata as a list": lambda h: h.update(__metadata__=["format", "pt"]),
    "metadata of numbers": lambda h: h.update(__metadata__={"config": 7}),
    "a tensor that is null": lambda h: h.update(null=None),
    "a name of two lines": lambda h: h.update({"fc\nweight": h.pop("fc.weight")}),
    "an empty name": lambda h: h.update({"": h.pop("fc.weight")}),
    "a name like a path": lambda h: h.update({"../../fc.weight": h.pop("fc.weight")}),
    "no tensors": lambda h: b"{}",
    "a list": lambda h: b"[]",
    "a number": lambda h: b"7",
    "no JSON": lambda h: b'{"a":',
    "no UTF-8": lambda h: b'{"\xff\xfe": 1}',
    "deep": lambda h: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a name twice": lambda h: b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
}
LENGTHS = [0, 1, 7, 1 << 20, 100_000_001, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1]
KINDS = ("native", "reference", "speculators")


def damaged_weights(made: Path, kind: str, tmp_path: Path, damage: Callable[[bytes], bytes]) -> Path:
    folder = copied(made, kind, tmp_path)
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    return folder


def the_same_weights(one: Drafter, folder: Path) -> bool:
    saved = load_file(folder / WEIGHTS)
    return all(torch.equal(weight, saved[name]) for name, weight in one.named_parameters())


@pytest.mark.parametrize("seed", range(24))
def test_a_bit_flipped_in_a_native_header_is_refused_or_makes_no_difference(made: Path, target: Target, tmp_path: Path, seed: int) -> None:
    folder = damaged_weights(made, "native", tmp_path, lambda c: flipped(c, seed, 0, header_length(c)))
    drafter = outcome(lambda: dspark.load_drafter(folder, target), folder)
    assert drafter is None or the_same_weights(drafter, made / "native")


@pytest.mark.parametrize("seed", range(12))
def test_a_bit_flipped_in_native_weights_is_refused(made: Path, target: Target, tmp_path: Path, seed: int) -> None:
    folder = damaged_weights(made, "native", tmp_path, lambda c: flipped(c, seed, header_length(c), len(c)))
    refused(lambda: dspark.load_drafter(folder, target), folder / WEIGHTS)


@pytest.mark.parametrize("kind", ["reference", "speculators"])
@pytest.mark.parametrize("seed", range(10))
def test_a_bit_flipped_in_weights_without_a_digest_leaves_them_finite_or_is_refused(
    made: Path, target: Target, tmp_path: Path, kind: str, seed: int
) -> None:
    folder = damaged_weights(made, kind, tmp_path, lambda c: flipped(c, seed, 0 if seed % 2 else header_length(c), len(c)))
    drafter = outcome(lambda: dspark.load_drafter(folder, target), folder)
    assert drafter is None or all(weight.isfinite().all() for weight in drafter.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_truncated_weights_are_refused(made: Path, target: Target, tmp_path: Path, kind: str, seed: int) -> None:
    dice = random.Random(seed)
    folder = damaged_weights(
        made, kind, tmp_path, lambda c: c[: dice.choice([seed, dice.randrange(header_length(c)), dice.randrange(len(c))])]
    )
    refused(lambda: dspark.load_drafter(folder, target), folder)


@pytest.mark.parametrize("more", [b"\0", b"\0" * 4096, b"PK\x03\x04" * 9], ids=["a byte", "a page", "an archive"])
def test_weights_followed_by_other_bytes_are_refused(made: Path, target: Target, tmp_path: Path, more: bytes) -> None:
    folder = damaged_weights(made, "native", tmp_path, lambda c: c + more)
    refused(lambda: dspark.load_drafter(folder, target), folder)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_header_with_a_false_length_is_refused(made: Path, target: Target, tmp_path: Path, length: int) -> None:
    folder = damaged_weights(made, "reference", tmp_path, lambda c: struct.pack("<Q", length) + c[8:])
    refused(lambda: dspark.load_drafter(folder, target), folder)


@pytest.mark.parametrize("kind", ["native", "speculators"])
@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_with_false_tensors_is_refused(
    made: Path, target: Target, tmp_path: Path, kind: str, change: Callable[[dict], object]
) -> None:
    folder = damaged_weights(made, kind, tmp_path, lambda c: relabelled(c, change))
    refused(lambda: dspark.load_drafter(folder, target), folder)


def test_a_draft_vocabulary_of_complex_numbers_is_refused(made: Path, target: Target, tmp_path: Path) -> None:
    folder = copied(made, "speculators", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"d2t": tensors["d2t"].to(torch.complex64)}, folder / WEIGHTS)
    refused(lambda: dspark.load_drafter(folder, target), folder)


# ---- values

WRONG = {
    "text": "seven",
    "lines": "a\nb",
    "surrogate": "\ud800",
    "null": None,
    "list": [1, "2", None],
    "object": {"a": {"b": []}},
    "negative": -3,
    "zero": 0,
    "half": 0.5,
    "true": True,
    "large": 2_000_000_000,
    "huge": 10**400,
    "tiny": 1e-300,
    "nan": float("nan"),
    "infinite": float("inf"),
    "nested": json.loads("[" * 200 + "]" * 200),
}
KEYS = {
    "native": [
        *DrafterConfig.__dataclass_fields__,
        *"architectures format_version sts_temperatures target target_digest weights_digest training".split(),
    ],
    "reference": [
        *"architectures block_size head_dim hidden_act hidden_size layer_types rope_parameters rope_scaling rope_theta".split(),
        *"rms_norm_eps target_layer_ids markov_rank num_hidden_layers attention_bias mask_token_id".split(),
    ],
    "speculators": [
        *"speculators_model_type sample_from_anchor transformer_layer_config aux_hidden_state_layer_ids topk_context".split(),
        *"draft_vocab_size block_size confidence_head_with_markov".split(),
    ],
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in KINDS for key in KEYS[kind]])
def test_a_value_of_the_wrong_kind_is_named_or_makes_no_difference(made: Path, target: Target, tmp_path: Path, kind: str, key: str) -> None:
    folder = copied(made, kind, tmp_path)
    plain = json.loads((folder / CONFIG).read_text())
    for value in (*WRONG.values(), ...):
        changed = {name: v for name, v in (plain | {key: value}).items() if v is not ...}
        (folder / CONFIG).write_text(json.dumps(changed))
        drafter = outcome(lambda: dspark.load_drafter(folder, target), folder, repr(value))
        assert drafter is None or drafts_well(drafter, target), value


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rope_parameters", "num_attention_heads", "rms_norm_eps", "layer_types"])
def test_a_nested_value_of_the_wrong_kind_is_named_or_makes_no_difference(made: Path, target: Target, tmp_path: Path, key: str) -> None:
    folder = copied(made, "speculators", tmp_path)
    plain = json.loads((folder / CONFIG).read_text())
    for value in WRONG.values():
        edit(folder, transformer_layer_config=plain["transformer_layer_config"] | {key: value})
        drafter = outcome(lambda: dspark.load_drafter(folder, target), folder, repr(value))
        assert drafter is None or drafts_well(drafter, target), value


CONTENTS = {
    "empty": b"",
    "no object": b"[{}]",
    "text": b'"config"',
    "cut": b'{"architectures": ["DSpark',
    "not UTF-8": b'{"architectures": "\xff"}',
    "deep": b"[" * 100_000,
    "deep and whole": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "many digits": b'{"block_size": ' + b"9" * 10_000 + b"}",
    "pickled": pickle.dumps({"architectures": ["DSparkDrafter"]}),
    "zeros": bytes(4096),
    "a mark and no more": b"\xef\xbb\xbf",
}


@pytest.mark.parametrize("name", [CONFIG, INDEX])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_text_that_is_no_json_object_is_refused(made: Path, target: Target, tmp_path: Path, name: str, content: bytes) -> None:
    folder = copied(made, "sharded", tmp_path)
    (folder / name).write_bytes(content)
    refused(lambda: dspark.load_drafter(folder, target), folder / name)


@pytest.mark.parametrize("content", [b"[]", b"7", b"{", b"[" * 50_000], ids=["list", "number", "cut", "deep"])
def test_a_config_inside_damaged_weights_is_not_trusted(made: Path, target: Target, tmp_path: Path, content: bytes) -> None:
    folder = copied(made, "native", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"norm.weight": tensors["norm.weight"] + 1}, folder / WEIGHTS, {"config": content.decode()})
    refused(lambda: dspark.load_drafter(folder, target), folder / WEIGHTS)


# ---- places

PLACES: list[object] = [
    "../../x.safetensors",
    "../model-0.safetensors",
    "/etc/passwd",
    "/etc/passwd.safetensors",
    "./model-0.safetensors",
    "sub/model-0.safetensors",
    "..",
    ".safetensors/..",
    "~/model-0.safetensors",
    "model-0.safetensors\0.bin",
    "model\n0.safetensors",
    "m" * 300 + ".safetensors",
    "model-0.bin",
    "absent.safetensors",
    "",
    None,
    7,
    ["model-0.safetensors"],
    {"file": "model-0.safetensors"},
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: repr(place)[:30])
def test_a_shard_is_a_plain_file_of_the_folder(made: Path, target: Target, tmp_path: Path, place: object) -> None:
    folder = copied(made, "sharded", tmp_path)
    for outside in (tmp_path.parent / "x.safetensors", tmp_path / "model-0.safetensors"):
        shutil.copy(folder / "model-0.safetensors", outside)
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder, INDEX, weight_map={name: place if file == "model-0.safetensors" else file for name, file in placed.items()})
    refused(lambda: dspark.load_drafter(folder, target), folder)


@pytest.mark.parametrize("placed", ["model-0.safetensors", ["model-0.safetensors"], 7, {}, None])
def test_a_weight_map_that_is_none_is_refused(made: Path, target: Target, tmp_path: Path, placed: object) -> None:
    folder = copied(made, "sharded", tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    refused(lambda: dspark.load_drafter(folder, target), folder)


def a_folder(path: Path) -> None:
    path.mkdir()


def itself(path: Path) -> None:
    path.symlink_to(path)


def nothing(path: Path) -> None:
    path.symlink_to(path.with_name("absent"))


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, INDEX, "model-0.safetensors"])
@pytest.mark.parametrize("make", [a_folder, os.mkfifo, itself, nothing, endless])
def test_anything_but_a_file_in_the_place_of_one_is_refused(
    made: Path, target: Target, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    folder = copied(made, "native" if name in (CONFIG, WEIGHTS) else "sharded", tmp_path)
    (folder / name).unlink()
    make(folder / name)
    refused(lambda: dspark.load_drafter(folder, target), folder)


# ---- code


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def archived(bomb: Bomb, path: Path, zipped: bool) -> None:
    torch.save({"fc.weight": bomb}, path, _use_new_zipfile_serialization=zipped)


PICKLES: dict[str, Callable[[Bomb, Path], None]] = {
    **{f"protocol {n}": lambda bomb, path, n=n: path.write_bytes(pickle.dumps(bomb, n)) for n in range(6)},
    "torch archive": lambda bomb, path: archived(bomb, path, True),
    "torch stream": lambda bomb, path: archived(bomb, path, False),
    "numpy": lambda bomb, path: np.save(path.open("wb"), np.array([bomb], dtype=object), allow_pickle=True),
    "length in front": lambda bomb, path: path.write_bytes(struct.pack("<Q", 60) + pickle.dumps(bomb)),
}


def test_the_bomb_of_these_tests_goes_off(marker: Path, tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.is_dir()
    marker.rmdir()
    PICKLES["torch archive"](Bomb(marker), tmp_path / "archive")
    torch.load(tmp_path / "archive", weights_only=False)
    assert marker.is_dir()


@pytest.mark.parametrize("kind", ["native", "sharded", "target"])
@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES)
def test_a_pickle_under_any_name_is_refused_and_never_opened(
    made: Path, target: Target, tmp_path: Path, marker: Path, kind: str, make: Callable[[Bomb, Path], None]
) -> None:
    folder = copied(made, kind, tmp_path)
    make(Bomb(marker), folder / ("model-0.safetensors" if kind == "sharded" else WEIGHTS))
    refused(lambda: dspark.load_target(folder) if kind == "target" else dspark.load_drafter(folder, target), folder)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["native", "target"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl", "adapter_model.bin"])
def test_pickled_weights_are_refused_and_never_opened(
    made: Path, target: Target, tmp_path: Path, marker: Path, kind: str, name: str
) -> None:
    folder = copied(made, kind, tmp_path)
    (folder / WEIGHTS).unlink()
    PICKLES["torch archive"](Bomb(marker), folder / name)
    if kind == "target":
        refused(lambda: dspark.load_target(folder), folder)
    else:
        refused(lambda: dspark.load_drafter(folder, target), f"{folder} has only pickled weights ({name})")
    assert not marker.exists()


CODE = {
    "auto_map": {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModel": "configuration_evil.Evil",
        "AutoModelForCausalLM": "configuration_evil.Evil",
        "AutoTokenizer": ["configuration_evil.Evil", "configuration_evil.Evil"],
    },
    "trust_remote_code": True,
}


def with_code(folder: Path, marker: Path, **config: object) -> None:
    (folder / "configuration_evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil:\n    pass\n")
    edit(folder, **CODE, **config)
    (folder / "tokenizer_config.json").write_text(json.dumps(CODE | {"tokenizer_class": "Evil"}))


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_the_folder_of_a_drafter_is_not_run(made: Path, target: Target, tmp_path: Path, marker: Path, kind: str) -> None:
    folder = copied(made, kind, tmp_path)
    with_code(folder, marker, model_type="evil")
    drafter = outcome(lambda: dspark.load_drafter(folder, target), folder)
    assert drafter is None or drafts_well(drafter, target)
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_code_in_the_folder_of_a_target_is_not_run(made: Path, tmp_path: Path, marker: Path, model_type: str) -> None:
    folder = copied(made, "target", tmp_path)
    with_code(folder, marker, model_type=model_type)
    loaded = outcome(lambda: dspark.load_target(folder), folder)
    assert loaded is None or (model_type == "llama" and loaded.encode([5]) == [5])
    assert not marker.exists()


# ---- targets

TARGET_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type", "architectures", "rope_parameters")


@pytest.mark.parametrize("key", TARGET_KEYS)
@pytest.mark.parametrize("value", ["text", "list", "object", "negative", "zero", "half", "nan"])
def test_a_target_with_a_value_of_the_wrong_kind_is_refused_or_makes_no_difference(
    made: Path, tmp_path: Path, key: str, value: str
) -> None:
    folder = copied(made, "target", tmp_path)
    edit(folder, **{key: WRONG[value]})
    loaded = outcome(lambda: dspark.load_target(folder), folder)
    assert loaded is None or loaded.forward(torch.tensor([[5, 6]]), None)[0].isfinite().all()


@pytest.mark.parametrize("seed", range(10))
def test_a_target_with_damaged_weights_is_refused(made: Path, tmp_path: Path, seed: int) -> None:
    damages: list[Callable[[bytes], bytes]] = [
        lambda c: c[: random.Random(seed).randrange(len(c))],
        lambda c: struct.pack("<Q", LENGTHS[seed]) + c[8:],
        lambda c: relabelled(c, list(HEADERS.values())[seed]),
    ]
    for damage in damages:
        folder = damaged_weights(made, "target", tmp_path, damage)
        refused(lambda folder=folder: dspark.load_target(folder), folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["../model-0.safetensors", "/etc/passwd", "absent.safetensors", "model-0.bin"])
def test_a_target_reads_nothing_outside_its_folder(made: Path, tmp_path: Path, name: str) -> None:
    folder = copied(made, "target", tmp_path)
    (folder / WEIGHTS).rename(tmp_path / "model-0.safetensors")
    placed = dict.fromkeys(load_file(tmp_path / "model-0.safetensors"), name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    refused(lambda: dspark.load_target(folder), folder)


def test_a_target_that_lacks_weights_is_refused(made: Path, tmp_path: Path) -> None:
    folder = copied(made, "target", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    refused(lambda: dspark.load_target(folder), folder, "up_proj")


# ---- GGUF


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small GGUF file that lacks most of a model: whatever happens to it, it is refused."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("context_length", 64), ("embedding_length", 32), ("feed_forward_length", 64), ("block_count", 2)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{i}" for i in range(40)])
    writer.add_token_scores([0.0] * 40)
    writer.add_tensor("token_embd.weight", np.ones((40, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def replaced(content: bytes, mark: bytes, after: int, number: int) -> bytes:
    """``number`` as 8 bytes, written ``after`` bytes after ``mark``."""
    at = content.index(mark) + len(mark) + after
    return content[:at] + struct.pack("<Q", number) + content[at + 8 :]


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "as it is": lambda c: c,
    "no magic": lambda c: b"GGML" + c[4:],
    "version 99": lambda c: c[:4] + struct.pack("<I", 99) + c[8:],
    "other byte order": lambda c: c[:4] + struct.pack(">I", 3) + c[8:],
    **{f"{n} tensors": lambda c, n=n: c[:8] + struct.pack("<Q", n) + c[16:] for n in (2, 1 << 40, (1 << 64) - 1)},
    **{f"{n} entries": lambda c, n=n: c[:16] + struct.pack("<Q", n) + c[24:] for n in (0, 99, 1 << 40, (1 << 64) - 1)},
    **{f"a list of {n} words": lambda c, n=n: replaced(c, b"tokenizer.ggml.tokens", 8, n) for n in (41, 1 << 30, (1 << 64) - 1)},
    **{f"a list of {n} numbers": lambda c, n=n: replaced(c, b"tokenizer.ggml.scores", 8, n) for n in (1 << 30, 1 << 62)},
    "a name without end": lambda c: replaced(c, b"GGUF", 20, 1 << 60),
    "a tensor's name without end": lambda c: replaced(c, b"token_embd.weight", -25, 1 << 60),
    "a tensor of many axes": lambda c: replaced(c, b"token_embd.weight", 0, (1 << 32) - 1),
    "a tensor of huge axes": lambda c: replaced(c, b"token_embd.weight", 4, 1 << 62),
    "a tensor beyond the file": lambda c: replaced(c, b"token_embd.weight", 24, 1 << 62),
    **{f"cut {seed}": lambda c, seed=seed: c[: random.Random(seed).randrange(len(c))] for seed in range(8)},
    **{f"flipped {seed}": lambda c, seed=seed: flipped(c, seed, 0, len(c) - 5120) for seed in range(12)},
    "pickled": lambda c: pickle.dumps({"a": 1}),
    "empty": lambda c: b"",
}


@pytest.mark.parametrize("damage", PACKED.values(), ids=PACKED)
def test_a_damaged_gguf_file_is_refused(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(damage(packed))
    refused(lambda: dspark.load_target(tmp_path / "m.gguf"), tmp_path / "m.gguf")
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


# ---- what training reads


def a_corpus(rows: int = 8) -> Corpus:
    generator = torch.Generator().manual_seed(0)
    assistant = torch.zeros(rows, 12, dtype=torch.bool)
    assistant[:, 3:] = True
    return Corpus(torch.randint(4, VOCAB, (rows, 12), generator=generator), assistant, torch.ones(rows))


VOCAB = 100
CORPORA: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no ids": lambda t: t.pop("token_ids"),
    "no bits": lambda t: t.pop("assistant_bits"),
    "no temperature": lambda t: t.pop("temperature"),
    "flat ids": lambda t: t.update(token_ids=t["token_ids"].flatten()),
    "one id": lambda t: t.update(token_ids=t["token_ids"].flatten()[0].clone()),
    "broken ids": lambda t: t.update(token_ids=t["token_ids"].float()),
    "brain floats": lambda t: t.update(temperature=t["temperature"].bfloat16()),
    "negative ids": lambda t: t.update(token_ids=-t["token_ids"].int()),
    "few bits": lambda t: t.update(assistant_bits=t["assistant_bits"][:, :1].clone()),
    "bits of fewer rows": lambda t: t.update(assistant_bits=t["assistant_bits"][:5].clone()),
    "flat bits": lambda t: t.update(assistant_bits=t["assistant_bits"].flatten()),
    "bits as numbers": lambda t: t.update(assistant_bits=t["assistant_bits"].int()),
    "one temperature": lambda t: t.update(temperature=t["temperature"][:1].clone()),
    "temperature of two axes": lambda t: t.update(temperature=t["temperature"][:, None].clone()),
}


@pytest.mark.parametrize("change", CORPORA.values(), ids=CORPORA)
def test_a_corpus_of_another_layout_is_refused(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = tmp_path / "corpus.safetensors"
    save_corpus(a_corpus(), path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refused(lambda: load_corpus(path), path)


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_corpus_is_refused_or_has_the_shape_of_one(tmp_path: Path, marker: Path, seed: int) -> None:
    path = tmp_path / "corpus.safetensors"
    save_corpus(a_corpus(), path)
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(seed).randrange(len(content))] if seed % 2 else flipped(content, seed, 0, len(content)))
    found = outcome(lambda: load_corpus(path), path)
    assert found is None or found.token_ids.shape == found.assistant.shape == (len(found.temperature), 12)
    list(PICKLES.values())[seed % len(PICKLES)](Bomb(marker), path)
    refused(lambda: load_corpus(path), path)
    assert not marker.exists()


def test_a_corpus_of_another_vocabulary_is_refused() -> None:
    text = a_corpus()
    text.token_ids[3, 3] = VOCAB
    refused(lambda: FeatureStore(tiny_target(), text, (0, 2)), VOCAB)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    FeatureStore(tiny_target(), a_corpus(), (0, 2), folder).shard(0)
    return folder / "00000.safetensors"


SHARDS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no taps": lambda t: t.pop("taps"),
    "no text": lambda t: t.pop("token_ids"),
    "something more": lambda t: t.update(more=torch.zeros(2)),
    "narrow taps": lambda t: t.update(taps=t["taps"][..., :32].clone()),
    "taps of half precision": lambda t: t.update(taps=t["taps"].half()),
    "fewer rows": lambda t: t.update(final=t["final"][:3].clone()),
    "text as floats": lambda t: t.update(token_ids=t["token_ids"].float()),
    "other text": lambda t: t["token_ids"].add_(1),
    "not a number": lambda t: t["final"][0, 0, :1].fill_(torch.nan),
    "infinite taps": lambda t: t["taps"][0, 0, :1].fill_(torch.inf),
    "no mass": lambda t: t["logsumexp"].fill_(torch.inf),
}


@pytest.mark.parametrize("change", SHARDS.values(), ids=SHARDS)
def test_features_of_another_layout_are_refused(
    features: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    tensors, path = load_file(features), tmp_path / features.name
    store = FeatureStore(tiny_target(), a_corpus(), (0, 2), tmp_path)
    change(tensors)
    save_file(tensors, path, {"about": store._about})
    refused(lambda: store.shard(0), path)


@pytest.mark.parametrize("seed", range(10))
def test_damaged_features_are_refused_or_finite(features: Path, tmp_path: Path, marker: Path, seed: int) -> None:
    content, path = features.read_bytes(), tmp_path / features.name
    store = FeatureStore(tiny_target(), a_corpus(), (0, 2), tmp_path)
    path.write_bytes(content[: random.Random(seed).randrange(len(content))] if seed % 2 else flipped(content, seed, 0, len(content)))
    found = outcome(lambda: store.shard(0), path)
    assert found is None or (found.taps.isfinite().all() and found.final.isfinite().all())
    path.unlink()
    list(PICKLES.values())[seed % len(PICKLES)](Bomb(marker), path)
    refused(lambda: store.shard(0), path)
    path.unlink()
    (os.mkfifo, a_folder)[seed % 2](path)
    refused(lambda: store.shard(0), path)
    assert not marker.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    list(trainer(folder).run())
    return folder / "checkpoint.safetensors"


def trainer(folder: Path, text: Corpus | None = None) -> Trainer:
    target = tiny_target(num_hidden_layers=2)
    store = FeatureStore(target, text or a_corpus(), (0,), shard_rows=4)
    drafter = drafter_for(target, block_size=3, target_layer_ids=(0,), markov_rank=4, mask_token_id=3, d2t=torch.arange(2, 90))
    return Trainer(target, drafter, store, TrainConfig(steps=2, sequences=2, anchors=2), folder)


def resaved(path: Path, change: Callable[[dict, dict[str, torch.Tensor]], object]) -> bytes:
    """The checkpoint after ``change(about, tensors)``."""
    tensors = load_file(path)
    header = json.loads(path.read_bytes()[8 : header_length(path.read_bytes())])["__metadata__"]
    about = json.loads(header["about"])
    about = change(about, tensors) or about
    scratch = path.with_name("changed")
    save_file(tensors, scratch, {"about": about if isinstance(about, str) else json.dumps(about)})
    return scratch.read_bytes()


CHECKPOINTS: dict[str, Callable[[dict, dict[str, torch.Tensor]], object]] = {
    "no step": lambda a, t: a.pop("step") and None,
    "step as text": lambda a, t: a.update(step="2"),
    "negative step": lambda a, t: a.update(step=-2),
    "true step": lambda a, t: a.update(step=True),
    "no settings": lambda a, t: a.pop("train") and None,
    "settings as a list": lambda a, t: a.update(train=[1]),
    "no shape": lambda a, t: a.pop("drafter") and None,
    "no target": lambda a, t: a.pop("target") and None,
    "another target": lambda a, t: a.update(target="a\nb"),
    "about a list": lambda a, t: "[1, 2]",
    "about nothing": lambda a, t: "null",
    "about cut": lambda a, t: '{"step": ',
    "about deep": lambda a, t: "[" * 50_000,
    "no weight": lambda a, t: t.pop("weights.fc.weight").sum() * 0 and None,
    "no moment": lambda a, t: t.pop("optimizer.0.exp_avg").sum() * 0 and None,
    "no moments": lambda a, t: [t.pop(name) for name in list(t) if name.startswith("optimizer")] and None,
    "moment of another shape": lambda a, t: t.update({"optimizer.0.exp_avg": torch.zeros(3)}),
    "moments with a name too many": lambda a, t: t.update({"optimizer.0.exp_avg.more": torch.zeros(3)}),
    "moments of a letter": lambda a, t: t.update({"optimizer.x.exp_avg": torch.zeros(3)}),
    "weight of another shape": lambda a, t: t.update({"weights.fc.weight": torch.zeros(3)}),
    "weight of half precision": lambda a, t: t.update({"weights.fc.weight": t["weights.fc.weight"].half()}),
    "weight that is no number": lambda a, t: t["weights.fc.weight"][0, :1].fill_(torch.nan).sum() * 0 and None,
    "negative second moment": lambda a, t: t["optimizer.0.exp_avg_sq"][0, :1].fill_(-1.0).sum() * 0 and None,
    "another draft vocabulary": lambda a, t: t["weights.d2t"].add_(1).sum() * 0 and None,
}


@pytest.mark.parametrize("change", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_training_checkpoint_of_another_layout_is_refused(
    trained: Path, tmp_path: Path, change: Callable[[dict, dict[str, torch.Tensor]], object]
) -> None:
    (tmp_path / trained.name).write_bytes(resaved(trained, change))
    refused(lambda: trainer(tmp_path), tmp_path / trained.name)


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_training_checkpoint_is_refused_or_finite(trained: Path, tmp_path: Path, marker: Path, seed: int) -> None:
    content, path = trained.read_bytes(), tmp_path / trained.name
    path.write_bytes(content[: random.Random(seed).randrange(len(content))] if seed % 2 else flipped(content, seed, 0, len(content)))
    found = outcome(lambda: trainer(tmp_path), path)
    assert found is None or (found.step == 2 and all(w.isfinite().all() for w in found.drafter.parameters()))
    list(PICKLES.values())[seed % len(PICKLES)](Bomb(marker), path)
    refused(lambda: trainer(tmp_path), path)
    path.unlink()
    (os.mkfifo, a_folder)[seed % 2](path)
    refused(lambda: trainer(tmp_path), path)
    assert not marker.exists()
