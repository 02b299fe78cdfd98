"""A notebook run inside the test process, as papermill would: no kernel to start, no module to import again."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbformat.v4 import output_from_msg
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook


def message(kind: str, content: dict[str, object]) -> nbformat.NotebookNode:
    """An output cell of what a kernel would have sent."""
    return output_from_msg({"header": {"msg_type": kind}, "content": content})


def execute(notebook: Path, parameters: Mapping[str, object], executed: Path | None = None) -> nbformat.NotebookNode:
    """The notebook with these parameters and its outputs, also written to ``executed``. Raises what a cell raises."""
    result = parameterize_notebook(load_notebook_node(str(notebook)), dict(parameters))
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    values: list[tuple[dict, dict]] = []
    shell.displayhook.write_output_prompt = lambda: None
    shell.displayhook.write_format_data = lambda data, metadata=None: values.append((data, metadata or {}))
    try:
        for number, cell in enumerate((cell for cell in result.cells if cell.cell_type == "code"), 1):
            values.clear()
            with capture_output() as got:
                ran = shell.run_cell(cell.source, store_history=True)
            ran.raise_error()
            shown = [("display_data", output.data, output.metadata or {}) for output in got.outputs]
            shown += [("execute_result", data, metadata) for data, metadata in values]
            cell.outputs = [message("stream", {"name": "stdout", "text": got.stdout})] if got.stdout else []
            counted = {"execution_count": number}
            cell.outputs += [message(kind, counted | {"data": encoded(data), "metadata": about}) for kind, data, about in shown]
    finally:
        InteractiveShell.clear_instance()
        if executed:
            nbformat.write(result, executed)
    return result


def encoded(data: Mapping[str, object]) -> dict[str, object]:
    """As in a message: base64 for bytes."""
    return {kind: b64encode(value).decode() if isinstance(value, bytes) else value for kind, value in data.items()}


def run(notebook: Path, executed: Path, parameters: Mapping[str, object], *, progress: bool = True) -> dict[str, object]:
    """In place of :func:`dspark.lab.demo.run`."""
    executed.parent.mkdir(parents=True, exist_ok=True)
    saved = executed.with_suffix(".json")
    saved.unlink(missing_ok=True)
    try:
        execute(notebook, {**parameters, "out": str(saved)}, executed)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return json.loads(saved.read_text(encoding="utf-8"))


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that the cells printed."""
    return "".join(out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "stream")


def figures(notebook: nbformat.NotebookNode) -> list[dict[str, object]]:
    """The outputs that hold a picture which every page can show: PNG, SVG, or HTML with SVG in it."""
    shown = [out.data for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    return [d for d in shown if {"image/png", "image/svg+xml"} & d.keys() or "<svg" in d.get("text/html", "")]
