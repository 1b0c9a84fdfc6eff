"""What a file is that does not hold what its name says, from its first bytes."""

import re
from pathlib import Path


def what_it_is(path: str | Path, expected: str = "") -> str | None:
    """A sentence that names a foreign file and the way out; None for what cannot be told, or read.

    It knows git-LFS pointers, web pages, and the containers that weights come in.

    Args:
      expected: the container that the file should be: "GGUF", "safetensors" or "zip".
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            return "it is no regular file"  # a pipe would be waited for, a device never ends
        with path.open("rb") as file:
            begin = file.read(512)
    except OSError:
        return None
    if pointer := lfs_pointer(begin):
        return pointer
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|\?xml)", begin, re.IGNORECASE):
        return "it is a web page, not the file: download the file itself"
    if expected != "GGUF" and begin.startswith(b"GGUF"):
        return "it is a GGUF file: let its name end in .gguf, and give that file as the model"
    if expected != "safetensors" and re.match(rb'.{6}\0\0\{\s*"', begin, re.DOTALL):  # the header's length, and JSON
        return "it is a safetensors file: let its name end in .safetensors"
    if expected != "zip" and begin.startswith(b"PK\3\4"):
        return "it is a zip archive, as PyTorch writes: let its name end in .bin if it is a state dict"
    return None


def lfs_pointer(begin: bytes) -> str | None:
    """The sentence of `what_it_is` for a file's first bytes, if they are a git-LFS pointer's."""
    if not begin.startswith(b"version https://git-lfs"):
        return None
    size = re.search(rb"^size (\d{1,18})\r?$", begin, re.MULTILINE)
    of = f" of {int(size[1]):,} bytes" if size else ""
    return (
        f"it is a git-LFS pointer to a file{of}, not the file: run `git lfs pull` in its folder, or download it again "
        "(`smollm3 pull ORG/NAME` fetches a model)"
    )
