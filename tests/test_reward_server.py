"""Reward servers, real ones on loopback: what they may answer, when they are asked again, what is said of one that fails."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows.cli.main import run_command
from schemas.errors import NonFiniteError, RewardError, StoppedError
from stages.ops.progress import interrupted_by
from stages.ops.reward_server import RewardServer, _wait


def lengths(body):
    return {"scores": [float(len(text)) for text in body["responses"]]}


class _Handler(BaseHTTPRequestHandler):
    """Gives the answers in turn, the last from then on: (status, headers, what of the body becomes the reply)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(time.monotonic())
        status, headers, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        reply = answer(body) if callable(answer) else answer
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) + self.more))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A way to start one; gives its address and when it was asked."""
    def start(*answers, more=0):
        asked = []
        handler = type("Handler", (_Handler,), {"answers": list(answers), "asked": asked, "more": more})
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        started.append(http)
        return f"http://127.0.0.1:{http.server_port}/score", asked

    started: list[ThreadingHTTPServer] = []
    yield start
    for http in started:
        http.shutdown()
        http.server_close()


@pytest.mark.parametrize("form", [lengths, lambda body: {"rewards": lengths(body)["scores"]},
                                  lambda body: lengths(body)["scores"]])
def test_scores_in_each_form(server, rollouts, form):
    url, asked = server((200, {}, form))
    assert RewardServer(url)(rollouts).tolist() == [len(text) for text in rollouts.response] and len(asked) == 1


@pytest.mark.parametrize("status, reply, message", [
    (500, b"CUDA out of memory", "answered 500: CUDA out of memory (asked 2 times; execution.server_tries)"),
    (422, {"detail": "field required: texts"}, "answered 422: {\"detail\": \"field required: texts\"}"),
    (401, b"who are you?", "answered 401 (set BATON_REWARD_TOKEN=host=token): who are you?"),
    (200, b"<html>login</html>", "its reply is not JSON (Expecting value: line 1 column 1 (char 0)): <html>login</html>"),
    (200, b"[1, 2", "its reply is not JSON"),
    (200, b"", "Expecting value: line 1 column 1 (char 0)): nothing"),
    (200, {"result": []}, "expected {\"scores\": […]}, {\"rewards\": […]} or a list, found {\"result\": []}"),
    (200, {"scores": [1]}, "expected 9 numbers, one a response, found 1: "),
    (200, {"scores": ["good"] * 9}, "expected 9 numbers, found"),
    (503, b"x" * 999, f"answered 503: {'x' * 200}… (asked 2 times")])
def test_what_a_server_said_is_shown(server, rollouts, status, reply, message):
    url, _ = server((status, {"Retry-After": "0"}, reply))
    with pytest.raises(RewardError) as error:
        RewardServer(url, tries=2)(rollouts)
    assert str(error.value).startswith(f"reward server {url}: ") and message in str(error.value)


def test_a_redirect_is_not_followed_and_says_where_to(server, rollouts):
    url, asked = server((307, {"Location": "http://127.0.0.1:1/other"}, b""))
    with pytest.raises(RewardError, match=r"redirects to http://127.0.0.1:1/other, which is not followed; name it"):
        RewardServer(url)(rollouts)
    assert len(asked) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_is_asked_again_when_it_says(server, rollouts, status, caplog):
    url, asked = server((status, {"Retry-After": "1"}, b"busy"), (200, {}, lengths))
    assert RewardServer(url)(rollouts).tolist() == [len(text) for text in rollouts.response]
    assert len(asked) == 2 and asked[1] - asked[0] >= 1
    assert f"answered {status}: busy; it is asked again in 1 s" in caplog.text


def test_when_it_is_asked_again():
    assert [_wait(None, attempt) for attempt in (1, 2, 3, 9)] == [2, 10, 30, 30]
    assert _wait("7", 1) == 7 and _wait("99999", 1) == 300 and _wait("soon", 1) == 2
    assert _wait("Wed, 21 Oct 2015 07:28:00 GMT", 3) == 0


def test_half_a_reply_and_one_that_is_too_long(server, rollouts):
    url, _ = server((200, {}, lengths), more=10)
    with pytest.raises(RewardError, match=r"peer closed connection|incomplete"):
        RewardServer(url, tries=1, timeout=2)(rollouts)
    url, _ = server((200, {}, b" " * 2**21))
    with pytest.raises(RewardError, match="the reply is longer than 1057792 bytes, for 9 scores"):
        RewardServer(url, tries=1)(rollouts)


def test_a_server_that_does_not_answer_in_time(server, rollouts):
    url, _ = server((200, {}, lambda body: time.sleep(3) or lengths(body)))
    with pytest.raises(RewardError, match=r"has not answered for 0.2 s \(execution.server_timeout\)"):
        RewardServer(url, timeout=0.2, tries=1)(rollouts)


def test_a_pause_ends_with_the_stages_beside_it(server, rollouts):
    """Half an hour of it, of which five minutes would be waited."""
    url, asked = server((503, {"Retry-After": "1800"}, b""))
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with interrupted_by(stop), pytest.raises(StoppedError, match=f"reward server {url}: ended in the middle"):
        RewardServer(url)(rollouts)
    assert len(asked) == 1


def test_no_server(rollouts):
    with pytest.raises(RewardError, match=r"127\.0\.0\.1:9"):
        RewardServer("http://127.0.0.1:9/score", tries=1)(rollouts)


@pytest.mark.parametrize("bad, said", [(None, "None"), (1e40, "1e+40"), (float("nan"), "nan")])
def test_a_score_that_is_no_number_is_shown_with_its_prompt(server, rollouts, bad, said, recwarn):
    url, _ = server((200, {}, lambda body: {"scores": [0.0, bad, *[0.0] * 7]}))
    with pytest.raises(NonFiniteError) as error:
        RewardServer(url)(rollouts)
    assert f"gave {said} for the response in row 1, to the prompt {rollouts.prompt[1]!r}" in str(error.value)
    assert not recwarn.list


def test_a_stage_with_a_server_by_its_settings(server, copied, capsys):
    """Tried once more than it fails; with fewer tries the stage ends."""
    components = json.dumps({"served": {"source": (url := server((503, {"Retry-After": "0"}, b""), (200, {}, lengths))[0])}})
    arguments = ["stage", "reward", "tiny", "--iteration", "1", "--store", str(copied[1]), "--json", "--set"]
    assert run_command([*arguments, f"reward.components={components}"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "new"
    components = json.dumps({"served": {"source": (url := server((503, {"Retry-After": "0"}, b""))[0])}})
    assert run_command([*arguments, f"reward.components={components}", "--set", "execution.server_tries=1"]) == 1
    assert f"baton: reward server {url}: answered 503: nothing" in capsys.readouterr().err
