"""`python -m eval.sandbox`: the layers that this machine has."""

from eval.sandbox.runner import probe

if __name__ == "__main__":
    layers = probe()
    print(layers.describe())
    print(layers.refusal() or "enough to run what a model wrote")
