"""Put pip into a virtual environment on a machine whose Python came without it.

    python3 tools/install_pip.py .venv/bin/python

Debian splits `ensurepip` off into a package of its own (python3-venv), so that `python3 -m venv`
alone cannot install anything. This downloads pip's wheel from the package index (PIP_INDEX_URL, or
pypi.org), checks its sha256 and runs it from the wheel to install itself. Standard library only.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
RELEASE = re.compile(r"pip-(\d+(?:\.\d+)*)-py3-none-any\.whl")


def newest(files: list[dict]) -> dict:
    """Return the wheel of the newest release among the files that an index lists."""
    wheels = [(RELEASE.fullmatch(f["filename"]), f) for f in files if not f.get("yanked")]
    found = [([int(n) for n in match[1].split(".")], f) for match, f in wheels if match]
    return max(found, key=lambda pair: pair[0])[1]


def fetch(url: str, accept: str = "*/*") -> bytes:
    """Download a file."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def main(python: str) -> None:
    """Install pip for an interpreter."""
    page = f"{INDEX}/pip/"
    listed = json.loads(fetch(page, "application/vnd.pypi.simple.v1+json"))
    wheel = newest(listed["files"])
    data = fetch(urllib.parse.urljoin(page, wheel["url"]))
    if hashlib.sha256(data).hexdigest() != wheel["hashes"]["sha256"]:
        sys.exit(f"{wheel['url']}: not the sha256 that the index lists")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / wheel["filename"]
        path.write_bytes(data)
        command = [python, f"{path}/pip", "install", "--quiet", "--no-index", str(path)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (OSError, urllib.error.URLError, ValueError, KeyError) as error:
        sys.exit(f"cannot fetch pip from {INDEX}: {error}; or: apt install python3-venv")
