"""Distribution `srft-kernels`: the loss head (`srft_kernels`) and the training loop on it (`srft`)."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "transformers>=5.17",
    "safetensors>=0.5",
    "jsonargparse>=4.40",
    "tomli>=2.0; python_version < '3.11'",
    "tqdm>=4.60",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "scipy>=1.11",
    "pyarrow>=15",
    "math-verify>=0.8",
    "reasoning-gym>=0.1.20",
    "gguf>=0.10",  # reads the embedded SmolLM2 weights
]
HUB = ["datasets>=3"]  # datasets of a hub by name
LORA = ["peft>=0.18"]
TENSORBOARD = ["tensorboard>=2.15"]
TRACKERS = {"tensorboard": TENSORBOARD, "wandb": ["wandb>=0.17"], "trackio": ["trackio>=0.5"]}
TEST = ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.5", "hypothesis>=6.100", "psutil>=5.9", "numpy>=1.26"]
# What bench/peers.py compares with and pip can have beside the rest; verl wants an older transformers: --no-deps.
PEERS = ["liger-kernel>=0.8.5", "cut-cross-entropy>=25.1", "trl>=1.14", "quack-kernels>=0.6"]
LINT = ["ruff==0.15.0", "import-linter>=2.1"]

setup(
    name="srft-kernels",
    version="0.1.0",
    description="The loss head of LLM fine-tuning: log-probs, entropy and any SFT + RL loss without the logits",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["srft_kernels", "srft_kernels.*", "srft", "srft.*"]),
    package_data={"srft": ["*.html", "recipes/*.toml"], "srft_kernels": ["py.typed"], "srft_kernels.rows": ["*.json"]},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "train": TRAIN,
        "hub": HUB,
        "lora": LORA,
        **TRACKERS,
        "test": TEST,
        "peers": PEERS,
        "dev": TRAIN + LORA + TENSORBOARD + TEST + LINT,
    },
    entry_points={"console_scripts": ["srft=srft.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
    ],
)
