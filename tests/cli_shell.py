"""`trunkline adapters` as the tests run it: in this process, against a server's address."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from server.cli import main


@dataclasses.dataclass
class Shell:
    """The command line, run in this process against one server."""

    url: str

    def run(self, *words: str | Path | int, **environment: str) -> Result:
        variables = {"COLUMNS": "100", "TRUNKLINE_URL": self.url} | environment
        return CliRunner().invoke(main, ["adapters", *map(str, words)], env=variables)

    def shown(self, *words: str | Path | int, **environment: str) -> str:
        result = self.run(*words, **environment)
        assert result.exit_code == 0, result.output
        return result.stdout

    def answer(self, *words: str | Path | int) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.shown(*words, "--json"))
        return answer

    def error(self, *words: str | Path | int) -> str:
        """The sentence of a command that fails; with --json the server's error has the same."""
        result = self.run(*words)
        assert result.exit_code == 1
        assert result.stdout == ""
        as_json = self.run(*words, "--json")
        assert as_json.exit_code == 1
        error = json.loads(as_json.stdout)["error"]
        assert result.stderr == f"Error: {error['message']} ({error['code']})\n"
        return result.stderr
