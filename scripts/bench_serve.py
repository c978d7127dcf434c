"""Chats one after the other against the same chats at once, over HTTP, by the same server.

    python scripts/bench_serve.py                              # a small model with random weights
    python scripts/bench_serve.py --export cache/runs/quickstart/finetune/export --threads 2

Starts the server of `vlm serve` in this process on a free port of loopback, asks `--chats` questions of different
lengths with the `openai` client, first in turn and then at once, `--repeat` times in alternation, and prints tokens per
second, the time to the first token, and the ratio. The replies must be the same both times: that is checked, exactly in
fp32. Replies do not end before `--new-tokens`.
"""

from __future__ import annotations

import argparse
import base64
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import OpenAI

    from vlm.inference.load import LoadedModel

QUESTIONS = (
    "Hello.",
    "What is the capital of France, and what is it known for?",
    "Count to ten.",
    "Tell a story about a cat that lives by the sea and wants to learn to swim before the winter comes.",
    "Why is the sky blue?",
    "Name three colours, and say what each of them makes you think of.",
    "Describe a forest in the rain.",
    "What do bees do all day?",
)


def random_model(width: int, layers: int) -> LoadedModel:
    """A Llama with random weights that shares nothing with a real one but its shape."""
    import torch
    from demo.tiny import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlm.data.build import build_template
    from vlm.data.tokenize import ConversationTokenizer
    from vlm.inference.load import LoadedModel
    from vlm.models.config import ModelConfig
    from vlm.models.vlm import VisionLanguageModel

    tokenizer = tiny_tokenizer(QUESTIONS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192),
        max_position_embeddings=2048,
        initializer_range=0.1,  # so that replies differ
    )
    model = VisionLanguageModel(LlamaForCausalLM(config).eval().requires_grad_(False))
    tokens = ConversationTokenizer(tokenizer, build_template("chatml", tokenizer))
    settings = ModelConfig.model_validate({"vision": None, "llm": {"path": "random"}, "trainable": ["llm"]})
    return LoadedModel(model, tokenizer, tokens, None, None, settings, None, torch.device("cpu"), torch.float32)


@contextmanager
def serving(loaded: LoadedModel, max_running: int) -> Iterator[OpenAI]:
    import uvicorn
    from openai import OpenAI

    from vlm.apps.api.app import build_app
    from vlm.apps.api.limits import Limits, Media
    from vlm.apps.api.media import MediaLoader
    from vlm.apps.api.server import build_service

    service = build_service(loaded, "bench", MediaLoader(Media()), Limits(max_running=max_running, max_queued=1000))
    server = uvicorn.Server(uvicorn.Config(build_app(service), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join()


def chat(client: OpenAI, number: int, arguments: argparse.Namespace, stop_ids: list[int]) -> tuple[str, float]:
    """A reply, and the seconds to its first piece."""
    content: list[Any] = [{"type": "text", "text": QUESTIONS[number % len(QUESTIONS)] + " " * (number // 8)}]
    if arguments.image:
        data = base64.b64encode(arguments.image.read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    started = time.perf_counter()
    first, text = 0.0, ""
    for chunk in client.chat.completions.create(
        model="bench",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=arguments.new_tokens,
        logit_bias={str(token): -100 for token in stop_ids},
        stream=True,
    ):
        if chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            text += chunk.choices[0].delta.content
    return text, first


def run(client: OpenAI, at_once: int, arguments: argparse.Namespace, stop_ids: list[int]) -> dict[str, Any]:
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        chats = range(arguments.chats)
        answers = list(pool.map(lambda number: chat(client, number, arguments, stop_ids), chats))
    rate = arguments.chats * arguments.new_tokens / (time.perf_counter() - started)
    return {"rate": rate, "texts": [text for text, _ in answers], "first": statistics.median(f for _, f in answers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, help="an export; without one, random weights")
    parser.add_argument("--image", type=Path, help="a PNG that every chat shows")
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--width", type=int, default=384, help="of the random model")
    parser.add_argument("--layers", type=int, default=12, help="of the random model")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    arguments = parser.parse_args()

    from vlm.compat import prepare

    prepare()
    import torch

    from vlm.inference.load import load

    torch.set_num_threads(arguments.threads)
    if arguments.export:
        loaded = load(arguments.export, precision=arguments.precision)
    else:
        loaded = random_model(arguments.width, arguments.layers)
    stop_ids = sorted(loaded.conversation_tokenizer.stop_ids)
    in_turn, at_once = [], []
    with serving(loaded, arguments.chats) as client:
        run(client, arguments.chats, arguments, stop_ids)  # warms up
        for _ in range(arguments.repeat):
            in_turn.append(run(client, 1, arguments, stop_ids))
            at_once.append(run(client, arguments.chats, arguments, stop_ids))
    for name, runs in (("in turn", in_turn), ("at once", at_once)):
        rates = ", ".join(f"{one['rate']:.1f}" for one in runs)
        first = statistics.median(one["first"] for one in runs)
        print(f"{name}: {rates} tokens/s; first token after {first:.2f} s (median)")
    ratios = [b["rate"] / a["rate"] for a, b in zip(in_turn, at_once, strict=True)]
    same = sum(a == b for a, b in zip(in_turn[0]["texts"], at_once[0]["texts"], strict=True))
    print(f"ratio: {statistics.median(ratios):.2f} ({arguments.chats} chats, {arguments.new_tokens} tokens each)")
    print(f"same replies: {same} of {arguments.chats} ({loaded.compute_dtype})")
    if loaded.compute_dtype == torch.float32 and same < arguments.chats:
        raise SystemExit("error: a batch wrote other replies than each chat alone")


if __name__ == "__main__":
    main()
