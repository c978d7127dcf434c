"""The real openai client against a real server on loopback."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import openai
import pytest
from api_server import NAME, Running, user

from vlm.inference.load import LoadedModel

pytestmark = pytest.mark.slow  # a server with a model

Image = Callable[[int], str]


def complete(server: Running, text: str = "What is this?", *urls: str, **settings: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 8} | settings
    return server.openai().chat.completions.create(model=NAME, messages=user(text, *urls), **settings)


def texts(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_a_reply_is_the_one_that_the_model_gives_alone(server: Running, loaded: LoadedModel, image: Image):
    messages = user("What is this?", image(1))
    alone = loaded.chat(messages, max_new_tokens=24)
    answer = complete(server, "What is this?", image(1), max_tokens=24)
    assert answer.choices[0].message.content.strip() == alone != ""
    assert answer.choices[0].message.role == "assistant"
    assert answer.model == NAME
    assert answer.object == "chat.completion"


def test_a_stream_adds_up_to_the_same_reply(server: Running, image: Image):
    whole = complete(server, "What is this?", image(1), max_tokens=24).choices[0]
    chunks = list(complete(server, "What is this?", image(1), max_tokens=24, stream=True))
    assert texts(chunks) == whole.message.content
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_counts_tokens_and_comes_last_in_a_stream(server: Running, loaded: LoadedModel, image: Image):
    usage = complete(server, "Hello", image(0), max_tokens=5, logit_bias={"2": -100}).usage
    without = complete(server, "Hello", max_tokens=5).usage
    spec = loaded.image_spec
    assert spec is not None
    assert usage.prompt_tokens - without.prompt_tokens >= spec.num_tokens
    assert (usage.completion_tokens, usage.total_tokens) == (5, usage.prompt_tokens + 5)
    options = {"stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"2": -100}}
    chunks = list(complete(server, "Hello", image(0), max_tokens=5, **options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == usage


def test_max_tokens_ends_a_reply_and_so_does_its_newer_name(server: Running):
    for name in ("max_tokens", "max_completion_tokens"):
        settings = {"max_tokens": None, name: 3, "logit_bias": {"2": -100}}
        answer = complete(server, **settings)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_a_stop_text_ends_a_reply_and_is_left_out(server: Running):
    free = complete(server, max_tokens=40).choices[0].message.content
    stop = free[4:7]
    for stops in (stop, ["never said", stop]):
        choice = complete(server, max_tokens=40, stop=stops).choices[0]
        assert choice.message.content == free[: free.index(stop)]
        assert choice.finish_reason == "stop"
    assert texts(complete(server, max_tokens=40, stop=stop, stream=True)) == free[: free.index(stop)]


def test_a_seed_decides_what_is_sampled_and_each_choice_has_its_own(server: Running):
    def sample(seed: int | None) -> list[str]:
        answer = complete(server, temperature=2, seed=seed, n=3, max_tokens=12)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)
    assert sample(None) != sample(None)
    assert len(set(sample(7))) == 3
    assert sample(8)[0] == sample(7)[1]  # choice n has seed + n


def test_several_choices_stream_side_by_side(server: Running):
    whole = complete(server, temperature=2, seed=7, n=3, max_tokens=12)
    streamed = ["", "", ""]
    for chunk in complete(server, temperature=2, seed=7, n=3, max_tokens=12, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [choice.message.content for choice in whole.choices]


def test_logprobs_name_the_tokens_of_the_reply(server: Running):
    choice = complete(server, logprobs=True, top_logprobs=3, max_tokens=12).choices[0]
    spelled = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert spelled.decode(errors="replace") == choice.message.content
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy takes the likeliest
        assert sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1 + 1e-6
    streamed = [
        token
        for chunk in complete(server, logprobs=True, top_logprobs=3, max_tokens=12, stream=True)
        for one in chunk.choices
        for token in (one.logprobs.content if one.logprobs else [])
    ]
    # the worst difference seen is 0: one reply at a time is the same batch
    assert [token.token for token in streamed] == [token.token for token in choice.logprobs.content]


def test_penalties_and_biases_reach_the_sampler(server: Running):
    assert complete(server, logit_bias={"2": 100}).usage.completion_tokens == 0  # the end token at once
    free = complete(server, max_tokens=24).choices[0].message.content
    assert complete(server, max_tokens=24, frequency_penalty=2, presence_penalty=2).choices[0].message.content != free
    extra = {"repetition_penalty": 5, "top_k": 3}
    assert complete(server, max_tokens=24, extra_body=extra).choices[0].message.content != free


def test_a_conversation_with_system_and_developer_messages_goes_through(server: Running, loaded: LoadedModel):
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "three"}]},
    ]
    alone = loaded.chat(messages, max_new_tokens=12)
    settings: Any = {"model": NAME, "temperature": 0, "max_tokens": 12}
    answer = server.openai().chat.completions.create(messages=messages, **settings)
    assert answer.choices[0].message.content.strip() == alone
    messages[0] = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    again = server.openai().chat.completions.create(messages=messages, **settings)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_users_in_a_row_are_one_turn(server: Running):
    two: Any = [{"role": "user", "content": "One"}, {"role": "user", "content": "two"}]
    one: Any = [{"role": "user", "content": "One\ntwo"}]
    settings: Any = {"model": NAME, "temperature": 0, "max_tokens": 12}
    answers = [server.openai().chat.completions.create(messages=messages, **settings) for messages in (two, one)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_fields_that_change_nothing_are_tolerated(server: Running):
    plain = complete(server).choices[0].message.content
    harmless = {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "tools": [],
                "parallel_tool_calls": True, "response_format": {"type": "text"}, "something_new": [1]}  # fmt: skip
    assert complete(server, extra_body=harmless).choices[0].message.content == plain


def test_the_model_is_listed(server: Running):
    client = server.openai()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "vlm"
    for name in ("gpt-4", "llava-hf/llava"):
        with pytest.raises(openai.NotFoundError, match="no such model"):
            client.models.retrieve(name)


def test_errors_are_those_that_the_client_knows(server: Running):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, temperature=9)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        server.openai().chat.completions.create(model="gpt-4", messages=user("Hello"))  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"


@pytest.mark.anyio
async def test_the_asynchronous_client_streams_too(server: Running):
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
    messages: Any = user("What is this?")
    stream = await client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=8, stream=True
    )
    streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert streamed == complete(server).choices[0].message.content


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
