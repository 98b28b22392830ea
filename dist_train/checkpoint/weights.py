"""Weights in files: those that a run leaves, and those that another starts from. Nothing in a file is executed."""

import gc
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from dist_train.backends.precision import cast
from dist_train.checkpoint import manifest
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.places import Folder
from dist_train.checkpoint.rules import PRETRAINED, SHARDED, WEIGHTS
from dist_train.errors import ConfigError
from dist_train.whole import whole

NAMES_SHOWN = 10
# Where other programs keep the state dict in a file that holds more.
NESTED = ("model", "state_dict")

State = dict[str, torch.Tensor]
Used = TypeVar("Used")


def save_weights(folder: Path | None, state: State) -> None:
    """Writes the weights by the model's own names; whole or absent. `folder` is None on ranks that do not write."""
    if folder is not None:
        with whole(folder / WEIGHTS) as beside:
            torch.save(state, beside)


def load_weights(folder: Folder) -> State:
    """The weights of a finished run or of a checkpoint, on the CPU; see `read`. Raises ConfigError."""
    if isinstance(folder, Path) and not (folder / WEIGHTS).is_file() and not (folder / manifest.NAME).is_file():
        raise ConfigError(
            f"run.dir: got {folder}, expected the folder of a finished run, with {WEIGHTS} and config.yaml in it"
        )
    return read(folder, "run.dir")


def read(path: Folder, option: str = "model.init_from") -> State:
    """The tensors of a file by the names that it gives them, on the CPU. The one place that knows the sources.

    The tensors are mapped from the file where it can be mapped (not a .pt of before torch 1.6): they take memory as
    they are read. They can be written to, which changes memory alone. The file must not be shortened meanwhile.

    Args:
        path: a run's folder, finished or with checkpoints, of which the newest whole one is read; the folder of a
            checkpoint, or the URL of one or several; a folder that save_pretrained has left, with one file of weights
            or several; or a file: .safetensors, or a state dict that torch.save wrote, also below "model" or
            "state_dict" in it.
        option: the config path that an error names.

    Raises:
        ConfigError: the file is damaged, or holds anything but tensors.
    """
    if not isinstance(path, Path):
        return _read_checkpoint(path, option)
    if path.is_dir() and not (path / WEIGHTS).is_file():
        if (path / SHARDED).is_file():
            return _read_shards(path, option)
        if (path / PRETRAINED).is_file():
            return read(path / PRETRAINED, option)
        return _read_checkpoint(path, option)
    path = path / WEIGHTS if path.is_dir() else path
    try:
        tree = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except OSError as error:
        raise ConfigError(f"{option}: got {path}, expected a file that can be read: {error.strerror}") from None
    except Exception as error:  # torch and safetensors have no one error for a damaged file
        _refuse(option, path, error)
    for key in NESTED:
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
            break
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{option}: got {path}, which holds {_kind(tree)}, expected tensors by name: a state dict")
    for name, value in tree.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise ConfigError(f"{option}: got {path}, where {name!r} is {_kind(value)}, expected tensors alone")
    return {name: value.detach() for name, value in tree.items()}


def _read_shards(folder: Path, option: str) -> State:
    """The tensors of several files, as their index names them."""
    try:
        where = json.loads((folder / SHARDED).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{option}: got {folder / SHARDED}, which cannot be read: {error!r}") from None
    found: State = {}
    for name in files:
        if Path(name).name != name:
            raise ConfigError(f"{option}: got {folder / SHARDED}, which names {name!r}, expected files beside it")
        found |= read(folder / name, option)
    missing = [name for name in where if name not in found]
    if missing:
        raise ConfigError(f"{option}: got {folder}, whose files lack {missing[0]} of {SHARDED}, expected all of them")
    return found


def is_checkpoint(path: Folder) -> bool:
    """Whether `read` takes a checkpoint there."""
    if not isinstance(path, Path):
        return True
    return path.is_dir() and not any((path / name).is_file() for name in (WEIGHTS, SHARDED, PRETRAINED))


def _read_checkpoint(place: Folder, option: str) -> State:
    from dist_train.checkpoint.resume import read_weights

    def use(folder: Folder, what: Manifest) -> State:
        state = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for name, t in what.model.items()}
        read_weights(folder, state)
        return state

    return newest(place, option, use)


