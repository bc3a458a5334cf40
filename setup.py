"""Package set-up. Ranges are wide; constraints.txt (constraints-cuda12.txt) pins what was tested together."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mixreorg_fast/__init__.py").read_text()).group(1)

# DeepSpeed, what a run logs and draws. (log.wandb asks for wandb besides.)
TRAIN = ["deepspeed>=0.19", "tensorboard>=2.14", "einops>=0.8", "matplotlib>=3.8"]
EXTRAS = {
    # Training. DALI, which decodes, has a distribution per CUDA: CUDA 12 is for drivers older than 580.
    "train": [*TRAIN, "nvidia-dali-cuda130>=2.0"],
    "train-cuda12": [*TRAIN, "nvidia-dali-cuda120>=2.0"],
    # Fused kernels on NVIDIA GPUs.
    "gpu": ["triton>=3.6"],
    # Building shards from Parquet files.
    "parquet": ["pyarrow>=15.0"],
    # Checking against, and exporting to, Hugging Face's GroupViT.
    "hf": ["transformers>=5.0"],
    # The web page.
    "demo": ["gradio>=6.31"],
    "dev": [
        *("pytest>=8.0", "pytest-benchmark>=5.0", "ruff>=0.6", "selenium>=4.20"),
        *("pyarrow>=15.0", "scikit-learn>=1.4", "triton>=3.6"),
    ],
}

setup(
    name="mixreorg-fast",
    version=VERSION,
    description="MixReorg (ICCV 2023) pre-training for open-vocabulary segmentation, on fused Triton kernels",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # mixreorg_fast/kernels is a link to kernels/, so that a checkout, an editable install and a wheel name it alike.
    packages=find_packages(include=["mixreorg_fast", "mixreorg_fast.*"]),
    # mixreorg_fast/configs is such a link as well.
    package_data={"mixreorg_fast": ["configs/*.json", "py.typed"]},
    install_requires=[
        "torch>=2.10",
        "numpy>=1.26",
        "pillow>=10.0",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "pydantic>=2.8",
        "tqdm>=4.60",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mixreorg = mixreorg_fast.cli:main"]},
)
