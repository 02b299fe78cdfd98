"""GGUF, what llama.cpp and everything built on it reads: a drafter for its DSpark drafting, and a target in bfloat16."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.files import cache_dir, one_line, write_atomically
from dspark.formats.build import foreign, refuse_unwritten, weights_of
from dspark.formats.fetch import DEFAULT, check_header, fetch_gguf
from dspark.target.target import Target

ARCHITECTURE = "dflash"  # llama.cpp's name for the block-parallel backbone; the tensors of a Markov head make it DSpark
NAMES = {  # our name → llama.cpp's, where its library knows no name for it
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
}


def export_gguf(drafter: Drafter, target: Target, path: str | Path, target_gguf: str | Path) -> None:
    """Write a drafter as one bfloat16 GGUF file, whole or not at all; ``llama-server -md`` takes it.

    target_gguf: the target as GGUF, in any quantisation; its tokenizer is copied, which llama.cpp compares with the target's own.
    Calibration is left out: llama.cpp has no place for it, and reads the confidence only where a minimum is asked for.
    Raises ValueError, naming the field, for a drafter that llama.cpp would compute as another one, and for another target's file.
    """
    shape = drafter.config
    refuse_unwritten(drafter, "llama.cpp's layout", target, **({"markov_head_type": "vanilla"} if shape.markov_rank else {}))
    reader = _read(target_gguf)
    _check_target(reader, target, target_gguf)
    weights = weights_of(drafter)
    if drafter.confidence_head and not drafter.confidence_head.with_markov:  # llama.cpp's head always reads the token before
        head = weights["confidence_head.proj.weight"]
        weights["confidence_head.proj.weight"] = torch.cat([head, head.new_zeros(1, shape.markov_rank)], 1)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(shape.num_hidden_layers)
        writer.add_context_length(target.max_context)
        writer.add_vocab_size(shape.vocab_size)
        writer.add_embedding_length(shape.hidden_size)
        writer.add_feed_forward_length(shape.intermediate_size)
        writer.add_head_count(shape.num_attention_heads)
        writer.add_head_count_kv(shape.num_key_value_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
        writer.add_rope_freq_base(shape.rope_theta)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_causal_attention(False)
        writer.add_uint32(f"{ARCHITECTURE}.block_size", shape.block_size)
        writer.add_array(f"{ARCHITECTURE}.target_layers", [i + 1 for i in shape.target_layer_ids])  # it taps what goes into a layer
        writer.add_bool(f"{ARCHITECTURE}.sample_from_anchor", True)
        writer.add_bool(f"{ARCHITECTURE}.has_confidence_head", shape.enable_confidence_head)
        _copy_fields(reader, writer, "tokenizer.", without=(gguf.Keys.Tokenizer.MASK_ID,))
        writer.add_mask_token_id(shape.mask_token_id)
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, shape.num_hidden_layers)  # whose layers are ours
        for name, weight in weights.items():
            _add(writer, NAMES.get(name) or known.get_name(name, (".weight",)), weight, wide=name.startswith("confidence_head"))
        if shape.draft_vocab_size < shape.vocab_size:
            writer.add_tensor("d2t", drafter.d2t.cpu().numpy())
            _add(writer, "output.weight", drafter.head_weight)

    _write(path, ARCHITECTURE, fill)


def export_target(source: str | Path, path: str | Path) -> None:
    """Write a target's GGUF file again with its tensors in bfloat16, whole or not at all; metadata and order of rows stay.
    Vectors stay float32, as llama.cpp has them. Raises ValueError for a damaged source."""
    reader, general = _read(source), gguf.Keys.General

    def fill(writer: gguf.GGUFWriter) -> None:
        _copy_fields(reader, writer, without=(general.ARCHITECTURE, general.FILE_TYPE))
        for tensor in reader.tensors:
            _add(writer, tensor.name, _plain(tensor.data, tensor.tensor_type))

    _write(path, reader.get_field(general.ARCHITECTURE).contents(), fill)


def default_target_gguf() -> Path:
    """The bundled default target in bfloat16, in the user's cache; fetched and written at the first call (271 MB)."""
    path = DEFAULT.cached.with_name(f"{DEFAULT.cached.name}-bf16.gguf")
    if not path.is_file():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            export_target(fetch_gguf(DEFAULT, Path(scratch)), path)
    return path


def _read(path: str | Path) -> gguf.GGUFReader:
    path = Path(path)
    try:
        with path.open("rb") as file:
            check_header(file)
        return gguf.GGUFReader(path)
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}. Pass the target's GGUF file") from error


def _check_target(reader: gguf.GGUFReader, target: Target, path: str | Path) -> None:
    """Raises ValueError unless the file's embedding is the target's, but for quantisation."""
    mine, found = target.embedding.weight, next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    rows = slice(None, None, max(1, len(mine) // 256))
    fits = found is not None and found.shape.tolist() == [*reversed(mine.shape)]
    if not fits or foreign(_plain(found.data[rows], found.tensor_type), mine[rows]):
        raise ValueError(f"{path} does not hold {target.name}, {list(mine.shape)}: pass the GGUF file of the drafter's target")


def _plain(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> Tensor:
    """float32 values of stored ones."""
    return torch.from_numpy(np.array(gguf.dequantize(data, kind), dtype=np.float32))


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, prefix: str = "", without: tuple[str, ...] = ()) -> None:
    for name, field in reader.fields.items():
        if name.startswith(prefix) and not name.startswith("GGUF.") and name not in without:
            kind, *of = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=of[-1] if of else None)


def _add(writer: gguf.GGUFWriter, name: str, weight: Tensor, *, wide: bool = False) -> None:
    """Matrices as bfloat16, vectors (and ``wide`` ones) as float32: llama.cpp's own rule."""
    if wide or weight.dim() == 1:
        writer.add_tensor(name, weight.detach().cpu().float().numpy())
        return
    bits = weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)


def _write(path: str | Path, architecture: str, fill: Callable[[gguf.GGUFWriter], None]) -> None:
    def write(part: Path) -> None:
        writer = gguf.GGUFWriter(part, architecture)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)
