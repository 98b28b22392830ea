"""An object store on this machine: moto's S3 server, a process of its own, asked over HTTP without the package.

What is read here is read past the package: which checkpoints are whole is said by a manifest's own hashes.
"""

import contextlib
import hashlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BUCKET = "bucket"
SERVE = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
MANIFEST = "manifest.json"
_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


@dataclass(frozen=True)
class Store:
    """The server, with a bucket.

    Args:
        endpoint: its URL.
    """

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """What a run needs to find it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def plant(self, *fault: Any, ranks: int = 1, rank: int = 0) -> dict[int, tuple[Any, ...]]:
        """For zygote.Run: the environment on each rank, and on one of them a fault."""
        return {each: ("placed", self.environment, *(fault if each == rank else ())) for each in range(ranks)}

    def ask(self, method: str, path: str = "", content: bytes | None = None) -> bytes:
        """The body of an answer. Raises urllib.error.HTTPError."""
        headers = {
            "Authorization": "AWS4-HMAC-SHA256 Credential=nobody/20260101/us-east-1/s3/aws4_request",
            "Content-Type": "application/octet-stream",  # else it takes the content for a form
        }
        request = urllib.request.Request(f"{self.endpoint}/{path}", content, headers, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read()

    def keys(self, prefix: str) -> list[str]:
        """Of the objects whose names begin so, without the prefix and a slash."""
        query = urllib.parse.urlencode({"list-type": 2, "prefix": f"{prefix}/"})
        tree = ElementTree.fromstring(self.ask("GET", f"{BUCKET}?{query}"))
        return sorted(key.text.removeprefix(f"{prefix}/") for key in tree.iter(f"{_NAMESPACE}Key") if key.text)

    def get(self, key: str) -> bytes:
        """An object."""
        return self.ask("GET", f"{BUCKET}/{key}")

    def put(self, key: str, content: bytes) -> None:
        """Makes an object, or another of it."""
        self.ask("PUT", f"{BUCKET}/{key}", content)

    def delete(self, key: str) -> None:
        """Takes it away."""
        self.ask("DELETE", f"{BUCKET}/{key}")

    def copy(self, prefix: str, to: str) -> None:
        """All objects below, to do harm to."""
        for key in self.keys(prefix):
            self.put(f"{to}/{key}", self.get(f"{prefix}/{key}"))

    def folder(self, prefix: str, step: int) -> str:
        """The prefix of the checkpoint of a step; fails where there is not one."""
        (found,) = {key.partition("/")[0] for key in self.keys(prefix) if key.startswith(f"step-{step:08d}")}
        return f"{prefix}/{found}"

    def steps(self, prefix: str) -> list[int]:
        """Steps of the checkpoints, the newest first. Fails where one that has a manifest is not whole."""
        keys, found = self.keys(prefix), []
        for folder in {key.partition("/")[0] for key in keys if key.endswith(f"/{MANIFEST}")}:
            tree = json.loads(self.get(f"{prefix}/{folder}/{MANIFEST}"))
            there = {key.partition("/")[2] for key in keys if key.startswith(f"{folder}/")}
            assert there == {*tree["files"], MANIFEST}, f"{folder} has {there}, and names {set(tree['files'])}"
            for name, file in tree["files"].items():
                content = self.get(f"{prefix}/{folder}/{name}")
                assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"]), name
            found.append((tree["sequence"], tree["step"]))
        return [step for _, step in sorted(found, reverse=True)]

    def leftovers(self, prefix: str) -> list[str]:
        """What is there beside checkpoints that have a manifest."""
        keys = self.keys(prefix)
        whole = {key.partition("/")[0] for key in keys if key.endswith(f"/{MANIFEST}")}
        return [key for key in keys if key.partition("/")[0] not in whole]


@contextlib.contextmanager
def served() -> Iterator[Store]:
    """A server that has an empty bucket; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVE, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store = Store(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                store.ask("PUT", BUCKET)
                break
            except urllib.error.URLError:
                assert process.poll() is None and time.monotonic() < deadline, "moto's server does not come up"
                time.sleep(0.1)
        yield store
    finally:
        process.kill()
        process.wait()


def alike(name: str) -> str:
    """The name of a checkpoint's folder without what is drawn at the start of a run."""
    return re.sub(r"(step-\d{8})-[0-9a-f]{8}", r"\1", name)
