"""Asks a server with clients that nobody here wrote: `ask.py BASE_URL MODEL IMAGE`. Runs in an environment of its own.

Prints a line of JSON per client: its name and what it got, or the error. Knows nothing of vlm.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

base, model, image = sys.argv[1:]
url = "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()
IMAGE, WORDS = {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}
ASKED = [{"role": "user", "content": [IMAGE, WORDS]}]
GREEDY = {"temperature": 0, "max_tokens": 12}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


class Shape(BaseModel):
    colour: Literal["red", "green"]


def main() -> None:
    for name, client in {**openai_clients(), **langchain_clients(), **litellm_clients(), **llama_index()}.items():
        try:
            print(json.dumps({"name": name, "got": client()}), flush=True)
        except Exception as error:  # each client has its own
            print(json.dumps({"name": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}), flush=True)


def openai_clients():
    from openai import OpenAI

    client = OpenAI(base_url=base, api_key="none", max_retries=0)
    chats, asked = client.chat.completions, {"model": model, "messages": ASKED, **GREEDY}
    item = {
        "role": "user",
        "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": WORDS["text"]}],
    }
    response = {"model": model, "input": [item], "temperature": 0, "max_output_tokens": 12}

    def put_back():
        first = chats.create(**asked).choices[0].message
        more = {"role": "user", "content": "Sure?"}
        histories = ([*ASKED, first, more], [*ASKED, first.model_dump(), more])
        texts = [chats.create(model=model, messages=one, **GREEDY).choices[0].message.content for one in histories]
        return texts[0] == texts[1] != ""

    def helper():
        with chats.stream(**asked | {"max_tokens": 200, "response_format": Shape}) as stream:
            return stream.get_final_completion().choices[0].message.parsed.colour

    def streamed():
        return "".join(chunk.choices[0].delta.content or "" for chunk in chats.create(**asked, stream=True))

    def response_stream():
        events = client.responses.create(**response, stream=True)
        return "".join(event.delta for event in events if event.type == "response.output_text.delta")

    def response_helper():  # raises unless the last event says that the response is complete
        with client.responses.stream(**response | {"max_output_tokens": 200, "text_format": Shape}) as stream:
            return stream.get_final_response().output_parsed.colour

    return {
        "openai chat": lambda: chats.create(**asked).choices[0].message.content,
        "openai stream": streamed,
        "openai parse": lambda: (
            chats.parse(**asked | {"max_tokens": 200}, response_format=Shape).choices[0].message.parsed.colour
        ),
        "openai stream helper": helper,
        "openai message put back": put_back,
        "openai tools": lambda: chats.create(**asked, tools=[TOOL]).choices[0].message.content,
        "openai responses": lambda: client.responses.create(**response).output_text,
        "openai responses stream": response_stream,
        "openai responses stream helper": response_helper,
        "openai responses parse": lambda: (
            client.responses.parse(**response | {"max_output_tokens": 200}, text_format=Shape).output_parsed.colour
        ),
        "openai completions": lambda: (
            client.completions.create(model=model, prompt="What is", **GREEDY).choices[0].text
        ),
        "openai models": lambda: [one.id for one in client.models.list()],
    }


def langchain_clients():
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    def llm(**changes):
        return ChatOpenAI(base_url=base, api_key="none", model=model, max_retries=0, **GREEDY | changes)

    asked = [HumanMessage(content=[IMAGE, WORDS])]
    block = {"type": "image", "source_type": "base64", "mime_type": "image/png", "data": url.partition(",")[2]}
    as_string = {"type": "image_url", "image_url": url}
    return {
        "langchain invoke": lambda: llm().invoke(asked).content,
        "langchain stream": lambda: "".join(chunk.content for chunk in llm(stream_usage=True).stream(asked)),
        "langchain image block": lambda: llm().invoke([HumanMessage(content=[block, WORDS])]).content,
        "langchain url as a string": lambda: llm().invoke([HumanMessage(content=[as_string, WORDS])]).content,
        "langchain structured": lambda: llm(max_tokens=200).with_structured_output(Shape).invoke(asked).colour,
        "langchain json mode": lambda: (
            type(llm(max_tokens=4).bind(response_format={"type": "json_object"}).invoke(asked).content).__name__
        ),
        "langchain tools": lambda: llm().bind_tools([TOOL]).invoke(asked).content,
        "langchain system": lambda: bool(llm().invoke([SystemMessage("Be brief."), *asked]).content),
        "langchain responses": lambda: llm(use_responses_api=True).invoke(asked).text,
    }


def litellm_clients():
    import litellm

    common = {"api_base": base, "api_key": "none", "messages": ASKED, "num_retries": 0, **GREEDY}

    def streamed():
        chunks = litellm.completion(model=f"openai/{model}", stream=True, **common)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    def told(name):
        return litellm.completion(model=f"{name}/{model}", **common).choices[0].message.content

    return {
        "litellm openai": lambda: told("openai"),
        "litellm hosted_vllm": lambda: told("hosted_vllm"),
        "litellm stream": streamed,
        "litellm tools": lambda: (
            litellm.completion(model=f"openai/{model}", tools=[TOOL], **common).choices[0].message.content
        ),
    }


def llama_index():
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=model, api_base=base, api_key="none", is_chat_model=True, context_window=1024, max_retries=0,
                     **GREEDY)  # fmt: skip
    plain = OpenAILike(model=model, api_base=base, api_key="none", is_chat_model=False, max_retries=0, **GREEDY)
    asked = [ChatMessage(role="user", blocks=[ImageBlock(path=image), TextBlock(text=WORDS["text"])])]
    return {
        "llama-index chat": lambda: llm.chat(asked).message.content,
        "llama-index stream": lambda: "".join(piece.delta or "" for piece in llm.stream_chat(asked)),
        "llama-index complete": lambda: plain.complete("What is").text,
    }


if __name__ == "__main__":
    main()
