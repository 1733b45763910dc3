"""/docs works where there is no internet."""

import re

from conftest import Served


def test_the_page_of_the_api_loads_nothing_from_elsewhere(tiny_server: Served) -> None:
    with tiny_server.client() as client:
        page = client.get("/docs").text
        sources = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert any(source.endswith(".js") for source in sources)
        assert any(source.endswith(".css") for source in sources)
        for source in sources:
            assert source.startswith("/"), source
            assert client.get(source).status_code == 200
        assert client.get("/redoc").status_code == 404
