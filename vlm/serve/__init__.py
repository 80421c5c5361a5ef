"""Vision-language models over HTTP: worker, gateway, page."""

from vlm.serve.content import data_url, question

__all__ = ["data_url", "question"]
