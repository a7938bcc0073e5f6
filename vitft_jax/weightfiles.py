"""Files of published weights: finding them (a path or the Hugging Face Hub), reading them, and refusing pickles.

Only safetensors and .npz are read. Both hold plain arrays; a pickle is a program that runs when it is loaded.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from vitft_jax.errors import InputError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar")
CONVERT = (
    "a pickle may run any code when it is loaded, so it is not read. Convert it where you trust it and have torch: "
    "python -c \"import torch, safetensors.torch as s; w = torch.load('FILE', map_location='cpu', weights_only=True); "
    "w = w.get('model', w.get('state_dict', w)); "
    "s.save_file({k: v.clone().contiguous() for k, v in w.items()}, 'model.safetensors')\""
)
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

Get = Callable[[str], Path | None]
"""Looks up a file of a folder by its name; None where the folder has no such file."""


@dataclass(frozen=True)
class Weights:
    """What the files of a pretrained model hold, with the names they use.

    Attributes:
        tensors: Float32 arrays by name.
        config: `config.json`; empty for a lone file.
        preprocessor: `preprocessor_config.json`; empty where there is none.
        source: Absolute path, or Hub id.
        revision: Commit on the Hub; empty for a path.
        sha256: Over the bytes of the weights files, in the order of their names.
    """

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    source: str
    revision: str
    sha256: str


def read(source: str, revision: str = "") -> Weights:
    """Reads a directory, a lone `.safetensors` or `.npz` file, or a repository of the Hub; see `pretrained.load`.

    Raises:
        InputError: There is no such source, it is not reachable, damaged, incomplete, or a pickle.
    """
    path = Path(source).expanduser()
    if path.exists() and revision:
        raise InputError(f"revision={revision!r} is for Hub ids, but {source!r} is a path")
    if path.is_dir():
        return _read_folder(lambda name: file if (file := path / name).is_file() else None, str(path.resolve()), "")
    if path.is_file():
        readers = {".safetensors": read_safetensors, ".npz": read_npz}
        if path.suffix.lower() not in readers:
            raise InputError(f"{path}: {CONVERT if _is_pickle(path) else 'expected .safetensors, .npz or a directory'}")
        tensors, data = readers[path.suffix.lower()](path)
        return Weights(tensors, {}, {}, str(path.resolve()), "", hashlib.sha256(data).hexdigest())
    if not _HUB_ID.fullmatch(source) or path.suffix.lower() in (".safetensors", ".npz", *_PICKLES):
        raise InputError(f"no file or directory {source!r}, and it is not a Hub id of the form 'owner/name'")
    get, commit = _open_hub(source, revision)
    return _read_folder(get, source, commit)


def _read_folder(get: Get, source: str, revision: str) -> Weights:
    config = get("config.json")
    if config is None:
        raise InputError(f"{source}: no config.json; give the weights file itself to have the architecture inferred")
    config = read_json(config)
    # timm keeps the normalisation in config.json and publishes no preprocessor_config.json.
    preprocessor = None if "architecture" in config else get("preprocessor_config.json")
    tensors: dict[str, np.ndarray] = {}
    digest = hashlib.sha256()
    for file in _weights_files(get, source):
        more, data = read_safetensors(file)
        digest.update(data)
        tensors.update(more)
    return Weights(
        tensors, config, read_json(preprocessor) if preprocessor else {}, source, revision, digest.hexdigest()
    )


def _weights_files(get: Get, source: str) -> list[Path]:
    if single := get(_SINGLE):
        return [single]
    index = get(_INDEX)
    if index is None:
        raise InputError(
            f"{source}: neither {_SINGLE} nor {_INDEX}. If it holds a pickle (pytorch_model.bin): {CONVERT}"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(s, str) and s.endswith(".safetensors") for s in shards.values()
    ):
        raise InputError(f"{index}: no 'weight_map' of tensor names to .safetensors files")
    names = sorted(set(shards.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise InputError(f"{index}: shards outside the folder: {outside[:3]}")
    files = {name: get(name) for name in names}
    if missing := [name for name, file in files.items() if file is None]:
        raise InputError(f"{source}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:10])}")
    return list(files.values())


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], bytes]:
    """Returns the tensors of a safetensors file as float32, and its bytes.

    Raises:
        InputError: It is damaged, no safetensors file at all, or holds other than floating-point numbers.
    """
    data = path.read_bytes()
    try:
        # Sorted, since older versions of safetensors return them in another order every time.
        tensors = sorted(safetensors.deserialize(data), key=lambda item: item[0])
    except safetensors.SafetensorError as error:
        if data.startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`") from error
        raise InputError(
            f"{path}: {CONVERT if _is_pickle(path) else f'damaged, or not a safetensors file ({error})'}"
        ) from error
    if other := {name: entry["dtype"] for name, entry in tensors if entry["dtype"] not in _DTYPES}:
        raise InputError(f"{path}: {len(other)} tensors are not plain floats: {dict(list(other.items())[:3])}")
    return {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        .astype(np.float32, copy=False)
        for name, entry in tensors
    }, data


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], bytes]:
    """Returns the arrays of an .npz file as float32, and its bytes.

    Raises:
        InputError: It is damaged, no .npz file, or holds pickled objects or other than floating-point numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(Path(name).suffix in (".pkl", ".pickle") for name in archive.namelist()):
                raise InputError(f"{path}: {CONVERT}")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise InputError(f"{path}: {strange[0]} is no array")  # numpy hands out such bytes as they are
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen classes on damaged bytes
        reason = CONVERT if _is_pickle(path) or "pickle" in str(error) else f"damaged, or not an .npz file ({error})"
        raise InputError(f"{path}: {reason}") from error
    # numpy stores bfloat16 as raw pairs of bytes.
    arrays = {name: a.view(jnp.bfloat16) if a.dtype == "V2" else a for name, a in arrays.items()}
    if other := {name: str(a.dtype) for name, a in arrays.items() if not jnp.issubdtype(a.dtype, jnp.floating)}:
        raise InputError(f"{path}: {len(other)} arrays are not plain floats: {dict(list(other.items())[:3])}")
    return {name: a.astype(np.float32, copy=False) for name, a in arrays.items()}, path.read_bytes()


