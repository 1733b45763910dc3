"""Fuzzing the parsers with Atheris: python tests/fuzz.py CHECK [libFuzzer's options].

CHECK is adapter_header, json_body or head. Ends with a traceback and the input at a finding.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["adapters.format", "server.bodies", "server.connection"]):
    import fuzz_targets

if __name__ == "__main__":
    check = getattr(fuzz_targets, f"check_{sys.argv[1]}")
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(fuzz_targets.SEEDS[check]):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], corpus, *sys.argv[2:]], lambda data: check(data) and None)
        atheris.Fuzz()
