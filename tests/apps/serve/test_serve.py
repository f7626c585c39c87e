"""The completions of the OpenAI interface: texts, streams, infills, scores and refusals."""

import logging
import math
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec

import pytest

from tarflowlm.errors import UserError
from tarflowlm.generation.texts import write_texts
from tarflowlm.requests import Writing
from tarflowlm_apps.serve.answers import Answer
from tarflowlm_apps.transformers_export.checkpoint import save_causal_lm

HOW = {"seed": 3, "temperature": 0.8, "top_p": 0.9, "n": 2}


@pytest.mark.parametrize("name", ["twin", "flow", "passes", "pieces"])
def test_texts_are_those_of_samples_streamed_or_not(name, request):
    served = request.getfixturevalue(name)
    prompts = ["the king of ", "a dog"]
    num = HOW["n"]
    options = {name: value for name, value in HOW.items() if name != "n"}
    writing = Writing(prompt=prompts, num=num, max_new_tokens=12, **options)
    expected = write_texts(writing, served.lm)
    found = served.ask(prompt=prompts, max_tokens=12, **HOW)
    texts = [choice["text"] for choice in found["choices"]]
    assert [prompts[row // num] + text for row, text in enumerate(texts)] == expected
    assert [choice["finish_reason"] for choice in found["choices"]] == ["length"] * 4
    assert found["usage"]["completion_tokens"] == 48
    streamed = [""] * 4
    for event in served.stream(prompt=prompts, max_tokens=12, **HOW):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_stops_echo_and_token_ids(pieces):
    lm = pieces.lm
    ids = lm.encode("The old king").tolist()
    how = {"seed": 2, "max_tokens": 40}
    (whole,) = pieces.texts(prompt=ids, echo=True, **how)
    assert whole == lm.write("The old king", max_new_tokens=40, seed=2)
    (cut,) = pieces.ask(prompt="The old king", stop=[" the"], **how)["choices"]
    assert cut["text"] == whole.removeprefix("The old king").partition(" the")[0]
    assert cut["finish_reason"] == "stop"
    stopped = {"prompt": "The old king", "stop": [" the"], "logprobs": 0} | how
    answer = pieces.ask(**stopped)
    assert "".join(answer["choices"][0]["logprobs"]["tokens"]) == cut["text"]
    assert answer["usage"]["completion_tokens"] < 40
    *_, last = pieces.stream(**stopped, stream_options={"include_usage": True})
    assert last["usage"] == answer["usage"]
    *_, last = pieces.stream(**stopped, stream_options={"include_usage": False})
    assert last["choices"]
    assert pieces.texts(prompt="The old king", temperature=0, **how) == pieces.texts(
        prompt="The old king", top_k=1, **how
    )
    assert len(pieces.texts(prompt=["", ""], n=2, **how)) == 4
    *_, last = pieces.stream(prompt="The old king", stream_options={"include_usage": True}, **how)
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 40, "total_tokens": 43}


def test_token_ids_are_continued_as_they_are(pieces):
    """Also where the text that they spell has fewer tokens."""
    lm = pieces.lm
    ids = [int(lm.encode(letter)[0]) for letter in "The"]
    assert len(lm.encode("The")) == 1
    ask = {"prompt": ids, "echo": True, "logprobs": 0}
    found = [pieces.ask(**ask, max_tokens=num) for num in (0, 2)]
    scored, written = (answer["choices"][0]["logprobs"] for answer in found)
    assert (scored["tokens"], written["tokens"][:3]) == (["T", "h", "e"],) * 2
    assert scored["token_logprobs"] == pytest.approx(written["token_logprobs"][:3])
    assert [answer["usage"]["prompt_tokens"] for answer in found] == [3, 3]
    end = lm.tokenizer.end
    status, refused = pieces.post({"model": pieces.name, "prompt": [*ids, end], "max_tokens": 2})
    assert (status, f"token {end} ends a document" in refused["error"]["message"]) == (400, True)


@pytest.mark.parametrize("name", ["flow", "pieces"])
def test_a_suffix_asks_for_what_is_between(name, request):
    served = request.getfixturevalue(name)
    given = {"prompt": "the king of ", "suffix": " who lived in the forest"}
    (middle,) = served.texts(**given, seed=2, max_tokens=6)
    template = "the king of [...6] who lived in the forest"
    assert given["prompt"] + middle + given["suffix"] == served.lm.fill(template, seed=2)
    assert served.texts(**given | {"prompt": [given["prompt"]]}, seed=2, max_tokens=6) == [middle]
    (event,) = served.stream(**given, seed=2, max_tokens=6)
    assert (event["choices"][0]["text"], event["choices"][0]["finish_reason"]) == (middle, "stop")


@pytest.mark.parametrize("name", ["twin", "flow", "pieces"])
def test_log_probabilities_are_those_of_score(name, request):
    served = request.getfixturevalue(name)
    text = "the king of the land had three sons"
    expected = served.lm.score(text, seed=4, samples=2)
    (scored,) = served.ask(prompt=text, echo=True, logprobs=3, max_tokens=0, seed=4)["choices"]
    found = scored["logprobs"]
    bits = [-value / math.log(2) for value in found["token_logprobs"]]
    assert bits == pytest.approx(expected.bits.tolist(), abs=1e-6)
    assert scored["text"] == text == "".join(found["tokens"])
    places = zip(found["tokens"], found["text_offset"], strict=True)
    assert all(text[at : at + len(token)] == token for token, at in places)
    for token, value, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == value
        assert len(top) in ((1,) if name == "flow" else (3, 4))
    # new tokens continue the entries
    how = {"max_tokens": 5, "seed": 4, "logprobs": 0, "echo": True}
    (longer,) = served.ask(prompt=text, **how)["choices"]
    values = longer["logprobs"]["token_logprobs"]
    if served.lm.model.is_exact:
        assert values[: len(bits)] == pytest.approx(found["token_logprobs"], abs=1e-5)
    assert "".join(longer["logprobs"]["tokens"]) == longer["text"]


@pytest.mark.parametrize("name", ["passes", "pieces"])
@pytest.mark.parametrize("prompt", ["the king of", "the king of ", "the king of  "])
def test_log_probabilities_of_a_text_that_goes_on_add_up_to_its_score(name, prompt, request):
    served = request.getfixturevalue(name)
    how = {"max_tokens": 6, "seed": 5, "logprobs": 0, "echo": True}
    (found,) = served.ask(prompt=prompt, **how)["choices"]
    assert found["text"].startswith(prompt if name == "pieces" else prompt.rstrip())
    assert found["text"] == "".join(found["logprobs"]["tokens"])
    bits = -sum(found["logprobs"]["token_logprobs"]) / math.log(2)
    total = served.lm.score(found["text"], seed=5, samples=2).total
    assert bits == pytest.approx(total, rel=1e-4)


def test_places_of_tokens_that_hold_parts_of_characters(pieces):
    text = "the café of the old ☕ king"
    (found,) = pieces.ask(prompt=text, echo=True, logprobs=0, max_tokens=0)["choices"]
    tokens, places = (found["logprobs"][name] for name in ("tokens", "text_offset"))
    assert len("".join(tokens)) > len(text)
    whole = [(token, at) for token, at in zip(tokens, places, strict=True) if "bytes:" not in token]
    parts = [token for token in tokens if token.startswith("bytes:")]
    assert len(parts) == len(set(parts)) > 1
    assert whole[-1][0].endswith("ng")
    assert all(text[at : at + len(token)] == token for token, at in whole)


def test_texts_that_are_read_differently_are_told(twin):
    found = twin.ask(prompt="The king", stop=["A:"], max_tokens=8, seed=1)
    assert found["notices"] == ["read as: the king", "stop read as:  a "]
    assert "notices" not in twin.ask(prompt="the king", max_tokens=8)


def test_an_error_in_a_stream_has_the_type_that_it_has_elsewhere(twin, monkeypatch):
    def parts(self):
        yield []
        raise UserError("the text is wrong: mend it")

    monkeypatch.setattr(Answer, "parts", parts)
    status, found = twin.post({"model": twin.name, "prompt": "a"})
    assert (status, found["error"]["type"]) == (400, "invalid_request_error")
    assert twin.stream(prompt="a") == [found]


def test_an_error_of_the_server_in_a_stream_is_also_in_its_log(twin, monkeypatch, caplog):
    def parts(self):
        yield []
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(Answer, "parts", parts)
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    with caplog.at_level("ERROR", "uvicorn.error"):
        (found,) = twin.stream(prompt="a")
    assert found["error"]["type"] == "server_error"
    assert "no memory is left" in caplog.text


WRONG = {
    "no prompt": ({"prompt": []}, "prompt"),
    "a number": ({"prompt": 3}, "prompt 3"),
    "mixed": ({"prompt": ["a", 1]}, "prompt"),
    "no token": ({"prompt": [1, 10**6]}, "tokens"),
    "surrogate": ({"prompt": "a\ud800"}, "not UTF-8"),
    "temperature": ({"temperature": "hot"}, "temperature 'hot'"),
    "true": ({"max_tokens": True}, "max_tokens True"),
    "too many": ({"n": 1000}, "n 1000"),
    "too long": ({"max_tokens": 10**6}, "1,000,001 tokens in all"),
    "unknown": ({"logit_bias": {}}, "logit_bias: unknown key"),
    "penalty": ({"presence_penalty": 1.0}, "presence_penalty 1.0"),
    "stops": ({"stop": ["x"] * 99}, "stop"),
    "long stop": ({"stop": "x" * 1001}, "stop"),
    "texts": ({"prompt": [[1]] * 513, "n": 2}, "1,026 texts in all"),
    "items": ({"prompt": [[1] * 1000] * 132}, "132,132 items in all"),
    "suffix": ({"suffix": "b", "stop": "c"}, "suffix with stop"),
    "long suffix": ({"suffix": "b", "max_tokens": 10_000}, "give 1 to 9999 with a suffix"),
    "unread suffix": ({"suffix": "b", "max_tokens": 0}, "give 1 to 9999 with a suffix"),
    "empty suffix": ({"suffix": " "}, "suffix"),
    "suffix without letters": ({"suffix": "."}, "ends in a gap"),
    "suffixes": ({"prompt": ["a", "b"], "suffix": "c"}, "it needs one prompt"),
    "empty prompt": ({"prompt": ["", "a"]}, "prompt 1 of 2 is empty"),
    "usage": ({"stream_options": True}, "include_usage"),
    "mark": ({"prompt": "a[...3]", "suffix": "b"}, "[..."),
    "private mark": ({"prompt": "a\ue000", "suffix": "b"}, "a mark of a blank"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_gets_one_line(case, twin):
    fields, said = WRONG[case]
    status, found = twin.post({"model": twin.name, "prompt": "a"} | fields)
    assert status == 400
    assert found["error"]["type"] == "invalid_request_error"
    assert said in found["error"]["message"]
    assert "\n" not in found["error"]["message"]


def test_a_wrong_body_model_or_address_gets_one_line(twin):
    body = {"model": "gpt-5", "prompt": "a"}
    assert twin.post(body)[0] == 404
    assert twin.post(body)[1]["error"]["code"] == "model_not_found"
    for data in (b"{", b"[1]", b"[" * 100_000, b"\xff", b'{"prompt": NaN}'):
        status, found = twin.post(data)
        assert (status, found["error"]["type"]) == (400, "invalid_request_error")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, found = twin.post(b'{"prompt": "' + b"x" * 10_000_000 + b'"}')
    assert (status, "at most" in found["error"]["message"]) == (413, True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KB
    status, found = twin.post({}, "chat/completions")
    assert (status, "/v1/completions" in found["error"]["message"]) == (404, True)
    assert twin.post({}, "models")[0] == 405


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain;json",
        "text/plain; charset=json",
        "multipart/form-data; boundary=json",
        "application/x-www-form-urlencoded; a=json",
    ],
)
def test_a_page_elsewhere_cannot_ask(twin, kind):
    """A browser sends these types to other origins without asking."""
    body = {"model": twin.name, "prompt": "a", "max_tokens": 1}
    assert twin.post(body, kind=kind)[0] == 415
    for same in ("application/json; charset=utf-8", "Application/JSON"):
        assert twin.post(body, kind=same)[0] == 200


def test_a_client_that_leaves_ends_its_work(twin, monkeypatch):
    taken = []
    parts = Answer.parts

    def counted(self):
        try:
            for part in parts(self):
                taken.append(part)
                yield part
        finally:
            taken.append("end")

    monkeypatch.setattr(Answer, "parts", counted)
    for is_stream in (True, False):
        taken.clear()
        with twin.open(prompt="a", max_tokens=50_000, stream=is_stream):
            while len(taken) < 3:
                time.sleep(0.01)
        waited = time.perf_counter()
        while taken[-1] != "end":
            assert time.perf_counter() - waited < 10
            time.sleep(0.01)
        assert len(taken) < 1000
    assert twin.texts(prompt="a", max_tokens=2, seed=0)


@pytest.mark.slow
def test_a_hundred_at_once_are_all_answered_within_the_same_memory(twin):
    one = partial(twin.texts, prompt="the king", max_tokens=8)
    expected = [one(seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(100) as pool:
        # the threads of the clients take memory, too, once
        list(pool.map(lambda row: one(seed=row % 4), range(100)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = list(pool.map(lambda row: one(seed=row % 4), range(100)))
    assert found == expected * 25
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KB


@pytest.mark.slow
def test_the_official_client(twin):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=twin.url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [twin.name]
    assert client.models.retrieve(twin.name).owned_by == "tarflowlm"
    ask = partial(client.completions.create, model=twin.name, prompt="the king", seed=1)
    found = ask(max_tokens=9, logprobs=2, temperature=0.7)
    assert len(found.choices[0].logprobs.token_logprobs) == found.usage.completion_tokens == 9
    texts = [event.choices[0].text for event in ask(max_tokens=9, temperature=0.7, stream=True)]
    assert len(texts) > 2
    assert "".join(texts) == found.choices[0].text
    assert ask(suffix=" the forest", max_tokens=5).choices[0].finish_reason == "stop"
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.completions.create(model="gpt-5", prompt="a")
    with pytest.raises(openai.BadRequestError, match="top_p 2"):
        ask(top_p=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["twin", "flow", "pieces"])
def test_lm_eval_gets_the_bits_of_score(name, request, tmp_path):
    if any(find_spec(package) is None for package in ("lm_eval", "tenacity", "transformers")):
        pytest.skip("needs lm_eval with tenacity, and transformers")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    served = request.getfixturevalue(name)
    model = LocalCompletionsAPI(
        base_url=f"{served.url}/completions",
        model=served.name,
        tokenizer=str(save_causal_lm(served.lm, tmp_path / "exported")),
        trust_remote_code=True,
        batch_size=2,
        seed=7,
    )
    # with the space before it that a normalised text has
    start, end = " the king of the", " land was old"
    score = partial(served.lm.score, seed=7, samples=2)
    rolling = Instance("loglikelihood_rolling", {}, (start + end,), 0)
    (nats,) = model.loglikelihood_rolling([rolling])
    assert -nats / math.log(2) == pytest.approx(score(start + end).total, abs=1e-4)
    pair = Instance("loglikelihood", {}, (start, end), 0)
    ((nats, is_greedy),) = model.loglikelihood([pair])
    bits = score(start + end).bits[len(served.lm.encode(start)) :].sum().item()
    assert -nats / math.log(2) == pytest.approx(bits, abs=1e-4)
    assert is_greedy is (name == "flow") or not is_greedy


@pytest.mark.slow
def test_the_command_says_where_and_what(refused):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        refused("serve", "english-mini-ar", "--port", port, names=[str(port), "choose another"])
    refused("serve", "english-mini-ar", "--port", 70000, names=["--port 70000"])
    command = [sys.executable, "-m", "tarflowlm", "serve", "english-mini-ar", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith(
            f"http://127.0.0.1:{port}/v1 serves english-mini-ar"
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