def _is_pickle(path: Path) -> bool:
    """By name, by a pickle's first opcode, or by torch's zip around one."""
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix.lower() in _PICKLES or re.match(rb"\x80[\x02-\x05]", start):
        return True
    return start == b"PK\x03\x04" and path.suffix.lower() != ".npz"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: It holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def _open_hub(repo: str, revision: str) -> tuple[Get, str]:
    """Returns a look-up in a repository of the Hub and the commit it is pinned to; files are fetched when asked for."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    pinned = revision or "main"

    def get(name: str) -> Path | None:
        try:
            return Path(hub.hf_hub_download(repo, name, revision=pinned))
        except errors.LocalEntryNotFoundError as error:
            # The cache remembers what the repository was seen not to have.
            if not isinstance(hub.try_to_load_from_cache(repo, name, revision=pinned), str | None):
                return None
            offline = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
            raise InputError(
                f"{repo}: {offline} and {name} is not in the cache {hub.constants.HF_HUB_CACHE}; "
                "fetch it once with a connection, or give a local directory"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise InputError(
                f"{repo}: gated; accept its terms at {hub.constants.ENDPOINT}/{repo}, then `hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise InputError(
                f"no file or directory {repo!r}, and no such repository on {hub.constants.ENDPOINT} "
                "(if it is private: `hf auth login`)"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise InputError(f"{repo}: no revision {revision!r}") from error
        except (errors.HFValidationError, errors.HfHubHTTPError) as error:
            raise InputError(f"{repo}: {str(error).strip().splitlines()[0]}") from error

    config = get("config.json")
    if config is None:
        raise InputError(f"{repo}: no config.json at revision {pinned!r}")
    # The cache keeps each commit in a folder of its name; all further files come from that one.
    pinned = config.parent.name
    return get, pinned
