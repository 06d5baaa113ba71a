"""A cache's content as a value: taken from a cache, put into one, written to a file and read from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .cache import LinmuCacheLayer, LinmuMixerLayer, TakesBack, copied, linear_layer
from .config import read_linmu
from .rewind import Record
from .words import shown

FORMAT, VERSION = "linmu-state", 1
_SUM = "checksum"  # of the header, in the file
_BEHIND = "behind."  # before the names of inputs that are read again first
_SAMPLES = 16  # values of each weight that tell models apart
# What a layer of the cache holds, by its class; those of attention differ in how they are filled.
_KINDS: dict[type, str] = {
    LinmuCacheLayer: "block",
    LinmuMixerLayer: "mixer",
    LinearAttentionLayer: "mixer",
    DynamicLayer: "keys",
    StaticLayer: "keys",
    DynamicSlidingWindowLayer: "last keys",
    StaticSlidingWindowLayer: "static last keys",
}
# Of a configuration, what changes no state: how it was made or saved, and how a model is run.
_NOT_OF_THE_MODEL = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache"}


@dataclasses.dataclass(frozen=True)
class LayerValue:
    """What one layer of a cache holds.

    Attributes:
        kind: "block" (an M-MATE block's state), "mixer" (a state of transformers' own), "keys", "last keys" or "static
            last keys" (attention).
        tokens: how many it has seen.
        tensors: none before the first token. `behind.` stands before the names of inputs that are read again, on the
            state of the other tensors, before the next token.
    """

    kind: str
    tokens: int
    tensors: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class CacheSnapshot:
    """What a cache held when `cache.snapshot()` took it. Nothing that the cache does later changes it.

    Attributes:
        layers: one `LayerValue` for each decoder layer.
        more: tensors that a user adds with `dataclasses.replace`, such as the ids; a file keeps them.
        notes: what a user adds that JSON can hold; a file keeps it.
    """

    layers: tuple[LayerValue, ...]
    more: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    notes: Any = None

    @property
    def tokens(self) -> int:
        """How many tokens the cache had seen, padding included."""
        return max((layer.tokens for layer in self.layers), default=0)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors.values())

    def save(self, path: str | os.PathLike[str], model: Any) -> None:
        """Write it to a file of safetensors, all or nothing.

        Args:
            path: of the file; one that is there is replaced.
            model: whose cache it is. The file names it, so that no other model goes on from there.

        Raises:
            OSError: the file cannot be written. ValueError: there is something else of that name, as a folder.
        """
        target = Path(_file_name("save", path))
        check_folder(target)
        layers, tensors = [], dict[str, Tensor]()
        for index, layer in enumerate(self.layers):
            mine = {f"{index}.{name}": t.contiguous().cpu() for name, t in layer.tensors.items()}
            sums = {name.partition(".")[2]: _checksum(t) for name, t in mine.items()}
            layers.append({"kind": layer.kind, "tokens": layer.tokens, "tensors": sums})
            tensors |= mine
        more = {f"more.{name}": t.contiguous().cpu() for name, t in self.more.items()}
        added = {"more": {name: _checksum(t) for name, t in more.items()}, "notes": self.notes}
        tensors |= more
        header = json.dumps({"version": VERSION, "model": _identity(model), "layers": layers, **added}, sort_keys=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        temporary.touch(exist_ok=False)
        try:
            save_file(tensors, temporary, metadata={FORMAT: header, _SUM: _header_sum(header)})
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, SafetensorError):  # as safetensors tells of a full disk
                raise OSError(f"{target} could not be written: {error}") from error
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> CacheSnapshot:
        """Read a file of `save`.

        Args:
            path: of the file.
            model: that goes on from there; it must be the one whose cache was saved.

        Raises:
            ValueError: the file is damaged, of no cache, of another version, or of another model: its class, dtype,
                configuration or weights differ. OSError: it cannot be read.
        """
        if not hasattr(model, "linmu_layers"):
            raise TypeError(f"load: model must be a LinMU model, got {type(model).__name__}")
        where = f"load: {shown(_file_name('load', path))}"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        except SafetensorError as error:
            raise ValueError(f"{where} must be a whole file of a cache, got a damaged one ({error})") from error
        if FORMAT not in metadata:
            raise ValueError(f"{where} must be a file that cache.save wrote, got other safetensors")
        header = _parsed(where, metadata)
        for name, own in _identity(model).items():
            theirs = header["model"].get(name)
            if theirs != own:
                must = f"{own}, got {theirs}" if name in _READ else "the model's own, got others"
                raise ValueError(f"{where} must be of the same model: its {name} must be {must}")
        layers = []
        for index, layer in enumerate(header["layers"]):
            mine: dict[str, Tensor] = {}
            for name, checksum in layer["tensors"].items():
                tensor = tensors.pop(f"{index}.{name}", None)
                if tensor is None or _checksum(tensor) != checksum:
                    raise ValueError(f"{where} is damaged: {name} of layer {index} is not what was saved")
                mine[name] = tensor
            layers.append(LayerValue(layer["kind"], layer["tokens"], mine))
        more: dict[str, Tensor] = {}
        for name, checksum in header["more"].items():
            tensor = tensors.pop(name, None)
            if tensor is None or _checksum(tensor) != checksum:
                raise ValueError(f"{where} is damaged: {name} is not what was saved")
            more[name.removeprefix("more.")] = tensor
        if tensors:
            raise ValueError(f"{where} is damaged: its header does not name {next(iter(tensors))}")
        return cls(tuple(_placed(where, layers, model)), more, header["notes"])


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise where `CacheSnapshot.save` would: OSError where no file can be made there, ValueError where there is
    something else of that name."""
    folder = Path(_file_name("save", path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"save: path must be in a folder that exists, got {os.fspath(path)}")
    with tempfile.TemporaryFile(dir=folder):
        pass


def _file_name(op: str, path: str | os.PathLike[str]) -> str:
    """Of a file that is there, or may be made; a folder, a pipe or a device is neither."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{op}: path must be of a file, got {path!r}")
    name = os.fspath(path)
    if not name or "\0" in name:
        raise ValueError(f"{op}: path must be of a file, got {name!r}")
    if os.path.isdir(name):
        what = "a folder"
    elif os.path.islink(name) and not os.path.exists(name):
        what = "a link that leads nowhere"
    elif os.path.exists(name) and not os.path.isfile(name):
        what = "what is no regular file"
    else:
        return name
    raise ValueError(f"{op}: {name} must be a file that cache.save wrote, got {what}")


def snapshot_of(cache: Cache) -> CacheSnapshot:
    """A copy of all that the cache holds.

    Raises:
        ValueError: it holds rows of several sequences, or a layer that is not copied: quantised keys, for one.
    """
    return CacheSnapshot(tuple(_value_of(index, layer) for index, layer in enumerate(cache.layers)))


def restore_to(cache: Cache, snapshot: CacheSnapshot) -> None:
    """Make a cache hold what the snapshot has. A static cache keeps its addresses.

    Raises:
        ValueError: they are not of the same model, or of other sizes; the cache is then as it was.
    """
    if not isinstance(snapshot, CacheSnapshot):
        raise TypeError(f"restore: snapshot must be a CacheSnapshot, got {type(snapshot).__name__}")
    while cache.layer_class_to_replicate is not None and len(cache.layers) < len(snapshot.layers):
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) != len(snapshot.layers):
        raise ValueError(f"restore: snapshot must have {len(cache.layers)} layers, got {len(snapshot.layers)}")
    for index, (layer, value) in enumerate(zip(cache.layers, snapshot.layers, strict=True)):
        _check(index, layer, value)
    beside = any("keys" in value.kind for value in snapshot.layers)
    for index, value in enumerate(snapshot.layers):
        _put(linear_layer(cache, index, beside) if value.kind == "block" else cache.layers[index], value)


def _value_of(index: int, layer: Any) -> LayerValue:
    kind = _kind(index, layer)
    if kind == "block" and layer.packed:
        raise ValueError(
            "snapshot: a cache must not hold rows of several sequences, which cannot go on, got one that does"
        )
    if isinstance(layer, LinmuCacheLayer | LinmuMixerLayer):
        record, tokens = layer.record, int(layer.get_seq_length()) if isinstance(layer, LinmuCacheLayer) else 0
        if record is None or not record.behind:
            return LayerValue(kind, tokens, layer.value())
        behind = {f"{_BEHIND}{name}": copied(t) for name, t in record.calls[0].items()}
        return LayerValue(kind, tokens, {**{name: copied(t) for name, t in record.base.items()}, **behind})
    if kind == "mixer":
        return LayerValue(kind, 0, LinmuMixerLayer.of(layer).value())
    tokens = int(layer.get_seq_length())
    if not layer.is_initialized:
        return LayerValue(kind, 0, {})
    held = {"keys": layer.keys, "values": layer.values}
    if kind == "keys":
        held = {name: t[:, :, :tokens] for name, t in held.items()}
    return LayerValue(kind, tokens, {name: copied(t) for name, t in held.items()})


def _kind(index: int, layer: Any) -> str:
    if type(layer) not in _KINDS:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        raise ValueError(f"snapshot: layers must be of {known}, got a {type(layer).__name__} at {index}")
    return _KINDS[type(layer)]


def _check(index: int, layer: Any, value: LayerValue) -> None:
    """Raise ValueError where the layer cannot hold the value."""
    kind = _kind(index, layer)
    # A block's takes the place of a new one of attention.
    empty = "keys" in kind and not (layer.is_initialized and int(layer.get_seq_length()))
    if kind != value.kind and not (value.kind == "block" and empty):
        raise ValueError(f"restore: layer {index} of the snapshot must be of kind {kind!r}, got {value.kind!r}")
    if kind == "mixer":
        known = {f"{name}.{i}" for name in ("conv", "recurrent") for i in range(layer.number_of_states)}
        if odd := [name for name in value.tensors if name not in known and not name.startswith(_BEHIND)]:
            raise ValueError(f"restore: layer {index} of the snapshot must have states {sorted(known)}, got {odd[0]}")
    static = isinstance(layer, StaticLayer) or (kind == "block" and layer.is_static)
    if not static:
        return
    if any(name.startswith(_BEHIND) for name in value.tensors):
        raise ValueError(
            "restore: snapshot must not be of a cache that took tokens back and read none since, got one that did, for "
            "a static cache"
        )
    if kind != value.kind:
        return
    if isinstance(layer, StaticLayer):
        room, held = layer.max_cache_len, layer.keys if layer.is_initialized else None
        if kind == "keys" and value.tokens > room:
            raise ValueError(f"restore: snapshot must have at most {room} tokens, got {value.tokens}")
        given = {"keys": held, "values": layer.values if layer.is_initialized else None}
    else:
        room, given = None, {} if layer.state is None else layer.state.without_slab()._asdict()
    for name, mine in given.items():
        new = value.tensors.get(name)
        if mine is None or new is None:
            continue
        sizes = [tuple(t.shape[:2]) + tuple(t.shape[3:]) if kind == "keys" else tuple(t.shape) for t in (mine, new)]
        if sizes[0] != sizes[1] or mine.dtype != new.dtype:
            raise ValueError(
                f"restore: {name} of layer {index} must be as in the static cache, {tuple(mine.shape)} {mine.dtype}, "
                f"got {tuple(new.shape)} {new.dtype}"
            )


def _put(layer: Any, value: LayerValue) -> None:
    state = {name: t for name, t in value.tensors.items() if not name.startswith(_BEHIND)}
    behind = {name.removeprefix(_BEHIND): t for name, t in value.tensors.items() if name.startswith(_BEHIND)}
    if isinstance(layer, TakesBack):
        recorded = layer.record is not None
        layer.record = None
        layer.put(state)  # type: ignore[attr-defined]  # both classes that it is mixed into have it
        if recorded or behind:
            layer.record = Record()
            layer.record.base = {name: copied(t) for name, t in state.items()} if behind else {}
            layer.record.calls, layer.record.behind = [behind] if behind else [], bool(behind)
    if isinstance(layer, LinmuCacheLayer):
        layer.packed, layer.is_initialized = False, value.tokens > 0 or (layer.is_static and layer.state is not None)
        if isinstance(layer.cumulative_length, Tensor):
            layer.cumulative_length.fill_(value.tokens)
        else:
            layer.cumulative_length = value.tokens
    elif isinstance(layer, StaticLayer):
        _fill_static(layer, value)
    elif isinstance(layer, CacheLayerMixin):
        _fill(layer, value)


def _fill(layer: Any, value: LayerValue) -> None:
    layer.reset()
    if value.tensors:
        keys, values = (copied(value.tensors[name]) for name in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = value.tokens


def _fill_static(layer: Any, value: LayerValue) -> None:
    if value.tensors and not layer.is_initialized:
        layer.lazy_initialization(value.tensors["keys"], value.tensors["values"])
    layer.reset()
    for name, tensor in value.tensors.items():
        getattr(layer, name)[:, :, : tensor.shape[2]].copy_(tensor)
    window = hasattr(layer, "cumulative_length_int")
    layer.cumulative_length.fill_(min(value.tokens, layer.max_cache_len) if window else value.tokens)
    if window:
        layer.cumulative_length_int = value.tokens


_READ = ("class", "dtype")  # of `_identity`, what can be said


def _identity(model: Any) -> dict[str, str]:
    """What tells a model from others: its class, dtype, configuration, and some values of each of its weights."""
    config, options = model.config.to_dict(), read_linmu(model.config)
    text = json.dumps([_of_the_model(config), repr(options)], sort_keys=True, default=str)
    weights = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() if isinstance(weight, Tensor) else b"")
        # Those of other kinds, quantised, and those that are elsewhere until they are needed, have no values to read.
        if type(weight) is Tensor and weight.device.type != "meta" and weight.numel():
            flat = weight.detach().reshape(-1)
            at = torch.arange(0, len(flat), max(1, len(flat) // _SAMPLES), device=flat.device)
            weights.update(flat[at].cpu().view(torch.uint8).numpy().tobytes())
    kind = type(model).__name__
    config_sum = hashlib.sha256(text.encode()).hexdigest()
    return {"class": kind, "dtype": str(model.dtype), "configuration": config_sum, "weights": weights.hexdigest()}


def _of_the_model(config: Any) -> Any:
    if isinstance(config, Mapping):
        kept = {k: v for k, v in config.items() if not str(k).startswith("_") and k not in _NOT_OF_THE_MODEL}
        return {str(k): _of_the_model(v) for k, v in kept.items()}
    return [_of_the_model(v) for v in config] if isinstance(config, list | tuple) else config


def _checksum(tensor: Tensor) -> int:
    """Of shape, dtype and values."""
    flat = tensor.contiguous().reshape(-1)
    begin = zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    return zlib.crc32(flat.view(torch.uint8).numpy().data, begin) if flat.numel() else begin


def _header_sum(header: str) -> str:
    return str(zlib.crc32(header.encode()))


def _parsed(where: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header; ValueError where it is not one of ours."""
    text = metadata[FORMAT]
    header = json.loads(text) if metadata.get(_SUM) == _header_sum(text) else None
    if not isinstance(header, dict):
        raise ValueError(f"{where} is damaged: its header is not what was saved")
    if header.get("version") != VERSION:
        raise ValueError(f"{where} must be of version {VERSION} of the format, got {header.get('version')!r}")
    return header


def _placed(where: str, values: list[LayerValue], model: Any) -> Iterator[LayerValue]:
    """The values, each on its layer's device; ValueError where a block's are not of its shapes and dtypes."""
    layers = list(model.linmu_layers())
    if len(values) != len(layers):
        raise ValueError(f"{where} must have {len(layers)} layers, as the model has, got {len(values)}")
    for index, (value, layer) in enumerate(zip(values, layers, strict=True)):
        block: Any = getattr(layer, "self_attn", None)
        if (value.kind == "block") != hasattr(block, "init_state"):
            raise ValueError(f"{where} must have the model's kinds of layers, got {value.kind!r} at {index}")
        # Those of a video that is cut have as many tokens as were read of it.
        found = {name: t for name, t in value.tensors.items() if not name.startswith((_BEHIND, "slab_"))}
        device = next((p.device for p in layer.parameters() if p.device.type != "meta"), torch.device("cpu"))
        if value.kind == "block" and found:
            rows = len(next(iter(found.values())))
            wanted = {name: t for name, t in block.init_state(rows)._asdict().items() if t is not None}
            device = next(iter(wanted.values())).device
            for name in dict.fromkeys((*wanted, *found)):
                must, got = ((tuple(t[name].shape), t[name].dtype) if name in t else None for t in (wanted, found))
                if must != got:
                    raise ValueError(f"{where}: {name} of layer {index} must be {must}, got {got}")
        yield LayerValue(value.kind, value.tokens, {name: t.to(device) for name, t in value.tensors.items()})
