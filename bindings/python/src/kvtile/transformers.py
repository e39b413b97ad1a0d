"""A cache for Hugging Face transformers over kvtile, and attention that stays in it.

`TransformersCache` has the interface of transformers' `Cache` (of the versions with get_mask_sizes
and get_max_cache_shape), and is a subclass of it where transformers is installed. Two ways to use
it:

1. As any cache: past_key_values=TransformersCache.of_config(model.config, 8192) of model.generate.
   update() stores the step's keys and values quantized, and returns all of the layer, dequantized.
   Memory between steps is kvtile's, but each step of each layer writes K and V out once.

2. In place: TransformersCache.of_config(model.config, 8192, in_place=True), and the model's
   attention is `cache.attention`, with `cache.mask` for padded prompts:

       model.set_attn_implementation(cache.register())

   update() then returns what it was given, and the attention reads the codes where they are.

Tensors are PyTorch's, on the CPU, f32, f16 or bf16: [batch][heads][tokens][dims], read and written
without a copy. Each row of the batch is a `Sequence`; beams and repeated rows share their blocks.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Sequence as Seq, Set, Tuple, Union

import torch

from ._cache import Cache
from ._config import Group, Type, TypeLike
from ._errors import StateError
from ._sequence import Sequence

try:
    from transformers.cache_utils import Cache as _Base  # type: ignore
except ImportError:
    _Base = object


def groups_of_config(config: Any, k_type: TypeLike = Type.I8, v_type: TypeLike = Type.I8,
                     **options: Any) -> List[Group]:
    """The layer groups of a transformers config: full layers, and sliding ones with their window.

    options: of `Group`. ValueError: the config lacks its heads or dims.
    """
    get = getattr(config, "get_text_config", None)
    text = get(decoder=True) if get is not None else config
    n_heads = text.num_attention_heads
    n_kv_heads = getattr(text, "num_key_value_heads", None) or n_heads
    dims = getattr(text, "head_dim", None) or text.hidden_size // n_heads
    window = getattr(text, "sliding_window", None) or 0
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != text.num_hidden_layers:
        raise ValueError(f"layer_types: {len(kinds)} layers, of kinds that are neither full nor "
                         f"sliding: {sorted(unknown)}")
    groups = []
    for kind in ("full_attention", "sliding_attention"):
        layers = tuple(i for i, x in enumerate(kinds) if x == kind)
        if layers:
            groups.append(Group(
                n_layers=len(layers), n_q_heads=n_heads, n_kv_heads=n_kv_heads, k_dim=dims,
                k_type=k_type, v_type=v_type, layers=layers,
                window_tokens=window if kind == "sliding_attention" else 0, **options))
    return groups


class TransformersCache(_Base):  # type: ignore
    """See the head of this module.

    groups: of the model's layers (`groups_of_config`, or `of_config`)
    max_tokens: of a row
    in_place: update() returns what it was given; use `attention` or `attend`
    options: of `kvtile.Cache`

    A forward pass is a step: update() of layer after layer, each once. It is committed when the
    next one begins, or by the first call that needs its end (crop, reorder_cache, ...). A pass that
    did not reach all layers is StateError until `abort`; one that failed in its first is dropped.
    """

    def __init__(self, groups: Union[Group, Seq[Group]], max_tokens: int, *,
                 in_place: bool = False, **options: Any) -> None:
        # Not the base's: it makes layer objects, which kvtile has in their place.
        self.layers: List[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.in_place = in_place
        self.cache = Cache(groups, max_tokens, **options)
        self.sequences: List[Sequence] = []
        self._updated: Set[int] = set()
        self._windows: Dict[int, int] = {}
        at = 0
        for g in self.cache.groups:
            for x in g.layers if g.layers is not None else range(at, at + g.n_layers):
                self._windows[x] = g.window_tokens
            at += g.n_layers

    @classmethod
    def of_config(cls, config: Any, max_tokens: int, k_type: TypeLike = Type.I8,
                  v_type: TypeLike = Type.I8, *, in_place: bool = False,
                  **options: Any) -> "TransformersCache":
        """For a transformers config."""
        return cls(groups_of_config(config, k_type, v_type), max_tokens, in_place=in_place,
                   **options)

    # ---- steps ----

    def settle(self) -> None:
        """Commit the step, if there is one. StateError: not all layers have it."""
        if not self._updated:
            return
        if len(self._updated) < self.cache.n_layers:
            raise StateError(f"a forward pass reached {len(self._updated)} of "
                             f"{self.cache.n_layers} layers; abort() drops it")
        for s in self.sequences:
            if s.pending:  # a row may have it from a call that failed at a later one
                s.commit()
        self._updated.clear()

    def abort(self) -> None:
        """Drop the step of a forward pass that failed, in rows too that have committed it.

        StateError: a window has moved on in one of these. reset() then.
        """
        for s in self.sequences:
            s.abort()
        self._updated.clear()
        self._level()

    def _level(self) -> None:
        """All rows as short as the shortest one."""
        shortest = min((s.length for s in self.sequences), default=0)
        for s in self.sequences:
            if s.length > shortest:
                s.truncate(shortest)

    def _begin(self, n_rows: int, n_tokens: int) -> None:
        if self.sequences and len(self.sequences) != n_rows:
            raise ValueError(f"a batch of {n_rows}, the cache has {len(self.sequences)} rows")
        if len({s.length for s in self.sequences}) > 1:
            raise StateError("rows of different lengths, as a call has failed in some: crop(), or "
                             "reset()")
        is_first = not self.sequences
        try:
            while len(self.sequences) < n_rows:
                self.sequences.append(self.cache.sequence())
            for s in self.sequences:
                s.begin(n_tokens)
        except BaseException:
            self._drop(is_first)
            raise

    def _drop(self, is_first: bool) -> None:
        """The step, of which nothing is stored, as if it had never begun."""
        self.abort()
        if is_first:
            self.reset()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
               cache_kwargs: Optional[Dict[str, Any]] = None
               ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, [batch][n_kv_heads][tokens][dims].

        Returns K and V of all tokens of the layer (a sliding layer: of the window - 1 before the
        step's, and the step's), in the same dtype; in_place: key_states and value_states.

        The errors of `Sequence.begin` and `append`. cache_kwargs is not used.
        """
        if key_states.ndim != 4 or value_states.ndim != 4:
            raise ValueError("key_states and value_states: need [batch][heads][tokens][dims]")
        key_states, value_states = key_states.detach(), value_states.detach()
        n_rows, _, n_tokens, _ = key_states.shape
        if layer_idx in self._updated:
            self.settle()
        is_first = not self.sequences
        if not self._updated:
            self._begin(n_rows, n_tokens)
        if len(self.sequences) != n_rows:
            raise ValueError(f"a batch of {n_rows}, the step has {len(self.sequences)} rows")
        try:
            for i, s in enumerate(self.sequences):
                s.append(layer_idx, key_states[i].transpose(0, 1), value_states[i].transpose(0, 1))
        except BaseException:
            if not self._updated:
                self._drop(is_first)
            raise
        self._updated.add(layer_idx)
        if self.in_place:
            return key_states, value_states
        return self._contents(layer_idx, key_states.dtype, self.sequences[0].length)

    def _contents(self, layer: int, dtype: torch.dtype, seen_from: int
                  ) -> Tuple[torch.Tensor, torch.Tensor]:
        """K and V of the layer, of a sliding one what a query at index seen_from or later sees."""
        end = self._end(layer)
        window = self._windows[layer]
        first = max(seen_from - window + 1, 0) if window else 0
        _, n_heads, k_dim, v_dim, _ = self.cache._layers[layer]
        n_rows, n = len(self.sequences), end - first
        keys = torch.empty((n_rows, n_heads, n, k_dim), dtype=dtype)
        values = torch.empty((n_rows, n_heads, n, v_dim), dtype=dtype)
        if n:
            for i, s in enumerate(self.sequences):
                s.keys(layer, first, n, out=keys[i].transpose(0, 1))
                s.values(layer, first, n, out=values[i].transpose(0, 1))
        return keys, values

    def _end(self, layer: int) -> int:
        if not self.sequences:
            return 0
        s = self.sequences[0]
        return s.length + (s.pending if layer in self._updated else 0)

    # ---- attention in place ----

    def attend(self, query: torch.Tensor, layer_idx: int, *, scaling: Optional[float] = None,
               attention_mask: Optional[torch.Tensor] = None, causal: bool = True,
               query_positions: Optional[Seq[Any]] = None, **options: Any) -> torch.Tensor:
        """Attention over the layer where it is: [batch][n_q_heads][queries][dims] in,
        [batch][queries][n_q_heads][dims] out, as transformers' attention functions give it.

        attention_mask: [batch or 1][1][queries][tokens], bool (True: seen) or additive (0: seen,
        -1e4 or less: not seen); replaces the causal rule. ValueError: another bias.
        query_positions: one for each row (None: none), as in `Cache.attend`
        options: precision, softcap, sink_logits and alibi_slopes of `Cache.attend`
        """
        unknown = set(options) - {"precision", "softcap", "sink_logits", "alibi_slopes"}
        if unknown:
            raise TypeError(f"attend: {', '.join(sorted(unknown))}")
        if query_positions is not None and len(query_positions) != len(self.sequences):
            raise ValueError(f"query_positions: {len(query_positions)} for {len(self.sequences)} "
                             "rows")
        if query.ndim != 4 or query.shape[0] != len(self.sequences):
            raise ValueError(f"query: shape {tuple(query.shape)}, needs {len(self.sequences)} rows "
                             "of [heads][queries][dims]")
        query = query.detach()
        n_rows, n_heads, n, _ = query.shape
        dims = self.cache._layer(layer_idx)[3]
        masks = None
        if attention_mask is not None:
            masks = self._masks(attention_mask, layer_idx, n_rows, n)
        out = torch.empty((n_rows, n, n_heads, dims), dtype=query.dtype)
        if n == 1:  # one call, in which rows with common blocks read them together
            self.cache.attend(layer_idx, self.sequences, query[:, :, 0], out[:, 0], causal=causal,
                              scale=scaling or 0.0, masks=masks,
                              query_positions=query_positions, **options)
            return out
        for i, s in enumerate(self.sequences):
            s.attend(layer_idx, query[i].transpose(0, 1), out[i], causal=causal,
                     scale=scaling or 0.0, mask=None if masks is None else masks[i],
                     query_positions=None if query_positions is None else query_positions[i],
                     **options)
        return out

    def _masks(self, mask: torch.Tensor, layer: int, n_rows: int, n: int) -> List[Any]:
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, n_rows) \
                or mask.shape[2] < n:
            raise ValueError(f"attention_mask: shape {tuple(mask.shape)}, needs "
                             f"({n_rows} or 1, 1, {n}, tokens)")
        end = self._end(layer)
        mask = mask[:, 0, :n, :]
        if mask.dtype != torch.bool:
            seen = mask == 0
            if not bool((seen | (mask <= -1e4)).all()):
                raise ValueError("attention_mask: a bias other than 0 and -1e4 or less")
            mask = seen
        if mask.shape[2] > end:  # transformers may pad to the cache's maximum
            if self._windows[layer]:
                raise ValueError(f"attention_mask: {mask.shape[2]} tokens, the layer has {end}")
            mask = mask[:, :, :end]
        # A mask of the last tokens: kvtile shows all that are before it, which here is none but
        # those that a window hides.
        if not self._windows[layer] and mask.shape[2] < end:
            raise ValueError(f"attention_mask: {mask.shape[2]} tokens, the layer has {end}")
        return [mask[i if mask.shape[0] > 1 else 0].numpy() for i in range(n_rows)]

    def attention(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  attention_mask: Optional[torch.Tensor] = None, scaling: Optional[float] = None,
                  dropout: float = 0.0, **kwargs: Any) -> Tuple[torch.Tensor, None]:
        """An attention function of transformers (AttentionInterface) over this cache.

        module.layer_idx names the layer; key and value are in the cache already and not used.
        softcap and s_aux (the heads' sinks) of kwargs are applied. ValueError: dropout, a head
        mask, or a sliding window that the layer's group does not have.
        """
        if dropout:
            raise ValueError("attention in the cache has no dropout")
        if kwargs.get("head_mask") is not None or kwargs.get("output_attentions"):
            raise ValueError("attention in the cache gives no weights and takes no head mask")
        window, own = kwargs.get("sliding_window"), self._windows.get(module.layer_idx, 0)
        if window and window != own:
            raise ValueError(f"layer {module.layer_idx} has a window of {window} tokens, "
                             f"its group in the cache {own or 'none'}")
        sinks = kwargs.get("s_aux")
        if sinks is not None:
            sinks = sinks.detach().to(torch.float32).flatten().numpy()
        out = self.attend(query, module.layer_idx, scaling=scaling, attention_mask=attention_mask,
                          causal=kwargs.get("is_causal") is not False,
                          softcap=kwargs.get("softcap") or 0.0, sink_logits=sinks)
        return out, None

    @staticmethod
    def mask(*args: Any, attention_mask: Optional[torch.Tensor] = None,
             allow_is_causal_skip: bool = True, **kwargs: Any) -> Optional[torch.Tensor]:
        """A mask function of transformers (AttentionMaskInterface): transformers' bool masks, and
        None where all is causal and nothing padding, as attention then needs none. Without one
        transformers makes no masks, and padding would be attended to.
        """
        if allow_is_causal_skip and (attention_mask is None or bool(attention_mask.all())):
            return None
        from transformers.masking_utils import sdpa_mask  # type: ignore
        return sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=False,
                         **kwargs)

    def register(self, name: str = "kvtile") -> str:
        """Register `attention` and `mask` with transformers. The name, for
        model.set_attn_implementation; a later cache takes it over.
        """
        from transformers import AttentionInterface  # type: ignore
        from transformers.masking_utils import AttentionMaskInterface  # type: ignore
        AttentionInterface.register(name, self.attention)
        AttentionMaskInterface.register(name, self.mask)
        return name

    # ---- the rest of transformers' interface ----

    def get_seq_length(self, layer_idx: Optional[int] = 0) -> int:
        """Tokens of a layer, those of the step included that it has already."""
        return self._end(layer_idx or 0)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The window of a sliding layer, else max_tokens."""
        return self._windows.get(layer_idx, 0) or self.cache.max_tokens

    def get_max_length(self) -> int:
        return self.cache.max_tokens

    def get_usable_length(self, new_seq_length: int, layer_idx: Optional[int] = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, cache_position: Union[torch.Tensor, int], layer_idx: int = 0
                       ) -> Tuple[int, int]:
        """(length, offset) of K and V that update() will return for the layer."""
        n = cache_position if isinstance(cache_position, int) else cache_position.shape[0]
        end = self.sequences[0].length + self.sequences[0].pending if self.sequences else 0
        if self._updated and len(self._updated) < self.cache.n_layers:
            end = self.sequences[0].length  # the step is this forward pass's
        window = self._windows.get(layer_idx, 0)
        first = max(end - window + 1, 0) if window else 0
        return end - first + n, first

    def crop(self, max_length: int) -> None:
        """Shorten to max_length tokens; negative: by so many. StateError: a window has gone on."""
        self.settle()
        length = max((s.length for s in self.sequences), default=0)
        target = max(length + max_length, 0) if max_length < 0 else max_length
        cut = [s for s in self.sequences if s.length > target]
        if any(s.reachable(target) != target for s in cut):
            raise StateError(f"a window has released what {target} tokens need")
        for s in cut:
            s.truncate(target)

    def _pick(self, indices: Any) -> None:
        """Rows become the rows of indices: forks of them."""
        self.settle()
        picked = [int(i) for i in indices]
        old = self.sequences
        new: List[Sequence] = []
        try:
            for i in picked:
                new.append(old[i].fork())
        except BaseException:
            for s in new:
                s.close()
            raise
        self.sequences = new
        for s in old:
            s.close()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows become those of beam_idx: [batch]. No keys and values are copied."""
        if self.sequences:
            self._pick(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch (numbers, or bools)."""
        if self.sequences:
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times; they share their blocks."""
        if self.sequences:
            self._pick([i for i in range(len(self.sequences)) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget all tokens."""
        for s in self.sequences:
            s.close()
        self.sequences = []
        self._updated.clear()

    def close(self) -> None:
        """Release the memory."""
        self.cache.close()
        self.sequences = []
        self._updated.clear()

    @property
    def max_batch_size(self) -> int:
        return len(self.sequences)

    @property
    def max_cache_len(self) -> int:
        return self.cache.max_tokens

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.sequences)

    @property
    def is_sliding(self) -> List[bool]:
        return [bool(self._windows[i]) for i in range(self.cache.n_layers)]

    @property
    def seen_tokens(self) -> int:
        return self.get_seq_length()

    def __len__(self) -> int:
        return self.cache.n_layers

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, layer_idx: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, dequantized to f32."""
        if not 0 <= layer_idx < self.cache.n_layers:
            raise IndexError(f"layer {layer_idx} of {self.cache.n_layers}")
        return self._contents(layer_idx, torch.float32, self._end(layer_idx))

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for i in range(self.cache.n_layers):
            yield self[i]

    def to_legacy_cache(self) -> Tuple[Tuple[torch.Tensor, torch.Tensor], ...]:
        """A tuple of (K, V) of each layer."""
        return tuple(self)

    def __repr__(self) -> str:
        return f"TransformersCache({self.cache!r}, {len(self.sequences)} rows)"
