"""The headers of a checkpoint that lies on the hub: a few kB of each of its files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from esft.errors import ModelError
from esft.locating import first_line
from esft.shards import INDEX, SINGLE, shard_files

_AT_ONCE = 8  # requests


class NoHeadersError(Exception):
    """The hub has no headers to read, or cannot be asked; says why."""


def hub_tensors(hub_id: str, snapshot: Path) -> Iterator[tuple[str, int]]:
    """Read the headers of a repository's safetensors files by ranges of bytes.

    Args:
        hub_id: the repository.
        snapshot: its folder in the cache, without weights; its name is the commit.

    Yields:
        safetensors' name of the dtype, and the bytes, of each tensor.

    Raises:
        NoHeadersError: the repository has no safetensors files, or the hub cannot be reached.
        ModelError: a header is damaged, or a file that the index names is missing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError

    api = HfApi()
    indexed = (snapshot / INDEX).is_file()
    names = [file.name for file in shard_files(snapshot)] if indexed else [SINGLE]

    def read(name: str) -> list[tuple[str, int]]:
        try:
            found = api.parse_safetensors_file_metadata(hub_id, name, revision=snapshot.name)
        except SafetensorsParsingError as error:
            raise ModelError(f"{hub_id}: {name}: this weights file is damaged: {error}") from error
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 404:
                raise NoHeadersError(
                    f"the hub does not give its headers ({first_line(error)})"
                ) from error
            if indexed:
                raise ModelError(
                    f"{hub_id}: {name}: the index names this weights file, and the hub lacks it"
                ) from error
            raise NoHeadersError("the hub has no safetensors files of it") from error
        except Exception as error:  # whatever the library's HTTP client raises without a network
            raise NoHeadersError(f"the hub cannot be reached ({type(error).__name__})") from error
        return [
            (tensor.dtype, tensor.data_offsets[1] - tensor.data_offsets[0])
            for tensor in found.tensors.values()
        ]

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for tensors in pool.map(read, names):
            yield from tensors
