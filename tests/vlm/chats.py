"""Helpers of the tests of the chat: a conversation that is recorded, pictures of noise, the same conversation anew."""

import torch

from vlm import chat


class Recorded(chat.Conversation):
    """Keeps the ids of the answers, and the logits of every reading."""

    def __init__(self, *about, **more):
        super().__init__(*about, **more)
        self.said = []
        self.logits = []

    def tokens(self, question):
        for token in super().tokens(question):
            self.said.append(token)
            yield token

    def read(self, embeds, keys):
        logits = super().read(embeds, keys)
        self.logits.append(logits)
        return logits


def loud(model):
    """Answers depend on the pictures."""
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(20)
    return model


def picture(seed, size=(28, 28)):
    torch.manual_seed(seed)
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8)


def anew(conversation):
    """The same conversation with nothing in its cache."""
    about = (conversation.tokenizer, conversation.model, conversation.max_new_tokens)
    other = Recorded(*about, conversation.tiles, conversation.max_prompt)
    other.turns = list(conversation.turns)
    other.shown = list(conversation.shown)
    other.waiting = list(conversation.waiting)
    return other
