"""Schemathesis, all its phases, against a real server: python tests/fuzz_api.py SECONDS.

Two of its checks are left out, for what an OpenAPI document can't say: a body of the right shape
may be refused for what it means (an unknown token, a file that is no adapter, both of two
exclusive keys); and a path below /adapters/ with a method that it lacks is a name to PUT and GET,
which refuse it with 422.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import TINY, random_gpt, save_random_adapter, start_server, tiny_tokenizer

from model.checkpoint import backbone_tensors, write_backbone

LEFT_OUT = "positive_data_acceptance,unsupported_method"


def main(seconds: str) -> int:
    """The exit status: 0 where nothing was found, and the server's log has no traceback."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny"
        tensors = backbone_tensors(TINY, random_gpt(TINY).state_dict())
        digest = write_backbone(folder, TINY, tensors, tiny_tokenizer())
        full = folder / "adapters" / "full.safetensors"
        save_random_adapter(full, TINY, digest, 1, norms=True, critic=True, classes=3)
        served = start_server(Path(scratch) / "log", folder, "--dtype", "float32")
        try:
            program = str(Path(sys.executable).with_name("schemathesis"))
            options = ["--max-time", seconds, "--continue-on-failure", "--exclude-checks", LEFT_OUT]
            command = [program, "run", f"{served.url}/openapi.json", *options]
            found = subprocess.run(command, cwd=scratch, check=False).returncode
        finally:
            stopped = served.stop()
        log = served.log.read_text("utf-8")
        print(f"server: exit status {stopped}, {log.count('Traceback')} tracebacks")
        return found or stopped or int("Traceback" in log)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
