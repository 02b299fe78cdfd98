"""Shared by all tests: helpers in this folder are importable, and one thread is enough for tiny models."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
