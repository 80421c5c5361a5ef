"""The client of OpenAI with our server, or with whatever answers at --base-url: vLLM, SGLang, TGI, transformers.

pytest tests/deploy/test_client.py
pytest tests/deploy/test_client.py --base-url http://127.0.0.1:8000/v1
"""

import os

import openai
import pytest

from deploy import serve
from tests import llamas
from tests.deploy import client_checks, servers
from tests.deploy.test_serve import big_talker


@pytest.fixture(scope="module")
def client(request):
    """A client of the server at --base-url; without one, of ours with a tiny model."""
    address = request.config.getoption("--base-url")
    key = os.environ.get(serve.KEY, "none")
    if address:
        with openai.OpenAI(base_url=address, api_key=key, max_retries=0) as found:
            yield found
        return
    with (
        servers.running(big_talker(), llamas.tokenizer(), name="tiny") as server,
        openai.OpenAI(base_url=server.address, api_key=key, max_retries=0) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def model(request, client):
    """--served-model, or the first one that the server lists."""
    return request.config.getoption("--served-model") or client.models.list().data[0].id


@pytest.mark.parametrize("check", client_checks.CHECKS, ids=lambda check: check.__name__)
def test_the_client_of_openai(client, model, check):
    check(client, model)