def newest(place: Folder, option: str, use: Callable[[Folder, Manifest], Used]) -> Used:
    """What is made of the newest whole checkpoint. Raises ConfigError.

    Args:
        place: see `read`.
        option: see `read`.
        use: is given its folder and its manifest; it may raise Damaged, as what it reads may be.
    """
    found, damaged = manifest.listed(place)
    for folder, what in found:
        try:
            manifest.verify(folder, what, what.files)
            return use(folder, what)
        except manifest.Damaged as error:
            damaged.append(error)
    raise ConfigError(*(f"{option}: got a damaged checkpoint: {error}" for error in damaged))


def _read_safetensors(path: Path) -> State:
    from safetensors.torch import load, load_file

    return load_file(path) if _is_text(path) else load(path.read_bytes())


def _read_torch(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    if mapped:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not compare the checksums
        if damaged is not None:
            raise ValueError(f"{damaged} does not have its checksum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an archive of TorchScript is refused, and warned of as well
        if _is_text(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def _is_text(path: Path) -> bool:
    """Whether the path can be given to a library that is not in Python: a file's name may be any bytes."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _refuse(option: str, path: Path, error: Exception) -> NoReturn:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code is not None:
        raise ConfigError(
            f"{option}: got {path}, which holds {code[1]} beside tensors; nothing of it was executed; expected tensors "
            f"by name alone: torch.save(model.state_dict(), ...)"
        ) from None
    # Where torch fails to read a pickle, it speaks at length about reading it without safety.
    about = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = [line for line in str(error).splitlines() if line and not line.startswith(about)]
    reason = lines[0].partition(". ")[0] if lines else type(error).__name__
    raise ConfigError(f"{option}: got {path}, which is damaged, or is no file of tensors: {reason}") from None


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.layout} tensor on {value.device}"
    return f"{len(value)} entries" if isinstance(value, dict) else f"something of type {type(value).__name__}"


# -- into a model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """How the tensors of a file and those of a model go together.

    Args:
        found: what fits by name and shape, by the model's own names.
        missing: names of the model that the file does not have.
        unexpected: names of the file that the model does not have.
        unfit: names that both have, with both shapes or types where these differ.
        stripped: tensors whose name began with `module.`, or had `_orig_mod.` in it, as DDP and torch.compile leave it.
    """

    found: State
    missing: Sequence[str]
    unexpected: Sequence[str]
    unfit: Sequence[str]
    stripped: int

    def differences(self) -> Iterator[str]:
        """What does not go together, a phrase for each kind."""
        for what, names in (
            ("not in the file", self.missing),
            ("not in the model", self.unexpected),
            ("of another shape or type", self.unfit),
        ):
            if names:
                rest = len(names) - NAMES_SHOWN
                more = f" and {rest} more" if rest > 0 else ""
                yield f"{len(names)} {what}: {', '.join(names[:NAMES_SHOWN])}{more}"


def match(model: nn.Module, given: Mapping[str, torch.Tensor]) -> Match:
    """Which of the tensors in `given` are the model's, by name and shape."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    by_name, unexpected, stripped = {}, [], 0
    for name, value in given.items():
        bare = next((n for n in _names(name) if n in own and (n == name or n not in given)), None)
        if bare is None:
            unexpected.append(name)
        else:
            stripped += bare != name
            by_name[bare] = value
    found, unfit = {}, []
    for name, value in by_name.items():
        if value.shape == own[name].shape and _number(value) == _number(own[name]):
            found[name] = value
        else:
            unfit.append(f"{name} ({_form(value)}, the model has {_form(own[name])})")
    filled = {_place(own[name]) for name in by_name}  # a tied weight is filled by any of its names
    missing = [name for name, value in own.items() if name not in by_name and _place(value) not in filled]
    return Match(found, missing, unexpected, unfit, stripped)


def _place(value: torch.Tensor) -> tuple[int, int, torch.Size]:
    """The same for a tensor under two names."""
    return value.untyped_storage()._cdata, value.storage_offset(), value.shape


def _names(name: str) -> Iterator[str]:
    """The name, and what it may be without the prefixes of wrappers."""
    yield name
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    yield ".".join(parts)
    while parts[0] == "module":
        parts = parts[1:]
        yield ".".join(parts)


def _number(value: torch.Tensor) -> tuple[bool, bool]:
    """Floats are turned into floats. An integer for a float would be a quantized weight without its scale."""
    return value.is_floating_point(), value.is_complex()


def _form(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def warm_start(
    make: Callable[[], nn.Module], dtype: torch.dtype, path: Folder, strict: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model that `make` builds, in `dtype`, with what of a file fits it; and lines that say what did.

    Raises:
        ConfigError: the file cannot be read, or nothing in it fits, or with `strict` anything does not.
    """
    model, found = fill(make, dtype, read(path))
    return model, said(path, found, strict)


def said(path: Path, found: Match, strict: bool) -> tuple[str, ...]:
    """Lines that say what of a file fits the model. Raises ConfigError; see `warm_start`."""
    differences = list(found.differences())
    if differences and (strict or not found.found):
        some = len(found.found)
        fits = f"of which {some} tensors fit the model" if some else "of which nothing fits the model"
        mend = "write --model.init_strict false to load what fits" if some else "expected weights of this model"
        raise ConfigError(f"model.init_from: got {path}, {fits}; {'; '.join(differences)}; {mend}")
    renamed = f", {found.stripped} of them without module. or _orig_mod. in their names" if found.stripped else ""
    total = len(found.found) + len(found.missing) + len(found.unfit)
    return f"model.init_from {path}: {len(found.found)} of {total} tensors loaded{renamed}", *differences


def trained(make: Callable[[], nn.Module], dtype: torch.dtype, folder: Folder) -> nn.Module:
    """The model that `make` builds, in `dtype`, with the weights of a finished run. Raises ConfigError."""
    model, found = fill(make, dtype, load_weights(folder))
    differences = "; ".join(found.differences())
    if differences:
        raise ConfigError(f"model: got another model than the one in {folder}: {differences}")
    return model


def fill(make: Callable[[], nn.Module], dtype: torch.dtype, given: State) -> tuple[nn.Module, Match]:
    """The model that `make` builds, on the CPU in `dtype`, with those of the given tensors that fit it.

    Where they are all that the model has, it is built without memory and takes the tensors themselves, so that there is
    one copy of them. Else, and where a model cannot be built so, it is built as always and they are copied into it.
    """
    model, found = _assigned(make, dtype, given)
    if model is None:
        model = cast(make(), dtype)
        found = match(model, given)
        model.load_state_dict(found.found, strict=False)
    return model, found


def _assigned(make: Callable[[], nn.Module], dtype: torch.dtype, given: State) -> tuple[nn.Module | None, Match | None]:
    """See `fill`; None for a model that cannot take the tensors themselves."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on this device the model copies nothing, and is warned of it
            model = cast(make(), dtype)
    except Exception:  # a constructor that looks at values; where it fails for another reason, it will again
        return None, None
    found = match(model, given)
    if found.missing or found.unfit or not _replaceable(model):
        return None, None
    types = {name: value.dtype for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    apart = _apart(found.found)
    model.load_state_dict({name: value.to(types[name]) for name, value in apart.items()}, strict=False, assign=True)
    # What the file does not have, such as a buffer that is not persistent, or a tensor in a list of the model's own.
    if _any_on_meta():
        gc.collect()  # perhaps only something that is no longer used; slower than to look
        if _any_on_meta():
            return None, None
    return model, found


def _any_on_meta() -> bool:
    return any(issubclass(type(thing), torch.Tensor) and thing.is_meta for thing in gc.get_objects())


def _replaceable(model: nn.Module) -> bool:
    """Whether other tensors can take the place of the model's: none is there under two names, or carries a hook or an
    attribute of the user's."""
    own = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, torch.Tensor)]
    hooks = [value._backward_hooks or value._post_accumulate_grad_hooks or vars(value) for value in own]
    return len({value.untyped_storage()._cdata for value in own}) == len(own) and not any(hooks)


def _apart(state: State) -> State:
    """The same tensors, with a copy of each that is not contiguous or shares memory with another."""
    out: State = {}
    end = 0
    for name, value in sorted(state.items(), key=lambda item: item[1].data_ptr()):
        first, past = value.data_ptr(), value.data_ptr() + value.nbytes
        alone = value.is_contiguous() and first >= end
        out[name] = value if alone else value.clone(memory_format=torch.contiguous_format)
        end = max(end, past if value.is_contiguous() else first + value.untyped_storage().nbytes())
    return out
