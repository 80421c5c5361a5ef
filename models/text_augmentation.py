"""Text augmentation: noise on word features and word dropout, so that captions are not learned by heart.

Every caption of the training belongs to one picture. A network with enough weights learns the pairs and draws anything
for a new caption; when each caption comes a little different every time, captions that are near each other have to
share what they draw. Noise on features is Bishop 1995, "Training with noise is equivalent to Tikhonov regularization";
word dropout is Iyyer et al. 2015, "Deep unordered composition rivals syntactic methods", Sec. 3.1.

Shapes: B captions, L words, E features of a word.
"""

import torch


def augment_text(words, mask, noise, dropped):
    """Add noise (B, L, E) to the words, hide the words where `dropped` (B, L) is True; the first token always stays."""
    keep = ~dropped
    keep[:, 0] = True
    return words + noise, mask & keep


def draw_augmentation(words, std, text_noise, word_dropout):
    """Random noise (B, L, E) and words to drop (B, L) for words (B, L, E) whose standard deviation is std.

    text_noise: standard deviation of the strength, in units of std; each caption has a strength of its own, so some
    stay nearly as they are.
    """
    strength = text_noise * std * torch.randn(len(words), 1, 1)
    noise = strength * torch.randn(words.shape)
    dropped = torch.rand(words.shape[:2]) < word_dropout
    return noise, dropped
