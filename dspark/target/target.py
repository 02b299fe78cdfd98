"""Any causal LM as a target: encode prompts for it, run it with a rewindable cache, read its hidden states (taps)."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dspark.files import one_line, weights_digest
from dspark.rewind import GrowingKV, RewindCache
from dspark.target import families
from dspark.target.prompt import Prompt, checked
from dspark.target.states import StateCache
from dspark.target.stream import TextStream


class Target:
    """The full model M_t: frozen, never changed, run through :meth:`forward`.

    model: a causal LM of transformers; one wrapped by torch.compile or for parallel training is unwrapped.
    tokenizer: None if prompts are token ids.
    name: used in messages and files.
    Raises ValueError, before anything is frozen, for a model that cannot be a target (:func:`dspark.target.families.checked_layers`).
    """

    def __init__(self, model: nn.Module, tokenizer: object | None, name: str) -> None:
        model = families.unwrapped(model)
        self.layers = families.checked_layers(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.template_kwargs: dict[str, object] = {}  # arguments of the chat template, for every prompt
        self.verifier: Any = getattr(model, "dspark_pass", None)  # a faster TargetPass, set by dspark.cpu; None for its own modules
        self.config = model.config.get_text_config()
        self.cache_argument = families.cache_argument(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.head_weight: Tensor = model.get_output_embeddings().weight  # [vocab, hidden]
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = self.head_weight.shape[0]
        self.num_layers: int = len(self.layers)
        # Last layers without keys and values of their own: they read those of earlier layers (Gemma 3n and 4).
        self.num_shared_layers: int = getattr(self.config, "num_kv_shared_layers", None) or 0
        self.steady_context: int = families.steady_context(self.config)  # tokens

    @property
    def max_context(self) -> int:
        """Longest context in tokens: the config's maximum, or :attr:`steady_context` if that is less."""
        return min(int(getattr(self.config, "max_position_embeddings", None) or families.NO_LIMIT), self.steady_context)

    @property
    def pass_name(self) -> str:
        """Which pass runs: "lean", "compiled", on a GPU "graphs", or "transformers" for the model's own modules."""
        return self.verifier.name if self.verifier else "transformers"

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> nn.Module:
        """token ids [...] → [..., hidden]."""
        return self.model.get_input_embeddings()

    @property
    def decoder(self) -> nn.Module:
        """token ids [batch, tokens] → an output whose ``last_hidden_state`` [batch, tokens, hidden] the head reads."""
        return families.decoder_of(self.model)

    @property
    def head(self) -> nn.Module:
        """hidden [..., hidden] → logits [..., vocab]."""
        return self.model.get_output_embeddings()

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends the text: the generation config's list, else the model config's."""
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        eos = self.config.eos_token_id if eos is None else eos
        return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)

    @cached_property
    def digest(self) -> str:
        """Of the weights. A model whose weights were laid out for a CPU keeps that of the plain ones as ``weight_digest``."""
        return getattr(self.model, "weight_digest", None) or weights_digest(self.model)

    @cached_property
    def cache_bytes(self) -> tuple[int, int]:
        """Bytes of a token's keys and values and of a text's states, all layers together: found by a pass over one token."""
        cache = self.new_cache()
        self.forward(torch.zeros(1, 1, dtype=torch.int64, device=self.device), cache)
        sides = [side for layer in cache.layers if isinstance(layer, GrowingKV) for side in layer.view()]
        kept = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, dict)]
        states = [x for state in kept for x in state.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in sides), sum(x.nbytes for x in states)

    def new_cache(self) -> RewindCache:
        return StateCache(self.config) if families.keeps_states(self.config) else RewindCache(self.num_layers - self.num_shared_layers)

    def encode(self, prompt: Prompt, **template: object) -> list[int]:
        """A string (as one user turn), chat messages, or token ids, as a tensor or a tokenizer's encoding too → token ids.

        template: arguments of the chat template, such as ``enable_thinking=False``, besides :attr:`template_kwargs`.
        Raises ValueError for an empty prompt, ids outside the vocabulary, and prompts longer than :attr:`max_context`.
        """
        if self.model.training:
            raise ValueError(f"{self.name} is in training mode, where dropout changes the distribution: call model.eval() first")
        prompt = checked(prompt)
        ids = self._apply_template(prompt, template) if isinstance(prompt[0], Mapping) else prompt
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}: encode the text with its tokenizer")
        if len(ids) >= self.max_context:
            raise ValueError(f"the prompt has {len(ids)} tokens but {self.name} takes at most {self.max_context}: shorten it")
        return ids

    def _apply_template(self, messages: list[dict[str, str]], template: Mapping[str, object]) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("this target has no tokenizer: pass token ids instead of text")
        template = {"add_generation_prompt": True} | self.template_kwargs | template
        try:
            if getattr(self.tokenizer, "chat_template", None):
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, **template)
                return self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return self.tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
        except Exception as error:  # whatever a template raises
            raise ValueError(f"{self.name} cannot encode this prompt: {type(error).__name__}: {one_line(error)}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Token ids → text, special tokens left out. Without a tokenizer: the ids, separated by spaces."""
        if self.tokenizer is None:
            return " ".join(map(str, token_ids))
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """For text that is shown while it is being decoded."""
        return TextStream(self.decode)

    def check_taps(self, target_layer_ids: Sequence[int]) -> None:
        """Raises ValueError unless each id lies in −1 … layers − 2. The last layer is no tap: it is returned after the final norm."""
        wrong = [i for i in target_layer_ids if not -1 <= i < self.num_layers - 1]
        if wrong or not target_layer_ids:
            raise ValueError(
                f"target_layer_ids {list(target_layer_ids)}: {self.name} has {self.num_layers} layers, "
                f"so taps are −1 (embedding) to {self.num_layers - 2} (the last layer is not a legal tap)"
            )

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, cache: RewindCache | None, taps: Sequence[int] = (), *, logits_to_keep: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model over new tokens, which follow those in the cache.

        token_ids: [batch, tokens] int64.
        taps: m ids of layers; of each the residual stream AFTER it is returned, for −1 the embedding.
        logits_to_keep: return the logits of the last n positions only; 0 for all.
        Returns logits [batch, n, vocab] in the model's dtype and taps [batch, tokens, m·hidden] (None if none are asked for).
        """
        new, given = token_ids.shape[1], {"use_cache": cache is not None, self.cache_argument: cache}
        ids, keep = token_ids, logits_to_keep or new
        if isinstance(cache, StateCache):
            if new and cache.length - cache.reached > cache.most_replayed:
                self.forward(token_ids[:, :0], cache, logits_to_keep=1)
            ids = cache.advance(token_ids)
            if self.takes_positions:  # Bamba counts from 0 in every pass
                given["position_ids"] = torch.arange(cache.length - ids.shape[1], cache.length, device=ids.device)[None]
        # For layers that read the keys of others a number would also cut the tokens that they see.
        given["logits_to_keep"] = torch.arange(-keep, 0, device=ids.device) if self.num_shared_layers and taps else keep
        with Taps(self, taps) as tapped:
            # forward, because a model that was compiled in place would not call the hooks of its layers
            out = self.model.forward(input_ids=ids, **given)
        logits = out.logits[:, -keep:]  # a few models ignore logits_to_keep and return all
        return logits.to(ids.device), tapped.joined(new)  # a model may be split over devices


class Taps(ExitStack):
    """A ``with`` block that records what the chosen layers output; :meth:`joined` concatenates it in the order of ``layer_ids``.

    It records passes of its own thread only: other threads may run the same model at the same time.
    """

    def __init__(self, target: Target, layer_ids: Sequence[int]) -> None:
        super().__init__()
        self.target, self.layer_ids, self.thread = target, tuple(layer_ids), threading.get_ident()
        self.outputs: dict[int, Tensor] = {}
        for i in self.layer_ids:
            module = target.embedding if i == -1 else target.layers[i]
            self.callback(module.register_forward_hook(lambda _m, _in, out, i=i: self._keep(i, out)).remove)

    def _keep(self, layer_id: int, out: Tensor | tuple[Tensor, ...]) -> None:
        if threading.get_ident() != self.thread:
            return
        hidden = out if isinstance(out, Tensor) else out[0]
        if hidden.dim() == 4:  # Gemma 3n carries several streams, one of which is the residual stream
            hidden = hidden[self.target.config.altup_active_idx]
        self.outputs[layer_id] = hidden

    def joined(self, last: int = 0) -> Tensor | None:
        """[batch, tokens, m·hidden] of the last pass, of its last tokens only if a number is given; None without layers."""
        return torch.cat([self.outputs[i][:, -last:].to(self.target.device) for i in self.layer_ids], dim=-1) if self.layer_ids else None
