"""What the tests of loss and divergences share."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside it held at one time, views counted once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage().data_ptr() for x in [*args, *(kwargs or {}).values()] if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in before:
                storage = made.untyped_storage()
                if storage not in self.known:
                    self.known[storage] = size = storage.nbytes()
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.freed, size)
        return out

    def freed(self, size):
        self.now -= size


def rms(x):
    return x.double().square().mean().sqrt()
