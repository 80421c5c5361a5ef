"""Vision-language models: build, train, evaluate. The only chapter that imports others."""
