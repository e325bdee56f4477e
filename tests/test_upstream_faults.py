"""What goes wrong at an upstream: its status and its words are told, its key is not, and what it wrote is counted."""

from __future__ import annotations

import httpx
import pytest
from typer.testing import CliRunner

from rsim.cli.main import app
from rsim.errors import UserError, key_from
from rsim.serving.server import SUFFIX
from rsim.serving.upstream_client import KEY
from test_upstreams import COUNTED, STOP, ask, chunk, events, stream

MODELS = ("m", f"m{SUFFIX}")


# --- its key ---


def test_a_key_loses_the_line_break_that_came_with_it(monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret\r\n")
    assert key_from(KEY) == "sk-secret"
    monkeypatch.delenv(KEY)
    assert key_from(KEY) == ""


@pytest.mark.parametrize("key", ["sk-\rsecret", "sk-secret\u2028x", "sk-sécret"])
def test_a_key_that_no_header_can_hold_is_named_and_not_shown(monkeypatch, key, tmp_path):
    upstream = ["--upstream", "http://127.0.0.1:9/v1", "--model", "m", "--planner"]
    commands = (
        ["serve", *upstream, "random", "--port", "0"],
        ["eval", "nano", *upstream, "none", "--out", str(tmp_path / "o")],
    )
    for variable, command in ((KEY, commands[0]), ("RSIM_API_KEY", commands[0]), (KEY, commands[1])):
        monkeypatch.setenv(variable, key)
        refused = CliRunner().invoke(app, command).exception
        monkeypatch.delenv(variable)
        assert isinstance(refused, UserError)
        assert f"${variable}" in str(refused)
        assert "cret" not in str(refused)


def test_a_header_that_cannot_be_sent_is_not_shown():
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError("Illegal header value b'Bearer sk-secret\\r'")

    for model in MODELS:
        reply, _ = ask(answer, model=model)
        assert reply.status_code == 502
        assert "LocalProtocolError" in reply.text
        assert "secret" not in reply.text


# --- its errors ---


class BreaksOff(httpx.AsyncByteStream):
    async def __aiter__(self):
        yield b'{"error": '
        raise httpx.RemoteProtocolError("peer closed connection")


def test_an_error_whose_body_breaks_off_keeps_its_status_and_is_tried_again():
    replies = iter([httpx.Response(503, stream=BreaksOff()), httpx.Response(200, content=stream(chunk("12"), STOP, COUNTED))])
    reply, _ = ask(lambda request: next(replies))
    assert reply.status_code == 200
    reply, _ = ask(lambda request: httpx.Response(402, stream=BreaksOff()))
    assert (reply.status_code, reply.json()["error"]["message"]) == (402, "the upstream answered 402")


@pytest.mark.parametrize("error", [
    '{"message": "no \\ud83d", "type": "t\\udc00", "code": "\\ud800"}', '"no \\ud83d"', '{"message": "no \\ufffd", "code": NaN}',
])  # fmt: skip
def test_half_a_character_in_an_error_leaves_it_its_status(error):
    reply, _ = ask(lambda request: httpx.Response(402, content=f'{{"error": {error}}}'.encode()))
    assert (reply.status_code, reply.json()["error"]["message"]) == (402, "no \ufffd")


@pytest.mark.parametrize("streamed", [False, True])
def test_half_a_character_in_a_reason_to_end_is_told_as_none(streamed):
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "odd\ud83d"}]}
    reply, _ = ask(stream(chunk("12"), end, COUNTED), stream=streamed)
    told = events(reply)[-1] if streamed else reply.json()
    assert told["choices"][0]["finish_reason"] == "odd\ufffd"
