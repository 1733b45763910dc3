"""How the demo trunk was made, and the folder that it is served from."""

from pathlib import Path

FOLDER = Path(__file__).parent
