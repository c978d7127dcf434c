"""`vlm chat`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.cli.options import MODEL_HELP, AdapterOption, ImageOrderOption, TemplateOption, image_order_of
from vlm.errors import CheckpointError, ConfigError
from vlm.logs import warn

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def register(app: typer.Typer) -> None:
    app.command()(chat)


def _option(*names: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, **settings)


def chat(
    export: Annotated[Path, typer.Argument(help=MODEL_HELP)],
    image: Annotated[
        list[Path] | None, _option("--image", "-i", help="An image. Repeatable. 图片，可多次给出。")
    ] = None,
    prompt: Annotated[
        str | None, _option("--prompt", "-p", help="Ask this, print the answer, and end. 只问这一句，回答后退出。")
    ] = None,
    system: Annotated[str | None, _option("--system", help="System prompt. 系统提示。")] = None,
    prompt_template: TemplateOption = None,
    image_order: ImageOrderOption = "auto",
    bot_name: Annotated[
        str,
        _option("--bot-name", help="Stands before answers, and for {bot_name} in --system. 回答前显示的名字。"),
    ] = "model",
    max_new_tokens: Annotated[
        int, _option("--max-new-tokens", min=1, help="Length of an answer. 回答的最大长度。")
    ] = 256,
    do_sample: Annotated[
        bool, _option("--do-sample", help="Sample instead of taking the likeliest. 按概率采样。")
    ] = False,
    temperature: Annotated[float, _option("--temperature", min=0.01, help="With --do-sample. 采样温度。")] = 1.0,
    top_p: Annotated[float, _option("--top-p", min=0.01, max=1, help="With --do-sample. 只在累计概率内采样。")] = 1.0,
    top_k: Annotated[
        int, _option("--top-k", min=0, help="With --do-sample; 0 is all. 只在前 k 个词中采样，0 为不限。")
    ] = 0,
    num_beams: Annotated[int, _option("--num-beams", min=1, help="Beam search. 集束搜索的宽度。")] = 1,
    repetition_penalty: Annotated[
        float, _option("--repetition-penalty", min=0.1, help="Over 1 repeats less. 大于 1 时减少重复。")
    ] = 1.0,
    length_penalty: Annotated[
        float, _option("--length-penalty", help="With --num-beams; under 1 prefers short answers. 束搜索的长度惩罚。")
    ] = 1.0,
    max_length: Annotated[
        int | None, _option("--max-length", min=1, help="Of question and answer, in tokens. 问题与回答的总长度上限。")
    ] = None,
    seed: Annotated[int | None, _option("--seed", help="Of sampling. 随机种子。")] = None,
    stop_word: Annotated[
        list[str] | None,
        _option("--stop-word", "--stop-words", help="Ends an answer. Repeatable. 遇到此文字即停止，可多次给出。"),
    ] = None,
    no_stream: Annotated[
        bool, _option("--no-stream", help="Show answers when they are finished. 回答完成后一次显示。")
    ] = False,
    adapter: AdapterOption = None,
    cpu_only: Annotated[bool, _option("--cpu-only", help="Do not use a GPU. 不使用 GPU。")] = False,
    device: Annotated[str, _option("--device", help="auto, cpu, cuda, cuda:1. 设备。")] = "auto",
    device_map: Annotated[
        str | None,
        _option("--device-map", help="auto: over all GPUs, memory, --offload-folder. 自动分配到各 GPU、内存和磁盘。"),
    ] = None,
    offload_folder: Annotated[
        Path | None, _option("--offload-folder", help="For weights that fit in no memory. 放不下的权重存到此文件夹。")
    ] = None,
    bits: Annotated[
        int | None, _option("--bits", help="8 or 4: less memory, by bitsandbytes. 8 或 4 位量化，节省内存。")
    ] = None,
    dtype: Annotated[str, _option("--dtype", help="auto, fp32, bf16, fp16. 计算精度。")] = "auto",
) -> None:
    """Talk to an export: one answer with --prompt, a conversation without. 与导出的模型对话。"""
    if not export.is_dir():
        raise CheckpointError(f"{export} is no folder. Name an export; `vlm export RUN` writes RUN/export")
    if cpu_only and device not in ("auto", "cpu"):
        raise ConfigError(f"--cpu-only and --device {device} contradict each other. Leave one out")
    from vlm.apps.terminal.app import run_terminal
    from vlm.apps.terminal.settings import without_effect
    from vlm.inference.load import load, make_settings

    settings = make_settings(
        {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "num_beams": num_beams,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "length_penalty": length_penalty,
            "max_length": max_length,
        }
    )
    for switch, idle in without_effect(settings).items():
        flag, names = f"--{switch.replace('_', '-')}", ", ".join(idle)
        warn(f"without {flag}, {names} changes nothing. 没有 {flag}，{names} 不生效。")
    model = partial(
        load,
        export,
        device="cpu" if cpu_only else device,
        precision=_DTYPES.get(dtype, dtype),  # type: ignore[arg-type]  # `load` checks it
        adapter=adapter,
        template=prompt_template,
        image_order=image_order_of(image_order),
        bits=bits,
        device_map=device_map,
        offload_folder=offload_folder,
    )
    run_terminal(
        model,
        image or (),
        prompt,
        system,
        settings,
        stop_words=stop_word or (),
        streams=not no_stream,
        bot_name=bot_name,
    )
