"""`vllm serve` with a polarquant cache, asked by a real client over HTTP."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from engine_runs import MODEL, child_env, questions

from vllm_polarquant.eval.probe import episodes

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

pytestmark = pytest.mark.slow


class Server(NamedTuple):
    url: str
    log: Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        assert process.poll() is None, server.log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(server.log.read_text()[-4000:])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", MODEL]
    command += ["--served-model-name", "probe", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--kv-cache-dtype", "polarquant_k4v4", "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--enforce-eager", "--max-num-batched-tokens", "512"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=child_env(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    found = Server(f"http://127.0.0.1:{port}", log)
    try:
        wait_until_healthy(found, process)
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as connected:
        yield connected


def test_a_client_gets_the_right_answers(client: openai.OpenAI) -> None:
    right = 0
    for prompt, answer in questions(2000, 5):
        completion = client.completions.create(
            model="probe", prompt=prompt, temperature=0, max_tokens=episodes.PROBE_ANSWER_TOKENS
        )
        right += episodes.score_answer(completion.choices[0].text, answer)
    assert right >= 4


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    prompt, answer = questions(1000, 1)[0]
    request = {"model": "probe", "prompt": prompt, "temperature": 0, "max_tokens": 24}
    # From here on both find the prompt in the prefix cache, so that both read it off quantised pages.
    client.completions.create(**request)
    pieces = [event.choices[0].text for event in client.completions.create(**request, stream=True)]
    assert len(pieces) > 3
    assert episodes.score_answer("".join(pieces), answer)
    assert "".join(pieces) == client.completions.create(**request).choices[0].text


def test_the_server_logged_what_it_stores(server: Server) -> None:
    log = server.log.read_text()
    assert "polarquant_k4v4 (page format" in log
    assert re.search(r"1,320 bytes a token, 50,\d{3} tokens fit, 3\.8\d times those of auto", log)
    assert re.search(r"KV cache size: 50,\d{3} tokens", log)


def metrics_of(server: Server) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_metrics_say_what_is_stored(server: Server) -> None:
    (labels,) = re.findall(r"^vllm:cache_config_info\{(.*)\} 1\.0$", metrics_of(server), re.MULTILINE)
    found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    assert found["cache_dtype"] == "polarquant_k4v4"
    assert f"page format {found['polarquant_page_format']}" in server.log.read_text()
    tokens = re.search(r"KV cache size: ([\d,]+) tokens", server.log.read_text())
    assert tokens and found["kv_cache_size_tokens"] == tokens[1].replace(",", "")
    removed = re.search(r"([\d.]+)% of their energy removed", server.log.read_text())
    assert removed
    assert float(found["polarquant_key_energy_removed"]) == pytest.approx(float(removed[1]) / 100, abs=0.001)
    assert re.fullmatch(r"[0-9a-f]{12}", found["polarquant_cache_identity"])


def test_the_prefix_cache_was_used(server: Server) -> None:
    hits = re.findall(r"^vllm:prefix_cache_hits_total\{[^}]*\} ([\d.e+]+)$", metrics_of(server), re.MULTILINE)
    assert sum(map(float, hits)) > 4 * 1500
