"""The format of a file, from its first bytes and never from its name."""

from __future__ import annotations

import re
from pathlib import Path

from qdit_jax.errors import UserError

ZIP = "zip"
LEGACY = "legacy"
SAFETENSORS = "safetensors"
JSON = "json"

LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
KNOWN_OTHERS = (
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
)


def sniff(path: Path) -> str:
    """Returns `ZIP`, `LEGACY`, `SAFETENSORS` or `JSON`.

    Raises:
        UserError: for an empty file, a web page, a Git LFS pointer, or another kind of file.
    """
    size = path.stat().st_size
    if size == 0:
        raise UserError("the file is empty; the download probably failed.")
    with path.open("rb") as file:
        head = file.read(1024)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ZIP
    if head.startswith(b"\x80") and LEGACY_MAGIC in head[:32]:
        return LEGACY
    _refuse_text(head)
    for magic, what in KNOWN_OTHERS:
        if head.startswith(magic):
            raise UserError(f"this is {what}, not a file of torch or safetensors weights.")
    if head[257:262] == b"ustar":
        raise UserError("this is a tar archive; unpack it first.")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return SAFETENSORS
    if head.lstrip().startswith(b"{"):
        return JSON
    if re.match(rb"\x80[\x02-\x05]", head):
        raise UserError(
            "this is a bare Python pickle, not a file of torch.save; opening it could run code, "
            "so convert does not."
        )
    raise UserError(
        "this is neither a torch file (.pt, .pth, .bin, .ckpt) nor safetensors; "
        f"it begins with {head[:8]!r}."
    )


def _refuse_text(head: bytes) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        found = re.search(rb"size (\d{1,18})", head)
        size = f" of {int(found.group(1)):,} bytes" if found else ""
        raise UserError(
            f"this is a Git LFS pointer; the real file{size} was not downloaded (run: git lfs pull)."
        )
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise UserError(
            "this is a web page, not weights; the download failed (is a login needed?)."
        )
